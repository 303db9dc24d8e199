"""For those who write a transport, or test code around a server.

from aioinfer.testing import check_transport

def test_my_transport():
    check_transport(MyTransport)
"""

from aioinfer.testing.callers import (
    AwaitingCallers,
    BlockingCallers,
    Callers,
    GatedModel,
    Ground,
    double,
    eventually,
    request,
)
from aioinfer.testing.contract import CHECKS, check_transport

__all__ = [
    "CHECKS",
    "AwaitingCallers",
    "BlockingCallers",
    "Callers",
    "GatedModel",
    "Ground",
    "check_transport",
    "double",
    "eventually",
    "request",
]
