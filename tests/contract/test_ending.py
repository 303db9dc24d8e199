"""A server that ends, or is told to, while something else goes on: a pause, a drain, a start, an update."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from tensordict import TensorDictBase
from torch import Tensor, nn

from aioinfer import (
    InferenceServer,
    InferenceTransport,
    MPTransport,
    ProcessInferenceServer,
    ServerClosedError,
    ThreadingTransport,
)
from aioinfer import server as server_module
from aioinfer.model_thread import ModelThread
from aioinfer.testing import double, eventually, request
from aioinfer.testing.callers import is_double
from aioinfer.testing.inspection import has_pending_job
from aioinfer.weight_sync import MultiProcessWeightSyncScheme, loader
from aioinfer.weight_sync.channel import nack_reason
from aioinfer.weight_updates import WeightUpdates
from tests.hosted import make_double
from tests.limits import HANG
from tests.stepped import Steps
from tests.weight_models import mark_of, policy

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

MAKES: dict[str, Callable[[], Any]] = {
    "in a thread": lambda: InferenceServer(double, MPTransport()),
    "in a process": lambda: ProcessInferenceServer(make_double, MPTransport(), ctx="fork"),
}


def refuses(client: Any) -> bool:
    future = client.submit(request(0))
    if future.cancel():  # it waits
        return False
    return isinstance(future.exception(HANG), ServerClosedError)


@contextmanager
def draining(server: Any, client: Any) -> Iterator[Any]:
    with ThreadPoolExecutor(1) as threads:
        ended = threads.submit(server.shutdown, HANG, drain=True)
        eventually(lambda: refuses(client))
        yield ended


@pytest.mark.parametrize("where", MAKES)
def test_a_drain_goes_on_when_a_pause_is_left(where: str) -> None:
    with MAKES[where]() as server, ExitStack() as stack:
        client, other = server.clients(2)
        assert is_double(client(request(1), HANG), 1)
        with server.paused():
            future = client.submit(request(2))
            ended = stack.enter_context(draining(server, other))
            assert not future.done()
        assert is_double(future.result(HANG / 2), 2)
        ended.result(HANG)


@pytest.mark.parametrize("where", MAKES)
def test_a_shutdown_at_once_ends_a_drain(where: str) -> None:
    with MAKES[where]() as server:
        client, other = server.clients(2)
        assert is_double(client(request(1), HANG), 1)
        with server.paused():
            future = client.submit(request(2))
            with draining(server, other) as ended, ThreadPoolExecutor(1) as threads:
                threads.submit(server.shutdown, HANG).result(HANG / 2)
                assert isinstance(future.exception(HANG / 2), ServerClosedError)
                ended.result(HANG / 2)


@pytest.mark.parametrize("transport", [MPTransport, ThreadingTransport])
def test_a_shutdown_ends_a_server_that_serves_what_a_pause_waits_for(
    transport: Callable[[], InferenceTransport],
) -> None:
    model, left = Steps(), threading.Event()

    def pause() -> None:
        with server.paused("wait"):
            assert left.wait(HANG)

    with InferenceServer(model, transport(), max_batch_size=1) as server, ThreadPoolExecutor(2) as threads:
        futures = [client.submit(request(value)) for value, client in enumerate(server.clients(4))]
        assert model.entered.acquire(timeout=HANG)
        eventually(lambda: server.stats().pending == 3)
        pausing = threads.submit(pause)
        eventually(lambda: has_pending_job(server))
        model.go.release()
        assert model.entered.acquire(timeout=HANG)  # of a pass that the pause waits for
        ending = threads.submit(server.shutdown, HANG)
        eventually(lambda: futures[3].done())
        model.go.release()
        try:
            ending.result(HANG / 2)
        finally:
            left.set()
            model.go.release(4)
        with pytest.raises(ServerClosedError):
            futures[3].result(0)
        pausing.exception(HANG)


def test_a_copy_that_an_ended_server_still_fills_is_not_that_of_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    copy_tensors: Any = vars(loader)["copy_tensors"]
    began, go, over = threading.Event(), threading.Event(), threading.Event()

    def copy_late(memory: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
        monkeypatch.setattr(loader, "copy_tensors", copy_tensors)
        kept = {name: tensor.clone() for name, tensor in sources.items()}
        began.set()
        assert go.wait(HANG)
        copy_tensors(memory, kept)
        over.set()

    scheme = MultiProcessWeightSyncScheme(num_workers=1)
    scheme.init_on_sender(weights=policy(0.0))
    server = InferenceServer(policy(0.0), ThreadingTransport(), weight_sync=scheme, swap_weights=True)
    with server:
        scheme.connect(timeout=HANG)
        monkeypatch.setattr(loader, "copy_tensors", copy_late)
        scheme.send_async(policy(1.0))
        assert began.wait(HANG)
    with server:
        scheme.send(policy(2.0))  # in one of two copies; that of the version before is sent anew
        scheme.send(policy(3.0))
        go.set()
        assert over.wait(HANG)
        assert mark_of(server.client()(request(0), HANG)) == 3
    scheme.shutdown()


@pytest.mark.parametrize("moment", ["opening the weights", "before anything"])
@pytest.mark.parametrize("by_another_thread", [False, True], ids=["in a signal handler", "by another thread"])
def test_a_start_in_which_the_server_is_shut_down_says_so(
    moment: str, by_another_thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = InferenceServer(double, ThreadingTransport())
    client = server.client()
    open_weights = WeightUpdates.open

    def shut_down() -> None:
        monkeypatch.undo()
        if by_another_thread:
            threads.submit(server.shutdown, HANG)
            eventually(lambda: refuses(client))
        else:
            server.shutdown(HANG)

    def shut_down_and_open(updates: WeightUpdates) -> None:
        shut_down()
        open_weights(updates)

    @contextmanager
    def shut_down_on_event_loop(**options: Any) -> Iterator[BlockingPortal]:
        with start_blocking_portal(**options) as portal:
            portal.call(shut_down)
            yield portal

    with ThreadPoolExecutor(1) as threads:
        if moment == "opening the weights":
            monkeypatch.setattr(WeightUpdates, "open", shut_down_and_open)
            with pytest.raises(ServerClosedError):
                server.start()
            assert not server.is_alive
        else:
            monkeypatch.setattr(server_module, "start_blocking_portal", shut_down_on_event_loop)
            with suppress(ServerClosedError):  # it had not begun, unless the other thread finds the new worker
                server.start()
            server.shutdown(HANG)
        with server:
            assert is_double(server.client()(request(1), HANG), 1)


def test_a_start_whose_worker_dies_before_anybody_looks_raises_what_it_died_of(monkeypatch: pytest.MonkeyPatch) -> None:
    start = ModelThread.start

    def start_and_die(worker: ModelThread) -> Any:
        opened = start(worker)
        worker.join(HANG)
        return opened

    class Immovable(nn.Linear):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("immovable")

    server = InferenceServer(Immovable(1, 1), ThreadingTransport(), device="cpu")
    monkeypatch.setattr(ModelThread, "start", start_and_die)
    with pytest.raises(ValueError, match="immovable"):
        server.start()


async def test_a_start_that_is_cancelled_ends_the_server_by_its_own_name(caplog: pytest.LogCaptureFixture) -> None:
    moving, go = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def to(self, *_: Any, **__: Any) -> Any:
            moving.set()
            assert go.wait(HANG)
            return self

        def forward(self, td: TensorDictBase) -> TensorDictBase:
            return double(td)

    server = InferenceServer(Slow(), ThreadingTransport(), device="cpu")
    starting = asyncio.ensure_future(server.__aenter__())
    assert await asyncio.to_thread(moving.wait, HANG)
    starting.cancel()
    asyncio.get_running_loop().call_later(0.01, go.set)
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert "died" not in (server.health().reason or "")
    assert "died" not in caplog.text


def test_weights_are_refused_for_an_error_whose_message_cannot_be_shown() -> None:
    class Unspeakable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    assert nack_reason(Unspeakable()).endswith("Unspeakable: (its message can't be shown)")
