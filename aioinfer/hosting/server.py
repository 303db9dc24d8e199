"""A server in a process of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.context import BaseContext
from typing import Any

from aioinfer.client import AsyncInferenceClient, InferenceClient
from aioinfer.devices import Model
from aioinfer.errors import InferenceError
from aioinfer.health import Health
from aioinfer.hosting.life import ProcessLife
from aioinfer.hosting.orders import FromParent
from aioinfer.stats import ServerStats
from aioinfer.transports.processes import ProcessTransport
from aioinfer.weight_sync.weights import WeightsLike

__all__ = ["ProcessInferenceServer"]


class ProcessInferenceServer(ProcessLife):
    """An :class:`InferenceServer` in a process of its own: it shares neither interpreter nor event loop with you.

    ``with server:`` or ``start()`` / ``shutdown()`` host it from code that has no event loop, ``async with server:``
    or ``astart()`` / ``aclose()`` from a coroutine. Requests that are submitted before it starts wait for it.

    A server starts once: its transport goes with its process. The process ends within two seconds of its parent,
    however that ends, unless the model keeps Python's interpreter to itself for ever. It ignores Ctrl-C, which goes to
    all processes of a terminal: the parent decides.

    Args:
        policy_factory: makes the model, in the process. It is pickled, unless the process is forked; tensors that
            it holds are copied.
        transport: an :class:`MPTransport` or a :class:`ProcessSlotTransport`, made here. From the start on, the
            process serves it; clients are made here all the same.
        ctx: a multiprocessing context, or the name of a start method; ``None`` spawns. Fork only where no other thread
            of yours can hold a lock that the process would need, and before CUDA is used.
        startup_timeout: seconds that the process has to serve; ``None`` waits for ever. If it dies before,
            that is known at once in either case.
        options: the keyword arguments of :class:`InferenceServer`.

    Raises:
        TypeError: an argument of the wrong type; or a transport for callers of one process.
        ValueError: an unknown start method, or ``startup_timeout`` is not above 0.
    """

    def __init__(
        self,
        policy_factory: Callable[[], Model],
        transport: ProcessTransport,
        *,
        ctx: BaseContext | str | None = None,
        startup_timeout: float | None = None,
        **options: Any,
    ) -> None:
        if not callable(policy_factory):
            raise TypeError(f"policy_factory must be callable, got {type(policy_factory).__qualname__}")
        if not isinstance(transport, ProcessTransport):
            raise TypeError(
                "transport must be an MPTransport or a ProcessSlotTransport, whose callers may be in other processes "
                f"than the server; got {type(transport).__qualname__}"
            )
        if not isinstance(ctx, BaseContext | str | None):
            raise TypeError(f"ctx must be a multiprocessing context or its name, got {type(ctx).__qualname__}")
        if startup_timeout is not None and startup_timeout <= 0:
            raise ValueError(f"startup_timeout must be above 0, or None, got {startup_timeout}")
        super().__init__(
            policy_factory,
            transport,
            context=ctx if isinstance(ctx, BaseContext) else multiprocessing.get_context(ctx or "spawn"),
            startup_timeout=startup_timeout,
            options=options,
        )

    # -- clients ---------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Where processes that nobody has given a client can get one: :func:`connect`."""
        return self.transport.address

    def client(self) -> InferenceClient:
        """Make a client for a plain thread: ``transport.client()``."""
        return self.transport.client()

    def async_client(self) -> AsyncInferenceClient:
        """Make a client for coroutines: ``transport.async_client()``."""
        return self.transport.async_client()

    def clients(self, count: int) -> list[InferenceClient]:
        """Make clients for the threads of one process: ``transport.clients(count)``."""
        return self.transport.clients(count)

    def async_clients(self, count: int) -> list[AsyncInferenceClient]:
        """Make clients for the tasks of one process: ``transport.async_clients(count)``."""
        return self.transport.async_clients(count)

    # -- figures ---------------------------------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        """Whether the process runs; :meth:`health` says whether it serves."""
        return self._hotline is not None and not self._hotline.ended.done()

    @property
    def pid(self) -> int | None:
        """Of the process, also when it has ended; ``None`` before the start."""
        return None if self._hotline is None else self._hotline.pid

    def stats(self, *, reset: bool = False) -> ServerStats:
        """What the server did since it started; ``reset=True`` starts anew afterwards. Waits for the process.

        Raises:
            RuntimeError: the server does not run.
            ServerClosedError: it is shut down.
            PeerDiedError: its process is gone.
        """
        return self._ask(FromParent.STATS, reset).result()  # type: ignore[no-any-return]

    async def astats(self, *, reset: bool = False) -> ServerStats:
        """Do as :meth:`stats`, without blocking the event loop."""
        return await asyncio.wrap_future(self._ask(FromParent.STATS, reset))

    def health(self, timeout: float = 1.0) -> Health:
        """How the server is. It always answers, whatever became of the process.

        Args:
            timeout: seconds that the process has to say; one that says nothing is alive and not ready.
        """
        asked = self._ask_health()
        concurrent.futures.wait([asked], timeout)
        return self._read_health(asked, timeout)

    async def ahealth(self, timeout: float = 1.0) -> Health:  # noqa: ASYNC109 - as health
        """Do as :meth:`health`, without blocking the event loop."""
        asked = self._ask_health()
        heard = asyncio.wrap_future(asked)
        heard.add_done_callback(lambda future: future.cancelled() or future.exception())  # if nobody awaits it any more
        await asyncio.wait([heard], timeout=timeout)
        heard.cancel()
        return self._read_health(asked, timeout)

    def _ask(self, command: FromParent, *arguments: Any) -> Future[Any]:
        return self._running()[0].ask(command, *arguments)

    def _ask_health(self) -> Future[Health]:
        try:
            return self._ask(FromParent.HEALTH)
        except (RuntimeError, InferenceError) as error:
            unasked: Future[Health] = Future()
            unasked.set_exception(error)
            return unasked

    def _read_health(self, asked: Future[Health], timeout: float) -> Health:
        if asked.done() and asked.exception() is None:
            return asked.result()
        hotline = self._hotline
        if hotline is None:
            return Health(alive=False, ready=False, reason="the server was not started")
        if hotline.ended.done():
            code = hotline.ended.result()
            return Health(alive=False, ready=False, pid=hotline.pid, exit_code=code, reason=hotline.refusal)
        reason = f"its process does not answer within {timeout:g} seconds" if hotline.serves else "the server starts"
        return Health(alive=True, ready=False, pid=hotline.pid, reason=hotline.refusal or reason)

    # -- weights ---------------------------------------------------------------------------------------

    @property
    def policy_version(self) -> int:
        """The version of the weights in use. Waits for the process; in a coroutine, ``ahealth`` does not block."""
        health: Health = self._ask(FromParent.HEALTH).result()
        assert health.policy_version is not None  # it comes from the process
        return health.policy_version

    def update_weights(self, weights: WeightsLike, *, version: int | None = None, cast: bool = False) -> None:
        """Serve other weights, from the next forward pass on; return when they are in use.

        They travel in shared memory, one update after the other.

        Args:
            weights: a module, a TensorDict or a state dict. They are copied, as they are now.
            version: your own number for them; ``None`` counts up.
            cast: convert weights of another dtype than the model's, instead of refusing them.

        Raises:
            RuntimeError: the server does not run.
            ValueError: ``version`` does not fit into 64 bits.
            TypeError: the model, or what was given, has no weights; or ``version`` is no integer.
            WeightSyncError: the weights don't fit; the old ones serve on.
            ServerClosedError: the server was shut down meanwhile.
            PeerDiedError: its process is gone.
        """
        self._deliver(weights, version, cast).result()

    async def aupdate_weights(self, weights: WeightsLike, *, version: int | None = None, cast: bool = False) -> None:
        """Do as :meth:`update_weights`, without blocking the event loop while a forward pass runs.

        The copy is taken before it first suspends. If it is cancelled, the weights are used all the same.
        """
        await asyncio.wrap_future(self._deliver(weights, version, cast))

    def _deliver(self, weights: WeightsLike, version: int | None, cast: bool) -> Future[None]:
        _, deliveries = self._running()
        return deliveries.deliver(weights, version, cast=cast)
