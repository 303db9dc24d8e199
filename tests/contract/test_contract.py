from __future__ import annotations

from collections.abc import Callable

import pytest

from aioinfer.testing import CHECKS, AwaitingCallers, BlockingCallers, Callers, TransportHarness
from tests.transports import CANNOT_DROP_CANCELLED, FIXED_LAYOUT, REMOTE, TRANSPORTS


@pytest.mark.parametrize("callers", [BlockingCallers, AwaitingCallers])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_transport_holds_the_contract(
    check: Callable[[TransportHarness], None], transport: str, callers: type[Callers]
) -> None:
    harness = TransportHarness(
        TRANSPORTS[transport],
        callers,
        drops_cancelled=transport not in CANNOT_DROP_CANCELLED,
        fixed_layout=transport in FIXED_LAYOUT,
        remote=transport in REMOTE,
    )
    check(harness)
