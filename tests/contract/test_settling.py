"""Every request ends, whatever is raised, and wherever."""

from __future__ import annotations

import asyncio
import gc
import queue
import random
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack

from aioinfer import (
    ClientBusyError,
    InferenceError,
    InferenceServer,
    InferenceTransport,
    ModelError,
    ServerClosedError,
    SlotTransport,
    ThreadingTransport,
)
from aioinfer.stats import StatsRecorder
from aioinfer.testing import GatedModel, double, eventually, request
from aioinfer.testing.callers import is_double
from aioinfer.testing.inspection import has_waiting_callers
from tests.limits import HANG
from tests.transports import TRANSPORTS, FiveVerbs


class Abrupt(BaseException):
    """Nobody's ``except Exception`` catches it."""


# -- callbacks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, Abrupt, ArithmeticError])
@pytest.mark.parametrize("make", [ThreadingTransport, lambda: SlotTransport(16)])
def test_what_a_callback_raises_costs_its_batch_mates_nothing(
    make: Callable[[], InferenceTransport], kind: type[BaseException]
) -> None:
    def fail(_: object) -> None:
        raise kind

    model = GatedModel()
    with InferenceServer(model, make()) as server:
        first = server.client().submit(request(0))
        assert model.entered.wait(HANG)
        futures = [server.client().submit(request(value)) for value in range(1, 9)]
        seen: list[object] = []
        for future in futures:
            future.add_done_callback(fail)
            future.add_done_callback(seen.append)
        model.open()
        for value, future in enumerate([first, *futures]):
            assert is_double(future.result(HANG), value)
        eventually(lambda: len(seen) == 8)
        assert is_double(server.client()(request(5), HANG), 5)
        assert server.is_alive


def test_a_future_that_its_holder_has_settled_costs_its_batch_mates_nothing() -> None:
    model = GatedModel()
    with InferenceServer(model, ThreadingTransport()) as server:
        first = server.client().submit(request(0))
        assert model.entered.wait(HANG)
        futures = [server.client().submit(request(value)) for value in range(1, 4)]
        first.set_result(request(7))
        futures[0].set_exception(ArithmeticError())
        model.open()
        assert is_double(futures[1].result(HANG), 2)
        assert is_double(futures[2].result(HANG), 3)
        assert server.is_alive


# -- errors of the model -----------------------------------------------------------------------------------


class NoText(Exception):
    def __str__(self) -> str:
        raise Abrupt


class NoCopy(Exception):
    def __copy__(self) -> Any:
        raise Abrupt

    def __reduce_ex__(self, _: Any) -> Any:
        raise Abrupt

    def __init__(self, _: object = None) -> None:
        super().__init__()

    def __new__(cls, *arguments: object) -> NoCopy:
        if cls.made:
            raise Abrupt
        cls.made = True
        return super().__new__(cls, *arguments)

    made = False


@pytest.mark.parametrize("make", [ThreadingTransport, lambda: SlotTransport(16)])
@pytest.mark.parametrize("kind", [NoText, NoCopy])
def test_an_error_that_can_be_neither_shown_nor_copied_reaches_its_caller(
    make: Callable[[], InferenceTransport], kind: type[Exception]
) -> None:
    NoCopy.made = False
    raised = kind()

    def model(td: TensorDictBase) -> TensorDictBase:
        if (td["observation"] < 0).any():
            raise raised
        return double(td)

    server = InferenceServer(model, make())
    futures = [server.client().submit(request(value)) for value in (1, -1, 2)]
    with server:
        with pytest.raises(ModelError, match=kind.__name__):
            futures[1].result(HANG)
        assert is_double(futures[0].result(HANG), 1)
        assert is_double(futures[2].result(HANG), 2)
        assert is_double(server.client()(request(3), HANG), 3)


# -- requests ----------------------------------------------------------------------------------------------


def unlike_agents(value: float) -> TensorDict:
    agents = lazy_stack([TensorDict({"o": torch.full((size,), value)}) for size in (2, 3)])
    return TensorDict({"agents": agents, "observation": torch.full((3,), value)})


def test_lazily_stacked_requests_of_unlike_parts_are_served_beside_others() -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        out = double(td)
        if "agents" in td:
            out["agents"] = td["agents"]
        return out

    server = InferenceServer(model, ThreadingTransport())
    asked = [request(0), unlike_agents(1), request(2), unlike_agents(3), TensorDict({"observation": torch.ones(2)})]
    futures = [server.client().submit(td) for td in asked]
    with server:
        replies = [future.result(HANG) for future in futures]
        for value in (1, 3):
            assert [part["o"].tolist() for part in replies[value]["agents"].unbind(0)] == [[value] * 2, [value] * 3]
        for value in range(4):
            assert is_double(replies[value], value)
        assert sum(server.stats().batches.values()) == 3
        assert server.is_alive


