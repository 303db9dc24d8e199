"""How requests and replies travel."""

from aioinfer.transports.base import InferenceTransport
from aioinfer.transports.slots import SlotTransport
from aioinfer.transports.threads import ThreadingTransport

__all__ = ["InferenceTransport", "SlotTransport", "ThreadingTransport"]
