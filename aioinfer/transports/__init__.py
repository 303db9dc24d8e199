"""How requests and replies travel."""

from aioinfer.transports.local import SlotTransport, ThreadingTransport
from aioinfer.transports.polling import InferenceTransport
from aioinfer.transports.process_slots import ProcessSlotTransport
from aioinfer.transports.queues import MPTransport
from aioinfer.transports.remote import Remote, connect

__all__ = [
    "InferenceTransport",
    "MPTransport",
    "ProcessSlotTransport",
    "Remote",
    "SlotTransport",
    "ThreadingTransport",
    "connect",
]
