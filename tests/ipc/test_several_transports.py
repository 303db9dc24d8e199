"""Threads, tasks and processes that are served by one model at once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule

from aioinfer import (
    InferenceServer,
    MPTransport,
    ProcessSlotTransport,
    ServerClosedError,
    ServerOverloadedError,
    ThreadingTransport,
    connect,
)
from aioinfer.interaction_type import InteractionType, interaction_type
from aioinfer.testing import GatedModel, double, eventually, request
from aioinfer.testing.callers import expect_error, is_double
from tests.ipc.callers import Worker
from tests.limits import HANG
from tests.process_workers import Child, answer, ask_always, clients_of
from tests.transports import slots

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # 3.12: of a process that has threads


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker("fork") as worker:
        yield worker


class Family:
    """A transport of each kind, and how to call through each: here, or from a worker."""

    def __init__(self, worker: Worker, reply: TensorDict | None = None) -> None:
        slots = ProcessSlotTransport(request(0), double(request(0)) if reply is None else reply, num_slots=8)
        self.transports: list[Any] = [ThreadingTransport(), slots, MPTransport()]
        self._worker = worker
        self._adopted: list[int] = []

    def here(self) -> Any:
        return self.transports[0].client()

    def elsewhere(self, *, blocking: bool = True) -> list[int]:
        """Clients of both kinds of the worker."""
        made = [clients_of(transport, 1, blocking=blocking)[0] for transport in self.transports[1:]]
        return [self._worker.adopt(client) for client in made]

    def __enter__(self) -> Family:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.ask("forget").result(HANG)


def test_callers_of_all_three_at_once_get_their_own_replies() -> None:
    slots = ProcessSlotTransport(request(0), double(request(0)), num_slots=8)
    transports: list[Any] = [ThreadingTransport(), slots, MPTransport()]
    with ExitStack() as stack:
        children = [
            stack.enter_context(Child("fork", ask_always, clients_of(transport, 2, blocking=blocking), identity))
            for identity, (transport, blocking) in enumerate(
                (transport, blocking) for transport in transports[1:] for blocking in (True, False)
            )
        ]
        server = stack.enter_context(InferenceServer(answer, transports, max_batch_size=5))
        client = transports[0].client()
        for value in range(500):
            assert client(request(value), HANG)["action"][0] == 2 * value + 1
        for child in children:
            child.goes_on()
        for child in children:
            child.end()
        assert server.stats().failed == 0


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "awaiting"])
def test_a_batch_holds_requests_of_all_three(blocking: bool, worker: Worker) -> None:
    model = GatedModel()
    with Family(worker) as served, InferenceServer(model, served.transports) as server:
        slot, pickled = served.elsewhere(blocking=blocking)
        first = served.here().submit(request(0))
        assert model.entered.wait(HANG)
        replies: list[Any] = []
        for turn in range(2):
            replies.append(served.here().submit(request(10 * turn + 1)))
            if turn == 0:
                replies.append(worker.call(slot, request(2)))
                replies.append(worker.call(pickled, request(3)))
        eventually(lambda: server.stats().pending == 4)
        model.open()
        assert is_double(first.result(HANG), 0)
        for reply, value in zip(replies, (1, 2, 3, 11), strict=True):
            found = reply.result(HANG)
            assert is_double(found, value)
            assert found["policy_version"] == 0
    assert [sorted(batch) for batch in model.batches] == [[0], [1, 2, 3, 11]]


def test_a_full_batch_takes_what_has_waited_longest_wherever_it_came_from(worker: Worker) -> None:
    model = GatedModel()
    with Family(worker) as served, InferenceServer(model, served.transports, max_batch_size=2) as server:
        slot, pickled = served.elsewhere()
        replies: list[Any] = [served.here().submit(request(0))]
        assert model.entered.wait(HANG)
        here = served.here()
        asks: list[Callable[[], Any]] = [
            lambda: worker.call(pickled, request(1)),
            lambda: here.submit(request(2)),
            lambda: worker.call(slot, request(3)),
            lambda: here.submit(request(4)),
        ]
        for pending, ask in enumerate(asks, 1):
            replies.append(ask())
            eventually(lambda: server.stats().pending == pending)  # noqa: B023
        model.open()
        for value, reply in enumerate(replies):
            assert is_double(reply.result(HANG), value)
    assert set(model.batches[1]) >= {1}
    assert sorted(value for batch in model.batches for value in batch) == [0, 1, 2, 3, 4]
    assert max(map(len, model.batches)) == 2


def test_replies_say_truly_which_weights_computed_them(worker: Worker) -> None:
    linear = torch.nn.Linear(3, 3, bias=False)
    torch.nn.init.zeros_(linear.weight)
    model = TensorDictModule(linear, in_keys=["observation"], out_keys=["action"])
    with Family(worker) as served, InferenceServer(model, served.transports) as server:
        slot, pickled = served.elsewhere()
        here = served.here()
        for version in range(20):
            replies = [
                here(request(1), HANG),
                worker.call(slot, request(1)).result(HANG),
                worker.call(pickled, request(1)).result(HANG),
            ]
            for reply in replies:
                assert reply["policy_version"] == version
                assert reply["policy_version"].shape == reply.batch_size
                assert bool((reply["action"] == version).all())
            server.update_weights({"module.weight": torch.eye(3) * (version + 1)})


def test_no_reply_is_stamped_with_another_version_than_computed_it_while_weights_change(worker: Worker) -> None:
    linear = torch.nn.Linear(3, 3, bias=False)
    torch.nn.init.zeros_(linear.weight)
    model = TensorDictModule(linear, in_keys=["observation"], out_keys=["action"])
    with Family(worker) as served, InferenceServer(model, served.transports) as server:
        clients = [*served.elsewhere(), *served.elsewhere(blocking=False)]
        for version in range(1, 60):
            replies = [worker.call(client, request(1)) for client in clients]
            server.update_weights({"module.weight": torch.eye(3) * version})
            for reply in replies:
                found = reply.result(HANG)
                assert bool((found["action"] == found["policy_version"]).all())
                assert version - 1 <= int(found["policy_version"]) <= version


def test_the_exploration_mode_of_each_caller_travels(worker: Worker) -> None:
    codes = {None: 0, InteractionType.RANDOM: 1, InteractionType.MEAN: 2, InteractionType.DETERMINISTIC: 3}

    def model(td: TensorDictBase) -> TensorDictBase:
        return TensorDict({"action": torch.full(td.batch_size, codes[interaction_type()])}, td.batch_size)

    with (
        Family(worker, TensorDict({"action": torch.tensor(0)})) as served,
        InferenceServer(model, served.transports) as server,
    ):
        clients = [*served.elsewhere(), *served.elsewhere()]
        for turn in range(12):
            modes = [list(codes)[(turn + index) % 4] for index in range(len(clients))]
            replies = [worker.call(client, request(1), mode=mode) for client, mode in zip(clients, modes, strict=True)]
            for reply, mode in zip(replies, modes, strict=True):
                assert reply.result(HANG)["action"] == codes[mode]
        assert server.stats().failed == 0


def test_one_bound_holds_for_all_of_them_together(worker: Worker) -> None:
    model = GatedModel()
    with Family(worker) as served, InferenceServer(model, served.transports, max_pending=3) as server:
        slot, pickled = served.elsewhere()
        more = served.elsewhere()
        replies: list[Any] = [served.here().submit(request(0))]
        assert model.entered.wait(HANG)
        replies += [
            served.here().submit(request(1)),
            worker.call(slot, request(2)),
            worker.call(pickled, request(3)),
        ]
        eventually(lambda: server.stats().pending == 3)
        for client in more:
            expect_error(ServerOverloadedError, worker.call(client, request(9)))
        expect_error(ServerOverloadedError, served.here().submit(request(9)))
        assert server.stats().rejected == 3
        patient = [worker.call(client, request(10), wait=True) for client in more]
        model.open()
        for value, reply in enumerate(replies):
            assert is_double(reply.result(HANG), value)
        for reply in patient:
            assert is_double(reply.result(HANG), 10)
    assert 9 not in model.seen


def test_transports_of_a_server_with_a_bound_are_all_read_while_the_model_is_busy(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = GatedModel()
    transports: list[Any] = [slots(4), MPTransport()]
    with InferenceServer(model, transports, max_pending=1) as server:
        first = transports[0].client().submit(request(0))
        assert model.entered.wait(HANG)
        second = transports[1].client().submit(request(1))
        eventually(lambda: server.stats().pending == 1)
        for transport in transports:
            with pytest.raises(ServerOverloadedError):
                transport.client()(request(9), HANG)
        model.open()
        for value, future in enumerate((first, second)):
            assert is_double(future.result(HANG), value)
    assert not caplog.records  # of a task that failed, and is tried again


@pytest.mark.usefixtures("only_new_garbage")
def test_a_transport_that_is_dropped_leaves_the_next_server_of_its_siblings_alone() -> None:
    kept, dropped = MPTransport(), MPTransport()
    address = dropped.address
    InferenceServer(double, [kept, dropped])
    del dropped
    with InferenceServer(double, kept) as server:
        gc.collect()
        client = kept.client()
        assert is_double(client(request(1), HANG), 1)
        with pytest.raises(ServerClosedError, match="no server listens"):
            connect(address, timeout=HANG)
        assert is_double(client(request(2), HANG), 2)
        assert server.is_alive
