"""A server in a process of its own."""

from aioinfer.process_server.server import ProcessInferenceServer
from aioinfer.stats import Health

__all__ = ["Health", "ProcessInferenceServer"]
