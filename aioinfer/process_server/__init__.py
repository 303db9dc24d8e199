"""A server in a process of its own."""

from aioinfer.health import Health
from aioinfer.process_server.server import ProcessInferenceServer

__all__ = ["Health", "ProcessInferenceServer"]
