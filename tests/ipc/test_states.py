"""What becomes of requests and replies that are under way when a server is paused, shut down, or started again."""

from __future__ import annotations

import asyncio
import select
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any

import pytest
from tensordict import TensorDict, TensorDictBase

from aioinfer import (
    ClientClosedError,
    InferenceServer,
    MPTransport,
    NoFreeSlotError,
    PeerDiedError,
    ProcessSlotTransport,
    ServerClosedError,
    ServerPausedError,
)
from aioinfer.ipc.sockets import wait_for_any
from aioinfer.rows import RowTable
from aioinfer.testing import GatedModel, double, eventually, request
from aioinfer.testing.callers import is_double
from aioinfer.testing.inspection import connection_of
from aioinfer.transports.ipc import connection as connection_module
from aioinfer.transports.ipc import server as server_module
from aioinfer.transports.ipc.protocol import State, StatusPage
from tests.limits import HANG
from tests.process_workers import KINDS, client_of, clients_of, outcome
from tests.transports import slots

BIG = 1_000_000  # floats: 20 sockets full
SOME = 25_000  # floats: more than one buffer, less than a socket holds
MANY = 2500  # requests whose errors are more than a socket holds
SOON = HANG / 4


def repeated(td: TensorDictBase) -> TensorDictBase:
    return TensorDict({"action": td["observation"][:, :1].repeat(1, BIG)}, td.batch_size)


class Loop:
    """The event loop of a client, which reads nothing unless it is run."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self.run = runner.run

    def submit(self, *clients: Any) -> list[asyncio.Future[TensorDictBase]]:
        async def submit() -> list[asyncio.Future[TensorDictBase]]:
            return [client.submit(request(3)) for client in clients]

        return self.run(submit())

    def wait(self, futures: list[asyncio.Future[TensorDictBase]]) -> list[TensorDictBase | BaseException]:
        async def wait() -> list[TensorDictBase | BaseException]:
            async with asyncio.timeout(SOON):
                return await asyncio.gather(*futures, return_exceptions=True)

        return self.run(wait())


@pytest.fixture
def loop() -> Iterator[Loop]:
    with asyncio.Runner() as runner:
        yield Loop(runner)


@pytest.fixture
def finishing(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a server that has ended waits for processes to read what it has sent."""
    event = threading.Event()

    def wait_and_say_so(wires: Any, _: float) -> bool:
        event.set()
        return wait_for_any(wires, HANG)

    monkeypatch.setattr(server_module, "wait_for_any", wait_and_say_so)
    monkeypatch.setattr(server_module, "FLUSH_LIMIT", HANG)
    return event


@contextmanager
def half_sent(transport: MPTransport, loop: Loop) -> Iterator[tuple[InferenceServer, Any, asyncio.Future[Any]]]:
    """A server; a client of it that has read half of a reply; and what it waits with."""
    with InferenceServer(repeated, transport) as server:
        client = transport.async_client()
        (future,) = loop.submit(client)

        def is_half_sent() -> bool:
            loop.run(asyncio.sleep(0))
            own = connection_of(client)
            if own is None or own.status is None:  # who does not know yet that it was accepted can't tell what was read
                return False
            return any(connection.socket.unsent for connection in list(transport.connections.connections))

        eventually(is_half_sent)
        yield server, client, future


# -- a pause -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pending", ["keep", "wait", "reject"])
def test_a_reply_that_is_half_sent_when_a_pause_begins_arrives_in_it(pending: Any, loop: Loop) -> None:
    with half_sent(MPTransport(), loop) as (server, _, future), server.paused(pending):
        (reply,) = loop.wait([future])
        assert isinstance(reply, TensorDictBase)
        assert bool((reply["action"] == 3).all())


