"""Callers of both kinds, a model with a gate, and the harness where a server meets them."""

from __future__ import annotations

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import Any, Self, TypeAlias, TypeVar

import numpy as np  # tensordict requires it
import torch
from anyio.from_thread import start_blocking_portal
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from aioinfer.errors import InferenceError
from aioinfer.server import InferenceServer
from aioinfer.transports.polling import InferenceTransport

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)
Reply: TypeAlias = Future[TensorDictBase]
Context: TypeAlias = AbstractContextManager[Any]

HANG_TIMEOUT = 60.0
"""Seconds after which a call counts as hanging."""

_SHORT = 0.05  # seconds in which a refusal comes


def request(value: float, *, size: int = 3) -> TensorDict:
    """Make a request whose ``observation`` ``[size]`` holds ``value``."""
    return TensorDict({"observation": torch.full((size,), float(value))}, batch_size=[])


def request_of(*values: float, size: int = 3) -> TensorDict:
    """Make a request of several rows, one for each value: ``observation`` ``[n, size]``."""
    rows = torch.tensor(values, dtype=torch.float32).reshape(-1, 1)
    return TensorDict({"observation": rows.repeat(1, size)}, batch_size=[len(values)])


def named_requests(value: float) -> list[dict[str, Any]]:
    """Make ``request(value)`` by name, in every form that a caller may have its entry."""
    array = np.full(3, value, np.float32)
    locked = array.copy()
    locked.flags.writeable = False
    tensor = torch.from_numpy(array.copy())
    forms: list[Any] = [array, locked, array[::-1], np.full((3, 2), value, np.float32)[:, 0], array.astype(">f4")]
    return [{"observation": form} for form in (*forms, tensor, nn.Parameter(tensor), [value] * 3)]


def double(td: TensorDictBase) -> TensorDictBase:
    """A model: ``action`` is twice the ``observation``."""
    return TensorDict({"action": td["observation"] * 2}, batch_size=td.batch_size)


def eventually(condition: Callable[[], bool], *, within: float = HANG_TIMEOUT) -> None:
    """Wait until ``condition`` holds.

    Raises:
        AssertionError: it did not within ``within`` seconds.
    """
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not hold within {within} seconds"
        time.sleep(0.001)


def is_double(reply: TensorDictBase, value: float) -> bool:
    """Whether a reply is the one of :func:`double` to ``request(value)``."""
    return bool((reply["action"] == 2 * value).all())


def are_doubles(reply: TensorDictBase, *values: float) -> bool:
    """Whether a reply is the one of :func:`double` to ``request_of(*values)``."""
    return reply.batch_size == (len(values),) and torch.equal(reply["action"], 2 * request_of(*values)["observation"])


def raises(kind: type[E], action: Callable[[], Any]) -> E:
    """Return the error that ``action`` raises; :class:`AssertionError` if it raises none of this kind."""
    try:
        outcome = action()
    except kind as error:
        return error
    except Exception as error:
        raise AssertionError(f"expected the call to raise {kind.__name__}, but it raised {error!r}") from error
    how = "it returned the error as its reply" if isinstance(outcome, BaseException) else "it returned"
    raise AssertionError(f"expected the call to raise {kind.__name__}, but {how}: {outcome!r}")


def expect_doubles(replies: Iterable[Reply], values: Iterable[float]) -> None:
    """Check that calls end with the replies of :func:`double` to ``request(value)``, one for each value."""
    for reply, value in zip(replies, values, strict=True):
        assert is_double(reply.result(HANG_TIMEOUT), value)


def expect_error(kind: type[E], reply: Reply) -> E:
    """Return the error that a call ends with."""
    return raises(kind, lambda: reply.result(HANG_TIMEOUT))


class GatedModel:
    """A model whose forward pass waits until a gate is opened, and which records the batches that it got.

    The model thread computes; the test's thread opens the gate and reads the records.

    Args:
        model: computes the replies once the gate is open.
        key: the entry to record, which may be nested; ``None`` takes the first tensor of the batch.
    """

    def __init__(
        self, model: Callable[[TensorDictBase], TensorDictBase] = double, *, key: NestedKey | None = None
    ) -> None:
        self._model = model
        self._key = key
        self._gate = threading.Event()
        self.entered = threading.Event()
        """Set as soon as a batch waits at the gate."""
        self.batches: list[list[float]] = []
        """For each forward pass, the first element of each row of the entry."""

    def __call__(self, td: TensorDictBase) -> TensorDictBase:
        rows = self._entry(td)
        self.batches.append(rows.reshape(rows.shape[0], -1)[:, 0].tolist())
        self.entered.set()
        assert self._gate.wait(HANG_TIMEOUT), "nobody opened the gate"
        return self._model(td)

    def _entry(self, td: TensorDictBase) -> Tensor:
        if self._key is not None:
            entry: Tensor = td[self._key]
            return entry
        for leaf in td.values(include_nested=True, leaves_only=True):
            if isinstance(leaf, Tensor):
                return leaf
        raise ValueError(f"the batch has no tensor to remember, only the entries {sorted(td.keys())}")

    def open(self) -> None:
        """Let every batch pass from now on."""
        self._gate.set()

    def close(self) -> None:
        """Let batches wait again; call it while no forward pass runs."""
        self._gate.clear()
        self.entered.clear()

    @property
    def seen(self) -> set[float]:
        """The values of all :attr:`batches`: for each request that reached the model, one element."""
        return {value for batch in self.batches for value in batch}