class Indescribable(TensorDict):  # type: ignore[no-untyped-call]
    """Its entries can't be looked at when it meets others."""

    def items(self, *arguments: Any, **options: Any) -> Any:
        raise ArithmeticError("no entries")


def test_a_request_that_cannot_be_described_fails_alone() -> None:
    server = InferenceServer(double, ThreadingTransport())
    bad = server.client().submit(Indescribable({"observation": torch.ones(3)}))
    good = [server.client().submit(request(value, size=size)) for value, size in ((1, 3), (2, 4), (3, 3))]
    with server:
        with pytest.raises(ArithmeticError, match="no entries"):
            bad.result(HANG)
        for value, future in enumerate(good, 1):
            assert is_double(future.result(HANG), value)
        assert server.is_alive


def test_a_request_given_up_in_a_pass_is_left_out_when_the_pass_fails() -> None:
    """Its row may have been written anew while it was read."""
    entered, go_on = threading.Event(), threading.Event()
    sizes: list[int] = []

    def model(td: TensorDictBase) -> TensorDictBase:
        sizes.append(len(td))
        entered.set()
        assert go_on.wait(HANG)
        if (td["observation"] < 0).any():
            raise ArithmeticError("torn")
        return double(td)

    server = InferenceServer(model, ThreadingTransport(), split_failed_batches=False)
    futures = [server.client().submit(request(value)) for value in (1, -1, 2)]
    with server:
        assert entered.wait(HANG)
        futures[1].cancel()
        go_on.set()
        assert is_double(futures[0].result(HANG), 1)
        assert is_double(futures[2].result(HANG), 2)
        assert sizes == [3, 2]
        with pytest.raises(ArithmeticError):
            server.client()(request(-1), HANG)
        assert sizes == [3, 2, 1]


# -- foreign transports ------------------------------------------------------------------------------------


class Broken(FiveVerbs):
    """Its broker goes away."""

    def __init__(self, verb: str) -> None:
        super().__init__()
        self.verb = verb
        self.broken = False

    def _break(self, verb: str) -> None:
        if self.broken and verb == self.verb:
            raise Abrupt("the broker is gone")

    def wait_for_work(self, timeout: float) -> None:
        self._break("wait_for_work")
        super().wait_for_work(min(timeout, 0.01))

    def drain(self, max_items: int) -> Any:
        self._break("drain")
        return super().drain(max_items)

    def resolve(self, callback: Any, result: TensorDictBase) -> None:
        self._break("resolve")
        super().resolve(callback, result)

    def resolve_exception(self, callback: Any, exc: BaseException) -> None:
        self._break("resolve_exception")
        super().resolve_exception(callback, exc)

    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        self._break("submit")
        return super().submit(td)


@pytest.mark.parametrize("verb", ["wait_for_work", "drain"])
def test_a_transport_that_goes_on_raising_ends_its_server_by_name(verb: str) -> None:
    transport = Broken(verb)
    server = InferenceServer(double, transport).start()
    client = server.client()
    assert is_double(client(request(1), HANG), 1)
    transport.broken = True
    with suppress(ServerClosedError):  # a server that waits already may still answer this one
        client(request(2), HANG)
    with pytest.raises(ServerClosedError, match="the broker is gone"):
        client(request(2), HANG)
    eventually(lambda: not server.is_alive)
    server.shutdown(HANG)
    with pytest.raises(ServerClosedError):
        client(request(3), HANG)
    transport.broken = False
    with server:
        assert is_double(client(request(4), HANG), 4)


@pytest.mark.parametrize("verb", ["resolve", "resolve_exception"])
def test_a_transport_that_cannot_answer_one_request_answers_the_others(verb: str) -> None:
    transport = Broken(verb)
    with InferenceServer(double, transport) as server:
        client = server.client()
        transport.broken = True
        future = client.submit(request(1))
        if verb == "resolve":
            with pytest.raises((InferenceError, Abrupt)):
                future.result(HANG)
        else:
            assert is_double(future.result(HANG), 1)
        transport.broken = False
        assert is_double(client(request(2), HANG), 2)


