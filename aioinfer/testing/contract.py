"""The contract of transports: checks that run over any of them, with both kinds of caller."""

from __future__ import annotations

from collections.abc import Callable
from inspect import isfunction

from aioinfer.testing import lifecycle_checks, name_checks, reply_checks, row_checks
from aioinfer.testing.callers import AwaitingCallers, BlockingCallers, TransportHarness
from aioinfer.transports.polling import InferenceTransport

__all__ = ["CHECKS", "check_transport"]

CHECKS: tuple[Callable[[TransportHarness], None], ...] = tuple(
    check
    for module in (reply_checks, lifecycle_checks, row_checks, name_checks)
    for check in vars(module).values()
    if isfunction(check) and check.__module__ == module.__name__
)
"""Every function of the four modules, in the order of their definitions."""


def check_transport(transport: Callable[[], InferenceTransport], *, drops_cancelled: bool = False) -> None:
    """Run the contract's checks over a transport, with blocking and with awaiting callers.

    Args:
        transport: makes a fresh transport, with room for 16 clients, for each check.
        drops_cancelled: also demand that a request which is cancelled before its batch left is never computed.
            A transport that has only the five verbs can't promise that.

    Raises:
        ExceptionGroup: of the checks that failed, each with a note that names it and its promise.
    """
    failures: list[Exception] = []
    for callers in (BlockingCallers, AwaitingCallers):
        for check in CHECKS:
            try:
                check(TransportHarness(transport, callers, drops_cancelled=drops_cancelled))
            except Exception as failure:
                failure.add_note(f"{check.__name__}, {callers.__name__}: {check.__doc__}")
                failures.append(failure)
    if failures:
        raise ExceptionGroup(f"{len(failures)} checks of the transport contract failed", failures)