class Callers(ABC):
    """Callers of one kind, each with a client of its own, driven from the test's thread.

    Args:
        server: whom they call.
        mode: makes a context in which every call is made, such as a torch mode: of each call where callers are threads,
            of their event loop where they are tasks.
    """

    def __init__(self, server: InferenceServer, mode: Callable[[], Context] = nullcontext) -> None:
        self._server = server
        self._mode = mode
        self._clients: dict[int, Any] = {}
        self._stack = ExitStack()
        self._background: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def client(self, index: int) -> Any:
        """The client of caller ``index``."""
        if index not in self._clients:
            self._clients[index] = self._make_client()
        return self._clients[index]

    @abstractmethod
    def _make_client(self) -> Any: ...

    def in_background(self, action: Callable[[], T]) -> Future[T]:
        """Run ``action`` in a thread that ends before the callers do."""
        if self._background is None:
            self._background = self._stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="background"))
        return self._background.submit(action)

    def refused(self, index: int, td: Any) -> bool:
        """Whether the server refuses a request of caller ``index``; one that it takes is cancelled."""
        try:
            self.call(index, td, timeout=_SHORT).result(HANG_TIMEOUT)
        except InferenceError:
            return True
        except TimeoutError:
            pass
        return False

    def call(
        self, index: int, td: Any, *, timeout: float | None = None, wait: bool = False, around: Context | None = None
    ) -> Reply:
        """Let caller ``index`` call its client, inside ``around``; the future ends as the call does."""
        return self._start(self.client(index), td, timeout, wait, around or nullcontext())

    @abstractmethod
    def _start(self, client: Any, td: Any, timeout: float | None, wait: bool, around: Context) -> Reply: ...

    @abstractmethod
    def submit(self, index: int, td: Any) -> Callable[[], None]:
        """Let caller ``index`` submit a request, and return how to cancel it."""


class BlockingCallers(Callers):
    """Plain threads."""

    def __init__(self, server: InferenceServer, mode: Callable[[], Context] = nullcontext) -> None:
        super().__init__(server, mode)
        self._threads = self._stack.enter_context(ThreadPoolExecutor(64, thread_name_prefix="caller"))

    def _make_client(self) -> Any:
        return self._server.client()

    def _start(self, client: Any, td: Any, timeout: float | None, wait: bool, around: Context) -> Reply:
        def call() -> TensorDictBase:
            with self._mode(), around:
                reply: TensorDictBase = client(td, timeout, wait=wait)
                return reply

        return self._threads.submit(call)

    def submit(self, index: int, td: Any) -> Callable[[], None]:
        future = self.client(index).submit(td)
        return lambda: future.cancel() and None


@asynccontextmanager
async def _in_event_loop(context: Context) -> AsyncIterator[None]:
    with context:
        yield


class AwaitingCallers(Callers):
    """Tasks on an event loop in a thread of its own."""

    def __init__(self, server: InferenceServer, mode: Callable[[], Context] = nullcontext) -> None:
        super().__init__(server, mode)
        self._portal = self._stack.enter_context(start_blocking_portal())
        self._stack.enter_context(self._portal.wrap_async_context_manager(_in_event_loop(mode())))

    def _make_client(self) -> Any:
        return self._server.async_client()

    def _start(self, client: Any, td: Any, timeout: float | None, wait: bool, around: Context) -> Reply:
        async def call() -> TensorDictBase:
            async with asyncio.timeout(timeout):
                with around:
                    reply: TensorDictBase = await client(td, wait=wait)
                return reply

        return self._portal.start_task_soon(call)

    def submit(self, index: int, td: Any) -> Callable[[], None]:
        async def submit() -> asyncio.Future[TensorDictBase]:
            future: asyncio.Future[TensorDictBase] = client.submit(td)
            return future

        async def cancel() -> None:
            future.cancel()
            await asyncio.sleep(0)  # callbacks run in the next tick

        client = self.client(index)
        future = self._portal.call(submit)
        return lambda: self._portal.call(cancel)


@dataclass(frozen=True)
class TransportHarness:
    """Serves a model to callers, for the checks of the contract: over one transport, with one kind of caller.

    Args:
        transport: makes a fresh transport with room for 16 clients; for ``fixed_layout``, given a request and a reply.
        callers: the kind of caller.
        drops_cancelled: whether the transport drops a request that is cancelled before its batch left.
        fixed_layout: whether the transport takes requests of one layout only.
        remote: whether replies travel to other processes, so that a caller gets copies of the exceptions of the model.
    """

    transport: Callable[..., InferenceTransport]
    callers: Callable[[InferenceServer], Callers]
    _: KW_ONLY
    drops_cancelled: bool = True
    fixed_layout: bool = False
    remote: bool = False

    @contextmanager
    def serve(
        self, model: Any, *, start: bool = True, reply: TensorDict | None = None, **options: Any
    ) -> Iterator[tuple[InferenceServer, Callers]]:
        """Run a server and its callers until the end of the block, also if a gate was left closed.

        Args:
            model: the model to serve.
            start: whether the server is started.
            reply: an example of a reply, if the model does not compute :func:`double`.
            options: of the server.
        """
        layouts = (request(0), double(request(0)) if reply is None else reply) if self.fixed_layout else ()
        server = InferenceServer(model, self.transport(*layouts), **options)
        with self.callers(server) as callers:
            try:
                if start:
                    server.start()
                yield server, callers
            finally:
                if isinstance(model, GatedModel):
                    model.open()
                server.shutdown()