def test_a_submit_that_raises_wakes_those_that_wait_for_its_place() -> None:
    transport = Broken("submit")
    entered, go_on = threading.Event(), threading.Event()
    submit = transport.submit

    def slow(td: TensorDictBase) -> Future[TensorDictBase]:
        if td["observation"][0] == 1:
            entered.set()
            assert go_on.wait(HANG)
            raise ConnectionError("the broker is gone")
        return submit(td)

    transport.submit = slow  # type: ignore[method-assign]
    with InferenceServer(double, transport, max_pending=1) as server:
        failing = ThreadPoolExecutor(1).submit(server.client(), request(1))
        assert entered.wait(HANG)
        replies: list[TensorDictBase] = []
        waiting = threading.Thread(target=lambda: replies.append(server.client()(request(2), HANG, wait=True)))
        waiting.start()
        eventually(lambda: has_waiting_callers(server))
        go_on.set()
        assert isinstance(failing.exception(HANG), ConnectionError)
        waiting.join(HANG)
        assert is_double(replies[0], 2)


class Closable(FiveVerbs):
    """Has names of its own that a server might call."""

    def close(self) -> None: ...

    def open(self, path: str) -> None: ...

    def take(self) -> None: ...

    pending = waited = wake = callers = attend = 3


def test_a_transport_may_have_any_names_beside_the_five_verbs() -> None:
    server = InferenceServer(double, Closable()).start()
    assert is_double(server.client()(request(1), HANG), 1)
    server.shutdown(HANG)
    assert not server.is_alive
    with pytest.raises(ServerClosedError):
        server.client()(request(2), HANG)


# -- exceptions at every call out of our code --------------------------------------------------------------