def test_ctrl_c_as_a_pause_ends_reaches_the_program_and_the_pause_ends_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It comes as other processes are to be told that requests are taken again."""
    set_state = StatusPage.set_state
    interrupts: list[bool] = []

    def interrupted_once(page: StatusPage, *arguments: Any) -> None:
        if interrupts:
            interrupts.pop()
            raise KeyboardInterrupt
        set_state(page, *arguments)

    monkeypatch.setattr(StatusPage, "set_state", interrupted_once)
    transport = MPTransport()
    with InferenceServer(double, transport) as server:
        client = transport.client()
        with pytest.raises(KeyboardInterrupt), server.paused("reject"):
            interrupts.append(True)
        assert is_double(client(request(1), HANG), 1)


async def ask_behind(model: GatedModel, client: Any, *sizes: int) -> list[asyncio.Future[TensorDictBase]]:
    """Make requests that nobody reads while the model works on another one."""
    model.open()
    for _ in range(2):  # with the second reply, all is handled that came before: the client knows that it is accepted
        await asyncio.wrap_future(client.submit(request(0)))
    model.close()
    running = asyncio.wrap_future(client.submit(request(0)))
    assert await asyncio.to_thread(model.entered.wait, HANG)
    asked = [asyncio.wrap_future(client.submit(request(1, size=size))) for size in sizes]
    await asyncio.sleep(0)  # they leave at the end of the tick
    connection = connection_of(client)
    assert connection is not None
    assert connection.unsent == (BIG in sizes)
    return [running, *asked]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("pending", "sizes"),
    [("reject", [BIG]), ("reject", [SOME // 8] * 8), ("wait", [SOME // 8] * 8)],
    ids=["half sent", "sent, to be refused", "sent, to be served"],
)
async def test_requests_that_are_under_way_when_a_pause_begins_end_in_it(
    pending: Any, sizes: list[int], kind: str
) -> None:
    model, transport = GatedModel(), MPTransport()
    async with InferenceServer(model, transport) as server:
        with closing(client_of(transport, kind)) as client:
            running, *asked = await ask_behind(model, client, *sizes)
            asyncio.get_running_loop().call_soon(model.open)  # when the pause was asked for
            async with server.paused(pending), asyncio.timeout(SOON):
                assert is_double(await running, 0)
                for ended in await asyncio.gather(*asked, return_exceptions=True):
                    if pending == "wait":
                        assert isinstance(ended, TensorDict)
                        assert is_double(ended, 1)
                    else:
                        assert isinstance(ended, ServerPausedError)


# -- a shutdown --------------------------------------------------------------------------------------------


async def test_a_drain_serves_a_request_that_was_sent_before_it_and_takes_several_reads() -> None:
    model, transport = GatedModel(), MPTransport()
    async with InferenceServer(model, transport) as server, transport.async_client() as client:
        asked = await ask_behind(model, client, SOME)
        ending = asyncio.create_task(asyncio.to_thread(server.shutdown, HANG, drain=True))
        await asyncio.to_thread(eventually, lambda: transport.status.view[0] == State.CLOSED)
        model.open()
        async with asyncio.timeout(SOON):
            for value, reply in enumerate(await asyncio.gather(*asked)):
                assert is_double(reply, value)
            await ending


@pytest.mark.parametrize("make", [MPTransport, lambda: slots(MANY)], ids=["mp", "slots"])
def test_more_errors_than_a_socket_holds_reach_the_callers_of_a_batch_that_a_server_has_given_up(
    make: Callable[[], Any], loop: Loop, finishing: threading.Event
) -> None:
    model, transport = GatedModel(), make()
    with (
        InferenceServer(model, transport, max_batch_size=MANY, min_batch_size=MANY, timeout=HANG) as server,
        ThreadPoolExecutor(1) as threads,
        ExitStack() as at_end,
    ):
        at_end.callback(model.open)
        futures = loop.submit(*clients_of(transport, MANY, blocking=False))
        loop.run(asyncio.to_thread(model.entered.wait, HANG))
        ending = threads.submit(server.shutdown, 0)
        eventually(lambda: finishing.is_set() or ending.done())
        assert {type(error) for error in loop.wait(futures)} == {ServerClosedError}
        model.open()
        ending.result(HANG)


def test_room_is_no_longer_watched_for_when_the_last_reply_has_left_at_the_end(
    loop: Loop, finishing: threading.Event
) -> None:
    """Else a server that is started again would never sleep."""
    transport = MPTransport()
    with half_sent(transport, loop) as (server, _, future), ThreadPoolExecutor(1) as threads:
        ending = threads.submit(server.shutdown, HANG)
        assert finishing.wait(HANG)
        (reply,) = loop.wait([future])
        assert isinstance(reply, TensorDictBase)
        ending.result(HANG)
        assert [connection.socket.unsent for connection in list(transport.connections.connections)] == [False]
        assert not select.select([transport.connections.selector], [], [], 0)[0]


# -- another start -----------------------------------------------------------------------------------------


def test_a_client_on_which_a_server_hung_up_hears_that_it_was_closed_though_it_runs_again(loop: Loop) -> None:
    transport = MPTransport()
    with half_sent(transport, loop) as (server, client, future):
        server.shutdown()  # which hangs up, as nobody reads
        with InferenceServer(double, transport):
            (error,) = loop.wait([future])
            assert type(error) is ServerClosedError
            (reply,) = loop.wait(loop.submit(client))
            assert isinstance(reply, TensorDictBase)
            assert is_double(reply, 3)


def test_a_client_that_a_server_serves_which_runs_again_hears_that_it_has_died() -> None:
    transport = MPTransport()
    client = transport.client()
    for value in range(2):
        with InferenceServer(double, transport):
            assert outcome(client, value) == 2 * value
            (connection,) = transport.connections.connections
    with InferenceServer(double, transport):
        assert outcome(client, 3) == 6
        connection.socket.shutdown()  # as the end of its process does
        with pytest.raises(PeerDiedError):
            client(request(4), HANG)


def test_what_is_written_as_its_client_is_closed_spoils_no_request_of_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transport, write = slots(1), RowTable.write_one
    asked: list[Any] = []

    def write_late(*args: Any) -> None:
        monkeypatch.undo()
        threads.submit(client.close).result(HANG)
        with suppress(NoFreeSlotError):
            asked.append(transport.client().submit(request(2)))
            eventually(lambda: server.stats().pending == 1)
        write(*args)

    with InferenceServer(double, transport) as server, ThreadPoolExecutor(2) as threads:
        client = transport.client()
        assert outcome(client, 1) == 2
        monkeypatch.setattr(RowTable, "write_one", write_late)
        with server.paused():
            late = threads.submit(client, request(7), HANG)
            assert isinstance(late.exception(HANG), ClientClosedError)
        for reply in asked:
            assert is_double(reply.result(HANG), 2)
        if not asked:
            eventually(lambda: transport.free_slots == 1)
            assert outcome(transport.client(), 3) == 6


def close_unused(transport: ProcessSlotTransport, _: pytest.MonkeyPatch) -> None:
    InferenceServer(double, transport).start().shutdown()
    transport.client().close()


def close_refused(transport: ProcessSlotTransport, _: pytest.MonkeyPatch) -> None:
    InferenceServer(double, transport).start().shutdown()
    with transport.client() as client:
        assert str(outcome(client, 1)).startswith("ServerClosedError: ")


def close_not_taken_in(transport: ProcessSlotTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has connected when the server ends, and has not said who it is."""
    server = InferenceServer(double, transport).start()
    with monkeypatch.context() as patched, transport.client() as client:
        patched.setattr(connection_module, "check_same_user", lambda _: server.shutdown())
        assert str(outcome(client, 1)).startswith("ServerClosedError: ")


def close_before_it_connects(transport: ProcessSlotTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for a server that does not run, and whose backlog is full."""
    connecting = threading.Event()

    def connect_to_a_full_backlog(*_: object) -> bool:
        connecting.set()
        return False

    with monkeypatch.context() as patched, ThreadPoolExecutor(1) as threads:
        patched.setattr(connection_module, "try_connect", connect_to_a_full_backlog)
        client = transport.client()
        asked = threads.submit(client, request(1), HANG)
        assert connecting.wait(HANG)
        eventually(lambda: connection_of(client) is not None)
        client.close()
        assert isinstance(asked.exception(HANG), ClientClosedError)


@pytest.mark.parametrize("close", [close_unused, close_refused, close_not_taken_in, close_before_it_connects])
def test_a_client_that_is_closed_while_no_server_runs_leaves_its_slot_to_the_next(
    close: Callable[[ProcessSlotTransport, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = slots(1)
    close(transport, monkeypatch)
    with InferenceServer(double, transport):
        assert outcome(transport.client(), 2) == 4
