"""A server that shuts down, and starts again, while processes ask."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from tensordict import TensorDictBase

from aioinfer import InferenceServer, MPTransport, PeerDiedError, ServerClosedError, ServerPausedError
from aioinfer.ipc.sockets import FramedSocket
from aioinfer.testing import double, eventually, request
from tests.effort import Effort
from tests.limits import HANG
from tests.process_workers import KINDS, Child, answer, ask_always, client_of, clients_of, outcome
from tests.transports import process_slots

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # 3.12: of a process that has threads
]

MAKES: list[Any] = [process_slots, MPTransport]


def askers(transport: Any, forgiven: tuple[type[Exception], ...], size: int = 3) -> list[Child]:
    """Workers of both kinds; forked before the server's threads are there."""
    return [
        Child("fork", ask_always, clients_of(transport, 3, blocking=blocking), identity, forgiven, size)
        for identity, blocking in enumerate((True, False, True, False))
    ]


def shut_down_again_and_again(
    server: InferenceServer, children: Sequence[Child], end: Callable[[], None], turns: int
) -> None:
    """Serve as long as it takes that every client has had a reply, and ``end``; at last let the workers end too."""
    for _ in range(turns):
        with server:
            for child in children:
                child.goes_on()
            end()
    with server:
        for child in children:
            child.goes_on()
        for child in children:
            child.end()


@pytest.mark.parametrize("bounded", [False, True], ids=["unbounded", "bounded"])
@pytest.mark.parametrize("make", MAKES)
def test_calls_end_whenever_the_server_shuts_down_and_are_answered_when_it_serves_again(
    make: Any, bounded: bool, effort: Effort
) -> None:
    """A call that hangs, or that is answered with another one's reply, ends its worker with a message."""
    chance = effort.random()
    transport = make()
    with ExitStack() as stack:
        children = [stack.enter_context(child) for child in askers(transport, (ServerClosedError, PeerDiedError))]
        server = InferenceServer(answer, transport, max_batch_size=5, max_pending=100 if bounded else None)

        def end() -> None:
            time.sleep(chance.uniform(0, 0.02))  # orders nothing: any moment
            server.shutdown(HANG, drain=chance.random() < 0.5)

        shut_down_again_and_again(server, children, end, effort.times(8, stress=25))
        assert server.stats().pending == 0


@pytest.mark.parametrize("make", MAKES)
def test_calls_end_when_the_server_shuts_down_without_waiting_for_its_model(make: Any, effort: Effort) -> None:
    chance = effort.random()

    def slow(td: Any) -> Any:
        time.sleep(0.005)
        return answer(td)

    transport = make()
    with ExitStack() as stack:
        children = [stack.enter_context(child) for child in askers(transport, (ServerClosedError,))]
        server = InferenceServer(slow, transport, max_batch_size=5)

        def end() -> None:
            time.sleep(chance.uniform(0, 0.01))  # orders nothing: any moment
            server.shutdown(0)
            eventually(lambda: not server.is_alive)

        shut_down_again_and_again(server, children, end, effort.times(8, stress=25))


@pytest.mark.parametrize("make", MAKES)
def test_pauses_that_refuse_end_calls_and_those_that_keep_them_answer_them_later(make: Any, effort: Effort) -> None:
    chance = effort.random()
    transport = make()
    with ExitStack() as stack:
        children = [stack.enter_context(child) for child in askers(transport, (ServerPausedError,))]
        server = stack.enter_context(InferenceServer(answer, transport, max_batch_size=5))
        for turn in range(effort.times(9, stress=25)):
            with server.paused(("keep", "wait", "reject")[turn % 3]):
                time.sleep(chance.uniform(0, 0.01))  # orders nothing: any moment
            for child in children:
                child.goes_on()
        for child in children:
            child.end()


def test_requests_of_a_megabyte_end_whenever_the_server_shuts_down(effort: Effort) -> None:
    chance = effort.random()
    transport = MPTransport()
    with ExitStack() as stack:
        children = [
            stack.enter_context(child) for child in askers(transport, (ServerClosedError, PeerDiedError), size=250_000)
        ]
        server = InferenceServer(answer, transport, max_batch_size=5)

        def end() -> None:
            time.sleep(chance.uniform(0, 0.02))  # orders nothing: any moment
            server.shutdown(HANG, drain=chance.random() < 0.5)

        shut_down_again_and_again(server, children, end, effort.times(4, stress=8))


@pytest.mark.parametrize("kind", ["blocking", "awaiting"])
@pytest.mark.parametrize("make", MAKES)
def test_a_client_that_was_never_used_is_told_that_the_server_is_shut_down(make: Any, kind: str) -> None:
    transport = make()
    with InferenceServer(answer, transport):
        client, late = (clients_of(transport, 1, blocking=kind == "blocking")[0] for _ in range(2))
        assert outcome(client, 1) == 3
    for one in (client, late):
        assert str(outcome(one, 1)).startswith("ServerClosedError: ")
    with InferenceServer(answer, transport):
        assert [outcome(one, 2) for one in (client, late)] == [5, 5]


@pytest.mark.parametrize("make", MAKES)
def test_clients_that_come_while_a_pause_refuses_are_told_so_however_they_ask(make: Any) -> None:
    transport = make()
    with InferenceServer(answer, transport) as server:
        clients = [client_of(transport, kind) for kind in (*KINDS, "blocking")]
        with server.paused("reject"):
            for _ in range(3):
                with pytest.raises(ServerPausedError):  # by the future at first, then at once
                    clients[2].submit(request(1)).result(HANG / 4)
                for client in clients[:2]:
                    assert str(outcome(client, 1)).startswith("ServerPausedError: ")
        assert [outcome(client, 2) for client in clients] == [5, 5, 5]
        assert clients[2].submit(request(3)).result(HANG / 4)["action"][0] == 7


@pytest.mark.parametrize("make", MAKES)
def test_a_drained_server_answers_a_request_whose_client_is_told_of_the_end_while_it_still_posts(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing, send = threading.Event(), FramedSocket.send
    here = threading.get_ident()

    def send_and_stand_still(wire: FramedSocket, data: bytes) -> bool:
        sent = send(wire, data)
        if threading.get_ident() == here:
            assert closing.wait(HANG)
        return sent

    entered, gate = threading.Event(), threading.Event()

    def model(td: TensorDictBase) -> TensorDictBase:
        if (td["observation"] == 1).any():
            entered.set()
            assert gate.wait(HANG)
        return double(td)

    transport = make()
    with InferenceServer(model, transport) as server, ThreadPoolExecutor(3) as pool:
        client, other = transport.client(), transport.client()
        assert client(request(0), HANG)["action"][0] == 0
        first = pool.submit(other, request(1), HANG)
        assert entered.wait(HANG)

        def end() -> None:
            eventually(lambda: server.stats().pending == 1)
            pool.submit(server.shutdown, HANG, drain=True)
            eventually(lambda: transport.queue.admission.closed is not None)
            closing.set()
            gate.set()

        ending = pool.submit(end)
        monkeypatch.setattr(FramedSocket, "send", send_and_stand_still)
        assert client(request(2), HANG)["action"][0] == 4
        ending.result(HANG)
        assert first.result(HANG)["action"][0] == 2
