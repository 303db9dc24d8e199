"""What runs in the processes of the tests of the process transports. Those that are spawned import it from here."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Self

import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer import InferenceClient, MPTransport, ProcessSlotTransport
from aioinfer.ipc.sockets import Listener
from aioinfer.testing import eventually, request
from aioinfer.testing.inspection import connection_of
from aioinfer.transports.ipc.connection import ClientConnection
from tests.limits import HANG, IMPORTS

KINDS = ("blocking", "awaiting")


def hear(line: Connection[Any, Any]) -> Any:
    """What a process says, which may have to import everything first."""
    assert line.poll(IMPORTS), "the process says nothing"
    return line.recv()


class Child:
    """A process that is told what to do, and is gone at the end of the test.

    Args:
        method: how it is started.
        target: what it runs, given its end of the line and ``arguments``.
        arguments: what else it is given.
    """

    def __init__(self, method: str, target: Callable[..., None], *arguments: Any) -> None:
        context: Any = multiprocessing.get_context(method)
        self.line: Connection[Any, Any]
        self.line, other = context.Pipe()
        self.process: BaseProcess = context.Process(target=run_target, args=(target, other, *arguments))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of 3.12: a process with threads is forked
            self.process.start()
        other.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.line.close()

    def hear(self) -> Any:
        return hear(self.line)

    def tell(self, order: Any) -> Any:
        self.line.send(order)
        return self.hear()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def count(self) -> list[int]:
        """How many replies each client of a process that runs ``ask_always`` has had since the last time."""
        replies = self.tell("count")
        assert isinstance(replies, list), replies  # or what went wrong there
        return replies

    def goes_on(self) -> None:
        """Wait until every client of such a process has had a reply from now on."""
        since = [0 for _ in self.count()]

        def all_have() -> bool:
            since[:] = [old + new for old, new in zip(since, self.count(), strict=True)]
            return all(since)

        eventually(all_have)

    def end(self) -> None:
        """End such a process; fail if something went wrong there."""
        replies = self.tell("end")
        assert isinstance(replies, int), replies


def run_target(target: Callable[..., None], *arguments: Any) -> None:
    """Run what a child process is for."""
    torch.set_num_threads(1)
    target(*arguments)


def answer(td: TensorDictBase) -> TensorDictBase:
    """A model whose ``action`` tells which ``observation`` it was made of."""
    return TensorDict({"action": td["observation"] * 2 + 1}, batch_size=td.batch_size)


# -- clients of either kind --------------------------------------------------------------------------------


def clients_of(transport: MPTransport | ProcessSlotTransport, count: int, *, blocking: bool) -> list[Any]:
    """Clients that share a connection."""
    return [*(transport.clients(count) if blocking else transport.async_clients(count))]


def client_of(source: Any, kind: str, **options: Any) -> Any:
    """A client with a connection of its own."""
    return source.client(**options) if kind == "blocking" else source.async_client(**options)


def call(client: Any, td: Any, timeout: float = HANG) -> TensorDictBase:
    """Call a client, if it must be awaited in an event loop of its own."""

    async def wait() -> TensorDictBase:
        async with asyncio.timeout(timeout):
            reply: TensorDictBase = await client(td)
        return reply

    return client(td, timeout) if isinstance(client, InferenceClient) else asyncio.run(wait())


def outcome(client: Any, value: float) -> float | str:
    """What a call comes to: the first element of the ``action``, or the error in words."""
    try:
        return float(call(client, request(value))["action"][0])
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def is_asking(client: Any) -> bool:
    """Whether a request of a client, or of one that shares its connection, has no answer yet."""
    connection = connection_of(client)
    return connection is not None and bool(connection.calls)


def greeting(transport: Any, count: Any = 1) -> bytes:
    """What a process says first that has ``count`` clients of the transport."""
    endpoint = transport.endpoint()
    listener = Listener()
    connection = ClientConnection(listener.address, endpoint.id, count, endpoint.codec)
    sock = listener.accept()
    assert sock is not None
    with sock:
        data = sock.recv(1 << 16)
    listener.close()
    del connection
    return data


# -- workers under load ------------------------------------------------------------------------------------


class _Asking:
    """Questions of several clients, and what came of them.

    Args:
        line: told of each error that is not forgiven.
        identity: sets these questions apart from those of other processes.
        count: how many clients ask.
        forgiven: errors that a call may end with; its client asks on.
        size: of an observation.
    """

    def __init__(
        self,
        line: Connection[Any, Any],
        identity: int,
        count: int,
        forgiven: tuple[type[Exception], ...],
        size: int,
    ) -> None:
        self.ended = threading.Event()
        self.replies = [0] * count
        self._line = line
        self._identity = identity
        self._forgiven = forgiven
        self._size = size

    def question(self, place: int, number: int) -> TensorDict:
        observation = torch.full((self._size,), float(number))
        observation[0], observation[1] = self._identity, place
        return TensorDict({"observation": observation})

    def check(self, place: int, asked: TensorDictBase, reply: TensorDictBase) -> None:
        if not bool((reply["action"] == answer(asked)["action"]).all()):
            self._line.send(f"{asked['observation']} was answered with {reply['action']}")
            self.ended.set()
        self.replies[place] += 1

    def forgive(self, error: Exception) -> None:
        if not isinstance(error, self._forgiven):
            self._line.send(f"{self._identity}: {error!r}")
            self.ended.set()

    def block(self, place: int, client: Any) -> None:
        for number in count():
            if self.ended.is_set():
                return
            asked = self.question(place, number)
            try:
                self.check(place, asked, client(asked, HANG))
            except Exception as error:
                self.forgive(error)
                self.ended.wait(0.001)

    async def wait(self, place: int, client: Any) -> None:
        for number in count():
            if self.ended.is_set():
                return
            asked = self.question(place, number)
            try:
                async with asyncio.timeout(HANG):
                    reply = await client(asked)
                self.check(place, asked, reply)
            except Exception as error:
                self.forgive(error)
                await asyncio.sleep(0.001)


def ask_always(
    line: Connection[Any, Any],
    clients: Sequence[Any],
    identity: int,
    forgiven: tuple[type[Exception], ...] = (),
    size: int = 3,
) -> None:
    """Ask with every client, on and on, and check every reply. Orders: ``count`` replies since the last, ``end``."""
    asking = _Asking(line, identity, len(clients), forgiven, size)

    async def wait() -> None:
        await asyncio.gather(*[asking.wait(place, client) for place, client in enumerate(clients)])

    with ThreadPoolExecutor(len(clients)) as pool:
        if isinstance(clients[0], InferenceClient):
            running = [pool.submit(asking.block, place, client) for place, client in enumerate(clients)]
        else:
            running = [pool.submit(asyncio.run, wait())]
        counted = [0] * len(clients)
        while (order := line.recv()) != "end":
            assert order == "count"
            now = list(asking.replies)
            line.send([new - old for new, old in zip(now, counted, strict=True)])
            counted = now
        asking.ended.set()
        for future in running:
            future.result(HANG)
    line.send(sum(asking.replies))


# -- workers that do one thing after the other -------------------------------------------------------------


def use(line: Connection[Any, Any], client: Any) -> None:
    """Call a client, pickled or not, with each value that comes. Orders beside: ``drop``, and the ways to end."""
    if isinstance(client, bytes):
        client = pickle.loads(client)
    endings: dict[str, Callable[[], Any]] = {"exit": sys.exit, "_exit": lambda: os._exit(3)}
    while (order := line.recv()) != "return":
        if order == "drop":
            client = None
            line.send("dropped")
        elif isinstance(order, str):
            endings[order]()
        else:
            line.send(outcome(client, order))
