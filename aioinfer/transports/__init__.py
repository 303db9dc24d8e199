"""How requests and replies travel."""

from aioinfer.transports.ipc.pickled import MPTransport
from aioinfer.transports.ipc.slots import ProcessSlotTransport
from aioinfer.transports.local import SlotTransport, ThreadingTransport
from aioinfer.transports.polling import InferenceTransport
from aioinfer.transports.remote import RemoteServer, connect

__all__ = [
    "InferenceTransport",
    "MPTransport",
    "ProcessSlotTransport",
    "RemoteServer",
    "SlotTransport",
    "ThreadingTransport",
    "connect",
]
