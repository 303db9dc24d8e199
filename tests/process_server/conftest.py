"""Fixtures for the tests of servers in processes of their own."""

from __future__ import annotations

import pytest

from aioinfer.process_server import parent, server
from tests.limits import HANG


@pytest.fixture
def exits_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of a server has as long as it needs to exit, and who shuts it down waits until it has."""
    monkeypatch.setattr(parent, "EXIT_GRACE", HANG)
    monkeypatch.setattr(server, "EXIT_TIMEOUT", HANG)