class Trouble:
    """Raises at random, wherever it is asked."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self.over = False

    def maybe(self, chance: float = 0.1) -> None:
        with self._lock:
            if self.over or self._random.random() > chance:
                return
            kind = self._random.choice([ArithmeticError, Abrupt, SystemExit, KeyboardInterrupt, asyncio.CancelledError])
        raise kind("injected")


class TroubledTransport(FiveVerbs):
    def __init__(self, trouble: Trouble) -> None:
        super().__init__()
        self.trouble = trouble

    def resolve(self, callback: Any, result: TensorDictBase) -> None:
        self.trouble.maybe()
        super().resolve(callback, result)

    def resolve_exception(self, callback: Any, exc: BaseException) -> None:
        super().resolve_exception(callback, exc)
        self.trouble.maybe()


class TroubledRequest(TensorDict):  # type: ignore[no-untyped-call]
    trouble: Trouble

    def items(self, *arguments: Any, **options: Any) -> Any:
        self.trouble.maybe(0.3)
        return super().items(*arguments, **options)


@pytest.mark.parametrize("transport", ["threading", "slots", "slots-preallocated", "five-verbs", "joined"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_all_requests_end_whatever_is_raised_at_any_call_out(transport: str, seed: int) -> None:
    trouble = Trouble(seed)

    def model(td: TensorDictBase) -> TensorDictBase:
        trouble.maybe()
        return double(td)

    def collate(tds: list[TensorDictBase]) -> TensorDictBase:
        trouble.maybe()
        return lazy_stack(tds).contiguous()

    wire = TroubledTransport(trouble) if transport == "five-verbs" else TRANSPORTS[transport]()
    collate_fn = collate if seed % 2 else None
    with InferenceServer(model, wire, max_batch_size=8, max_pending=64, collate_fn=collate_fn) as server:
        outcomes: queue.Queue[object] = queue.Queue()

        def trouble_in_callback(future: Future[TensorDictBase]) -> None:
            outcomes.put(None)
            trouble.maybe(0.3)

        clients = [server.client() for _ in range(8)]
        count = 200
        for value in range(count):
            td: TensorDictBase = request(value)
            if value % 5 == 0:
                td = TroubledRequest({"observation": torch.full((3,), float(value))})
                td.trouble = trouble
            client = clients[value % 8]
            try:
                future = client.submit(td)
            except ClientBusyError:  # it has a slot, and a request under way
                outcomes.put(None)
                continue
            except BaseException:  # out of the request, in the caller's own thread
                outcomes.put(None)
                continue
            if value % 7 == 0:
                future.cancel()
            with suppress(BaseException):  # of a future of the standard library that is done already
                future.add_done_callback(trouble_in_callback)
        try:
            for _ in range(count):
                outcomes.get(timeout=HANG)
        finally:
            trouble.over = True
        assert server.is_alive
        for client in clients:
            assert is_double(client(request(3), HANG, wait=True), 3)
        assert server.stats().pending == 0


def test_the_worker_survives_what_the_code_around_the_model_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with InferenceServer(double, ThreadingTransport()) as server:
        client = server.client()
        record = StatsRecorder.batch
        raised = iter([Abrupt("no"), SystemExit(3)])

        def fail(*figures: Any, **more: Any) -> None:
            error = next(raised, None)
            if error is not None:
                raise error
            record(*figures, **more)

        monkeypatch.setattr(StatsRecorder, "batch", fail)
        for _ in range(2):
            with pytest.raises(InferenceError):
                client(request(1), HANG)
        assert is_double(client(request(2), HANG), 2)
        assert server.is_alive


def test_a_worker_that_dies_fails_what_is_pending_and_says_of_what(caplog: pytest.LogCaptureFixture) -> None:
    transport = ThreadingTransport()

    def broken(max_items: int) -> Any:
        raise Abrupt("the wire broke")

    server = InferenceServer(double, transport)
    transport.queue.get_batch = broken  # type: ignore[assignment, method-assign]
    server.start()
    with pytest.raises(ServerClosedError, match="Abrupt: the wire broke"):
        server.client()(request(1), HANG)
    eventually(lambda: not server.is_alive)
    health = server.health()
    assert (health.alive, health.ready) == (False, False)
    server.shutdown()
    assert "worker died" in caplog.text
    assert sys.exc_info() == (None, None, None)


# -- ends beside the model thread ---------------------------------------------------------------------------


def test_a_client_that_is_closed_beside_a_sleeping_server_keeps_nobody_from_being_heard() -> None:
    """Its task never runs again, so that its event loop never says that it has heard of the end."""
    with InferenceServer(double, SlotTransport(2)) as server:
        loop = asyncio.new_event_loop()
        client = server.async_client()

        async def submit() -> None:
            client.submit(request(1))

        with server.paused():
            loop.run_until_complete(submit())
            client.close()
        other = server.client()
        for value in range(3):
            assert is_double(other(request(value), HANG), value)
        loop.close()


def test_many_callers_of_a_closed_loop_that_wait_for_room_end_nobody() -> None:
    model = GatedModel()
    with InferenceServer(model, ThreadingTransport(), max_pending=1) as server:
        first = server.client().submit(request(0))
        assert model.entered.wait(HANG)
        second = server.client().submit(request(1))
        loop = asyncio.new_event_loop()
        client = server.async_client()

        async def wait() -> list[asyncio.Task[TensorDictBase]]:
            tasks = [asyncio.ensure_future(client(request(2), wait=True)) for _ in range(1500)]
            await asyncio.sleep(0)
            return tasks

        tasks = loop.run_until_complete(wait())
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.close()
        model.open()
        for value, future in enumerate((first, second)):
            assert is_double(future.result(HANG), value)
        assert is_double(server.client()(request(5), HANG), 5)
        for task in tasks:
            task.get_coro().close()


def test_a_server_whose_thread_cannot_be_made_can_be_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    transport = ThreadingTransport()
    server = InferenceServer(double, transport)
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name == "aioinfer-model":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        server.start()
    assert not server.is_alive
    assert not server.health().ready
    monkeypatch.undo()
    with server:
        assert is_double(server.client()(request(1), HANG), 1)


def test_an_abandoned_batch_is_counted_and_not_run_again() -> None:
    entered, go_on = threading.Event(), threading.Event()
    passes: list[int] = []

    def model(td: TensorDictBase) -> TensorDictBase:
        passes.append(len(td))
        entered.set()
        assert go_on.wait(HANG)
        raise ArithmeticError

    server = InferenceServer(model, ThreadingTransport())
    futures = [server.client().submit(request(value)) for value in range(8)]
    server.start()
    assert entered.wait(HANG)
    server.shutdown(timeout=0.01)
    for future in futures:
        with pytest.raises(ServerClosedError):
            future.result(HANG)
    go_on.set()
    eventually(lambda: not server.is_alive)
    assert passes == [8]
    assert server.stats().failed == 8


def test_a_note_that_one_caller_adds_to_its_error_shows_in_no_others() -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        error = ArithmeticError("no")
        error.add_note("of the model")
        raise error

    server = InferenceServer(model, ThreadingTransport(), split_failed_batches=False)
    futures = [server.client().submit(request(value)) for value in range(2)]
    with server:
        one, other = [future.exception(HANG) for future in futures]
    assert one is not None
    assert other is not None
    one.add_note("mine")
    assert other.__notes__ == ["of the model"]


def test_a_failed_call_leaves_nothing_to_the_garbage_collector() -> None:
    class Refusal(ArithmeticError):
        """Unlike its base class, it can be referred to weakly."""

    def model(td: TensorDictBase) -> TensorDictBase:
        raise Refusal("no")

    with InferenceServer(model, ThreadingTransport()) as server:
        client, td = server.client(), request(1)

        def call() -> weakref.ref[BaseException]:
            try:
                client(td, HANG)
            except Refusal as error:
                return weakref.ref(error)
            raise AssertionError

        gc.disable()
        try:
            error = call()
            assert error() is None
        finally:
            gc.enable()
