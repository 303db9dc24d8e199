"""Models and processes for the tests of servers in processes of their own. Processes that are spawned import it."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import AsyncInferenceClient, MPTransport, ProcessInferenceServer, ProcessSlotTransport, connect
from aioinfer.process_server.child import CommandLoop
from aioinfer.testing import double, eventually, request
from aioinfer.transports.queue import RequestQueue
from tests.limits import HANG
from tests.weight_models import mark_of, policy

Model = Callable[[TensorDictBase], TensorDictBase]


def make_policy(**options: Any) -> TensorDictModule:
    torch.set_num_threads(1)
    return policy(0.0, **options)


class Stuck(nn.Module):
    """Says that it was called, and does not return."""

    def __init__(self, entered: Path) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.entered = entered

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        self.entered.touch()
        time.sleep(1000)
        return td


class Gated:
    """A model that says that it was called, and goes on when its gate is there; and the factory that makes it."""

    def __init__(self, directory: Path) -> None:
        self.entered = directory / "entered"
        self.gate = directory / "gate"

    def __call__(self) -> Model:
        return self.run

    def run(self, td: TensorDictBase) -> TensorDictBase:
        self.entered.touch()
        eventually(self.gate.exists)
        return double(td)


class GatedWeights(nn.Module):
    """A :class:`Gated` model that has weights."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.run = Gated(directory).run

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        return self.run(td)


def make_double() -> Model:
    return double


class HandsOut:
    """A factory that holds a module."""

    def __init__(self, module: TensorDictModule) -> None:
        self.module = module

    def __call__(self) -> TensorDictModule:
        return self.module


class HandsNothingOut(HandsOut):
    """A factory that holds a module, and never makes a model."""

    def __call__(self) -> NoReturn:
        time.sleep(1000)
        raise AssertionError("nobody has ended it")


class BrokenTransport(MPTransport):
    """The model thread of its server dies of the first request."""

    def attach(self, queue: RequestQueue) -> None:
        super().attach(queue)
        queue.get_batch = self._fail  # type: ignore[assignment, method-assign]

    def _fail(self, max_items: int) -> Any:
        raise OSError("the wire broke")


# -- factories that fail -----------------------------------------------------------------------------------


class Odd(Exception):
    """It does not unpickle."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raise_error() -> Any:
    raise ValueError("there are no weights")


def raise_odd_error() -> Any:
    raise Odd(1, 2)


def exit_python() -> Any:
    raise SystemExit("enough")


def exit_at_once() -> Any:
    os._exit(3)


def kill_itself() -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def return_none() -> Any:
    return None


def take_for_ever(begun: Path) -> Any:
    begun.touch()
    time.sleep(1000)


class Mute(BaseException):
    """Nobody can show it."""

    def __str__(self) -> str:
        raise SystemExit("don't look")


class Raises:
    """A factory that raises."""

    def __init__(self, kind: type[BaseException]) -> None:
        self.kind = kind

    def __call__(self) -> Any:
        raise self.kind("enough")


class Rude:
    """A factory that leaves Python where it is pickled (``"closed"``), or unpickled (``"opened"``)."""

    def __init__(self, when: str) -> None:
        self.when = when

    def __call__(self) -> Any:
        return double

    def __reduce__(self) -> Any:
        if self.when == "closed":
            raise SystemExit("not this way")
        return _leave, ()


def _leave() -> None:
    raise SystemExit("not that way")


class Opened(Exception):
    """It leaves Python where it is unpickled."""

    def __reduce__(self) -> Any:
        return _leave, ()


class Closed(Exception):
    """It leaves Python where it is pickled."""

    def __reduce__(self) -> Any:
        raise SystemExit("not this way")


class Touchy(nn.Module):
    """A model, and a factory of it, that raises what its state says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        return double(td)

    def get_extra_state(self) -> Any:
        return "fine"

    def set_extra_state(self, state: Any) -> None:
        kinds = (SystemExit, KeyboardInterrupt, asyncio.CancelledError, Mute, Opened, Closed)
        for kind in kinds:
            if kind.__name__ == state:
                raise kind("it hurts")


class Exhausted(nn.Module):
    """A model, and a factory of it, that takes all descriptors of its process, and at the next request frees them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.taken: list[int] = []

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        freed = bool(self.taken)
        while self.taken:
            os.close(self.taken.pop())
        if not freed:
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
            with suppress(OSError):
                while True:
                    self.taken.append(os.open(os.devnull, os.O_RDONLY))
        return TensorDict({"freed": torch.full(td.batch_size, freed)}, td.batch_size)


class Babbler:
    """A factory of a model that says something to the parent on the server's behalf, or closes the connection."""

    def __init__(self, nonsense: bytes) -> None:
        self.nonsense = nonsense

    def __call__(self) -> Model:
        return self.run

    def run(self, td: TensorDictBase) -> TensorDictBase:
        (commands,) = [thing for thing in gc.get_objects() if type(thing) is CommandLoop]
        if self.nonsense:
            commands.sock.send(self.nonsense)
        else:
            commands.sock.shutdown()
        return double(td)


class Unreadable:
    """A factory that can't be unpickled."""

    def __call__(self) -> Any:
        return double

    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise LookupError("made elsewhere")


# -- workers -----------------------------------------------------------------------------------------------


class Note:
    """Stands for a connection to a process that is gone when something is said."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def send(self, what: object) -> None:
        self.path.write_text(str(what))


def ask_once(line: Connection[Any, Any] | Note, client: Any, value: float) -> None:
    """Ask with a client, or at an address, and tell the mark of the reply, or the error."""
    torch.set_num_threads(1)
    if isinstance(client, str):
        client = connect(client, timeout=HANG).client()
    try:
        if isinstance(client, AsyncInferenceClient):
            reply = asyncio.run(_ask(client, value))
        else:
            reply = client(request(value), HANG)
    except Exception as error:
        line.send(type(error).__name__)
    else:
        line.send(mark_of(reply))


async def _ask(client: AsyncInferenceClient, value: float) -> TensorDictBase:
    async with asyncio.timeout(HANG):
        return await client(request(value))


# -- servers and processes, for the tests ------------------------------------------------------------------


def slots() -> ProcessSlotTransport:
    return ProcessSlotTransport(request(0), TensorDict({"marks": torch.zeros(12)}), num_slots=16)


def forked(factory: Callable[[], Any], **options: Any) -> ProcessInferenceServer:
    return ProcessInferenceServer(factory, MPTransport(), ctx="fork", **options)


@contextmanager
def worker(client: Any, value: float = 1.0) -> Iterator[Connection[Any, Any]]:
    """A process that asks once."""
    context = multiprocessing.get_context("fork")
    line, other = context.Pipe()
    process = context.Process(target=ask_once, args=(other, client, value))
    process.start()
    other.close()
    try:
        yield line
    finally:
        process.kill()
        process.join()
        line.close()


def freeze(server: ProcessInferenceServer) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)


def kill(server: ProcessInferenceServer) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
