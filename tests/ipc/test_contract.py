"""The contract of transports, with callers that live in another process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from aioinfer.testing import CHECKS, TransportHarness, eventually
from tests.ipc.callers import AwaitingElsewhere, BlockingElsewhere, Worker
from tests.limits import HANG
from tests.methods import SPAWN
from tests.transports import FIXED_LAYOUT, TRANSPORTS

HERE_ONLY = {"a_reply_shares_no_memory": "replies come to the test as copies; callers of its own process check this"}


# Clients travel to it through a pipe, however it was started.
WAYS = ["forkserver", SPAWN, pytest.param("fork", marks=pytest.mark.stress)]


@pytest.fixture(scope="module", params=WAYS)
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    with Worker(request.param) as worker:
        worker.opened = worker.ask("descriptors").result(3 * HANG)
        yield worker


SKIPPED = {name: [pytest.mark.skip(reason=reason)] for name, reason in HERE_ONLY.items()}
CHECKED = [pytest.param(check, id=check.__name__, marks=SKIPPED.get(check.__name__, [])) for check in CHECKS]


@pytest.mark.parametrize("callers", [BlockingElsewhere, AwaitingElsewhere])
@pytest.mark.parametrize("transport", ["mp", "process-slots"])
@pytest.mark.parametrize("check", CHECKED)
def test_the_contract_holds_for_callers_of_another_process(
    check: Callable[[TransportHarness], None],
    transport: str,
    callers: type[BlockingElsewhere] | type[AwaitingElsewhere],
    worker: Worker,
) -> None:
    harness = TransportHarness(
        TRANSPORTS[transport], partial(callers, worker), fixed_layout=transport in FIXED_LAYOUT, remote=True
    )
    check(harness)


def test_clients_that_were_dropped_have_left_no_descriptor_in_their_process(worker: Worker) -> None:
    """Those of the 80 servers above."""
    eventually(lambda: worker.ask("descriptors").result(HANG) <= worker.opened)
