"""How requests and replies travel."""

from aioinfer.transports.base import InferenceTransport
from aioinfer.transports.process_slots import ProcessSlotTransport
from aioinfer.transports.queues import MPTransport
from aioinfer.transports.remote import Remote, connect
from aioinfer.transports.slots import SlotTransport
from aioinfer.transports.threads import ThreadingTransport

__all__ = [
    "InferenceTransport",
    "MPTransport",
    "ProcessSlotTransport",
    "Remote",
    "SlotTransport",
    "ThreadingTransport",
    "connect",
]
