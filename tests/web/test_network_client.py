"""Clients of ``connect("ws://...")``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from aioinfer import ThreadingTransport
from aioinfer.testing import CHECKS, AwaitingCallers, BlockingCallers, TransportHarness
from tests.web.networked import over_network

ON_ITS_WAY = {"waiting_for_room_ends_with_its_deadline": "a withdrawal is on its way when the check opens its gate"}
SKIPPED = {name: [pytest.mark.skip(reason=reason)] for name, reason in ON_ITS_WAY.items()}
CHECKED = [pytest.param(check, id=check.__name__, marks=SKIPPED.get(check.__name__, [])) for check in CHECKS]


@pytest.mark.parametrize("kind", [BlockingCallers, AwaitingCallers])
@pytest.mark.parametrize("check", CHECKED)
def test_the_contract_of_transports_holds_over_a_network(
    check: Callable[[TransportHarness], None], kind: Callable[[Any], Any]
) -> None:
    callers: Any = over_network(kind)
    check(TransportHarness(ThreadingTransport, callers, drops_cancelled=False, remote=True))
