"""Test support: the contract of transports as a test suite, and models and callers for tests of your own.

from aioinfer.testing import check_transport

def test_my_transport():
    check_transport(MyTransport)

``testing/inspection.py`` looks inside servers, transports and clients, for tests that must act at an exact moment.
"""

from aioinfer.testing.callers import (
    AwaitingCallers,
    BlockingCallers,
    Callers,
    GatedModel,
    TransportHarness,
    double,
    eventually,
    request,
)
from aioinfer.testing.contract import CHECKS, check_transport
from aioinfer.testing.inspection import (
    channel_of,
    connection_of,
    has_pending_command,
    has_pending_job,
    has_waiting_callers,
    ignore_in_wait,
    locks_of,
    put_bytes,
    sender_of,
    weight_sender_of,
)

__all__ = [
    "CHECKS",
    "AwaitingCallers",
    "BlockingCallers",
    "Callers",
    "GatedModel",
    "TransportHarness",
    "channel_of",
    "check_transport",
    "connection_of",
    "double",
    "eventually",
    "has_pending_command",
    "has_pending_job",
    "has_waiting_callers",
    "ignore_in_wait",
    "locks_of",
    "put_bytes",
    "request",
    "sender_of",
    "weight_sender_of",
]
