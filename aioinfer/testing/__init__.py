"""Test support: the contract of transports as a test suite, and models and callers for tests of your own.

from aioinfer.testing import check_transport

def test_my_transport():
    check_transport(MyTransport)

``aioinfer.testing.inspection`` looks inside servers, transports and clients, for tests that act at an exact moment.
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
    request_of,
)
from aioinfer.testing.contract import CHECKS, check_transport

__all__ = [
    "CHECKS",
    "AwaitingCallers",
    "BlockingCallers",
    "Callers",
    "GatedModel",
    "TransportHarness",
    "check_transport",
    "double",
    "eventually",
    "request",
    "request_of",
]
