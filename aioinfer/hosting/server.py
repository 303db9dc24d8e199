"""A server in a process of its own."""

from __future__ import annotations

import inspect
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.context import BaseContext
from typing import Any

from tensordict import TensorDictBase
from torch import nn

from aioinfer.client import AsyncInferenceClient, InferenceClient
from aioinfer.devices import Model
from aioinfer.errors import InferenceError
from aioinfer.health import Health
from aioinfer.hosting.completion import Completion
from aioinfer.hosting.hotline import Call
from aioinfer.hosting.life import ProcessLife
from aioinfer.hosting.orders import FromParent
from aioinfer.hosting.pause import ProcessPause
from aioinfer.pause import PendingPolicy
from aioinfer.server import InferenceServer
from aioinfer.stats import ServerStats
from aioinfer.transports.processes import ProcessTransport
from aioinfer.transports.threads import ThreadingTransport
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
        transport: an :class:`MPTransport` or a :class:`ProcessSlotTransport`, made here, or several in a list. From the
            start on, the process serves them; clients are made here all the same, by default of the first one.
        ctx: a multiprocessing context, or the name of a start method; ``None`` spawns. Fork only where no other thread
            of yours can hold a lock that the process would need, and before CUDA is used.
        startup_timeout: seconds that the process has to serve; ``None`` waits for ever. If it dies before,
            that is known at once in either case.
        options: the keyword arguments of :class:`InferenceServer`. What needs no model is checked here.

    Attributes:
        transport: the first transport.
        transports: all of them.

    Raises:
        TypeError: an argument of the wrong type, or one that :class:`InferenceServer` does not have; a transport for
            callers of one process; or a model instead of what makes it.
        ValueError: an unknown start method; ``startup_timeout`` is not above 0; no transport, or one twice; or what
            :class:`InferenceServer` raises it for.
    """

    def __init__(
        self,
        policy_factory: Callable[[], Model],
        transport: ProcessTransport | Sequence[ProcessTransport],
        *,
        ctx: BaseContext | str | None = None,
        startup_timeout: float | None = None,
        **options: Any,
    ) -> None:
        if isinstance(policy_factory, nn.Module):
            raise TypeError(
                f"policy_factory must be a function that makes the model in the server's process, got a model, a "
                f"{type(policy_factory).__qualname__}; give a function that returns it, such as `lambda: model`, "
                "which must be defined at the top of a module unless the process is forked"
            )
        if not callable(policy_factory):
            raise TypeError(f"policy_factory must be callable, got {type(policy_factory).__qualname__}")
        transports = list(transport) if isinstance(transport, Sequence) else [transport]
        for one in transports:
            if not isinstance(one, ProcessTransport):
                raise TypeError(
                    "transport must be an MPTransport or a ProcessSlotTransport, whose callers may be in other "
                    f"processes than the server, or a list of them; got {type(one).__qualname__}"
                )
        if not transports or len(set(transports)) < len(transports):
            raise ValueError("expected at least one transport, and none twice")
        if not isinstance(ctx, BaseContext | str | None):
            raise TypeError(f"ctx must be a multiprocessing context or its name, got {type(ctx).__qualname__}")
        if not isinstance(startup_timeout, int | float | None) or isinstance(startup_timeout, bool):
            raise TypeError(f"startup_timeout must be a number of seconds, or None, got {startup_timeout!r}")
        if startup_timeout is not None and not startup_timeout > 0:
            raise ValueError(f"startup_timeout must be above 0, or None, got {startup_timeout}")
        given = _checked(options)
        self.max_batch_size: int = given["max_batch_size"]
        super().__init__(
            policy_factory,
            transports,
            context=ctx if isinstance(ctx, BaseContext) else multiprocessing.get_context(ctx or "spawn"),
            startup_timeout=startup_timeout,
            options=options,
            policy_version=given["policy_version"],
        )

    # -- clients ---------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Where processes that nobody has given a client can get one of the first transport: :func:`connect`."""
        return self.transport.address

    def client(self, *, copy: bool = True) -> InferenceClient:
        """Make a client for a plain thread: ``transport.client()``."""
        return self.transport.client(copy=copy)

    def async_client(self, *, copy: bool = True) -> AsyncInferenceClient:
        """Make a client for coroutines: ``transport.async_client()``."""
        return self.transport.async_client(copy=copy)

    def clients(self, count: int, *, copy: bool = True) -> list[InferenceClient]:
        """Make clients for the threads of one process: ``transport.clients(count)``."""
        return self.transport.clients(count, copy=copy)

    def async_clients(self, count: int, *, copy: bool = True) -> list[AsyncInferenceClient]:
        """Make clients for the tasks of one process: ``transport.async_clients(count)``."""
        return self.transport.async_clients(count, copy=copy)

    # -- figures ---------------------------------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        """Whether the process runs; :meth:`health` says whether it serves. A forked child does not know: ``False``."""
        hotline = self._hotline
        return hotline.is_here and hotline.pid is not None and not hotline.ended.done

    @property
    def pid(self) -> int | None:
        """Of the process, also when it has ended; ``None`` before the start."""
        return self._hotline.pid

    def stats(self, *, reset: bool = False) -> ServerStats:
        """What the server did since it started; ``reset=True`` starts anew afterwards. Waits for the process.

        Raises:
            ServerNotRunningError: the server does not run, or this process was forked from the one that made it.
            ServerClosedError: it was shut down meanwhile.
            PeerDiedError: its process is gone.
        """
        asked = self._ask(FromParent.STATS, bool(reset))
        asked.wait_done()
        return asked.outcome()  # type: ignore[no-any-return]

    async def astats(self, *, reset: bool = False) -> ServerStats:
        """Do as :meth:`stats`, without blocking the event loop."""
        asked = self._ask(FromParent.STATS, bool(reset))
        await asked.await_done()
        return asked.outcome()  # type: ignore[no-any-return]

    def health(self, timeout: float = 1.0) -> Health:
        """How the server is. It always answers, whatever became of the process.

        Args:
            timeout: seconds that the process has to say; one that says nothing is alive and not ready.

        Raises:
            ServerNotRunningError: this process was forked from the one that made the server.
        """
        asked = self._ask_health()
        if asked is not None:
            asked.wait_done(timeout)
        return self._read_health(asked, timeout)

    async def ahealth(self, timeout: float = 1.0) -> Health:  # noqa: ASYNC109 - as health
        """Do as :meth:`health`, without blocking the event loop."""
        asked = self._ask_health()
        if asked is not None:
            await asked.await_done(timeout)
        return self._read_health(asked, timeout)

    def _ask(self, command: FromParent, *arguments: Any) -> Call:
        return self._running()[0].ask(command, *arguments)

    def _ask_health(self) -> Call | None:
        self._hotline.check_process()
        try:
            return self._ask(FromParent.HEALTH)
        except InferenceError:
            return None

    def _read_health(self, asked: Call | None, timeout: float) -> Health:
        if asked is not None and asked.done and asked.error is None:
            return asked.outcome()  # type: ignore[no-any-return]
        hotline = self._hotline
        refusal = "" if hotline.refusal is None else str(hotline.refusal)
        if hotline.ended.done:
            code = hotline.ended.outcome()
            return Health(alive=False, ready=False, pid=hotline.pid, exit_code=code, reason=refusal)
        if not hotline.began:
            return Health(alive=False, ready=False, reason=refusal or "the server was not started")
        reason = f"its process does not answer within {timeout:g} seconds" if hotline.serves else "the server starts"
        return Health(alive=True, ready=False, pid=hotline.pid, reason=refusal or reason)

    # -- weights ---------------------------------------------------------------------------------------

    @property
    def policy_version(self) -> int:
        """The version of the weights in use, or that were when the process ended. It asks nobody, and never raises."""
        page = self._page
        return self._version if page is None else page.read()

    def update_weights(self, weights: WeightsLike, *, version: int | None = None, cast: bool = False) -> None:
        """Serve other weights, from the next forward pass on; return when they are in use.

        They travel in shared memory, one update after the other.

        Args:
            weights: a module, a TensorDict or a state dict. They are copied, as they are now.
            version: your own number for them; ``None`` counts up.
            cast: convert weights of another dtype than the model's, instead of refusing them.

        Raises:
            ServerNotRunningError: the server does not run, or this process was forked from the one that made it.
            ValueError: ``version`` does not fit into 64 bits.
            TypeError: the model, or what was given, has no weights; or ``version`` is no integer.
            WeightSyncError: the weights don't fit, or did not arrive; the old ones serve on.
            ServerClosedError: the server was shut down meanwhile.
            PeerDiedError: its process is gone.
        """
        done = self._deliver(weights, version, cast)
        done.wait_done()
        done.outcome()

    async def aupdate_weights(self, weights: WeightsLike, *, version: int | None = None, cast: bool = False) -> None:
        """Do as :meth:`update_weights`, without blocking the event loop while a forward pass runs.

        The copy is taken before it first suspends. If it is cancelled, the weights are used all the same.
        """
        done = self._deliver(weights, version, cast)
        await done.await_done()
        done.outcome()

    def _deliver(self, weights: WeightsLike, version: int | None, cast: bool) -> Completion[None]:
        _, deliveries = self._running()
        return deliveries.deliver(weights, version, cast=bool(cast))

    # -- pauses ----------------------------------------------------------------------------------------

    def paused(self, pending: PendingPolicy = "keep") -> ProcessPause:
        """Run no forward pass inside a ``with`` block, or an ``async with`` block. Weights may be updated inside.

        When the block is left, the server goes on: that is waited for too, and the death of the process ends it.

        Args:
            pending: what becomes of requests that are pending when it begins: ``"keep"`` lets them wait,
                ``"wait"`` serves them first, ``"reject"`` fails them, and what is submitted inside too, with
                :class:`ServerPausedError`. With the others, what is submitted inside waits.

        Raises:
            ServerNotRunningError: the server does not run, or this process was forked from the one that made it.
            ServerClosedError: where the block is entered, it was shut down meanwhile.
            PeerDiedError: its process is gone.
            ValueError: ``pending`` is none of the three.
        """
        if pending not in ("keep", "wait", "reject"):
            raise ValueError(f'pending must be "keep", "wait" or "reject", got {pending!r}')
        return ProcessPause(self._running()[0], pending)


class _AnyModel(nn.Module):
    """Stands for a model that is made later."""

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        raise NotImplementedError


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the server, defaults included, checked by one that is never started."""
    model, transport = _AnyModel(), ThreadingTransport()
    InferenceServer(model, transport, **options)
    given = inspect.signature(InferenceServer).bind(model, transport, **options)
    given.apply_defaults()
    return given.arguments
