"""The batching server: a model and its transports, from start to shutdown."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

import torch
from anyio.from_thread import start_blocking_portal
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import nn

from aioinfer.batching import BatchingRule, BatchLimits, BatchScheduler
from aioinfer.buckets import BatchLayout, PaddedRunner, make_bucket_sizes
from aioinfer.client import AsyncInferenceClient, ClientMaker, InferenceClient
from aioinfer.compilation import CompiledPlan, WarmUp, compiler
from aioinfer.devices import place
from aioinfer.errors import ServerClosedError, ServerNotRunningError, clone_exception
from aioinfer.forward import CollateFn, ForwardPass
from aioinfer.futures import Future, run_in_thread
from aioinfer.ipc.selector import Selector
from aioinfer.learned_rule import LearnedRule
from aioinfer.model_thread import ModelThread, Pause, PendingPolicy, check_policy
from aioinfer.plan import Compile, Plan, Runner, make_runner, plan_function, plan_policy
from aioinfer.stats import Health, ServerStats, StatsRecorder
from aioinfer.transports.base import Transport
from aioinfer.transports.ipc.server import ProcessTransport
from aioinfer.transports.ipc.slots import ProcessSlotTransport
from aioinfer.transports.polling import InferenceTransport
from aioinfer.transports.queue import Admission, RequestQueue
from aioinfer.weight_sync.scheme import WeightSyncScheme
from aioinfer.weight_sync.weights import WeightsLike, check_version
from aioinfer.weight_updates import WeightUpdates

__all__ = ["BaseServer", "InferenceServer"]

# Seconds until a background task that has failed runs again, the first time and at most.
_FIRST_RETRY = 0.1
_LAST_RETRY = 5.0

_log = logging.getLogger("aioinfer")


class BaseServer(ClientMaker):
    """What both kinds of server have in common: clients of the first transport, and context managers."""

    transports: Sequence[InferenceTransport]

    @property
    def transport(self) -> InferenceTransport:
        """How requests and replies travel; the first one, if there are several."""
        return self.transports[0]

    @property
    @abstractmethod
    def is_alive(self) -> bool:
        """Whether the server's worker, or its process, runs."""

    def clients(self, count: int, *, copy: bool = True) -> list[InferenceClient]:
        return self.transport.clients(count, copy=copy)

    def async_clients(self, count: int, *, copy: bool = True) -> list[AsyncInferenceClient]:
        return self.transport.async_clients(count, copy=copy)

    @abstractmethod
    def start(self) -> Self:
        """Start the server."""

    @abstractmethod
    async def _astart(self) -> Self:
        """Do as :meth:`start`, on the running event loop."""

    @abstractmethod
    def shutdown(self, timeout: float | None = 5.0, *, drain: bool = False) -> None:
        """Shut the server down."""

    @abstractmethod
    async def aclose(self, timeout: float | None = 5.0, *, drain: bool = False) -> None:  # noqa: ASYNC109
        """Do as :meth:`shutdown`, without blocking the event loop."""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    async def __aenter__(self) -> Self:
        return await self._astart()

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class InferenceServer(BaseServer):
    """Serves one model to many callers at once, in batches.

    Embed it in a running event loop with ``async with server:`` (and ``await server.aclose()``), or host
    it from code that has no loop with ``with server:`` or ``server.start()`` / ``server.shutdown()``.
    Requests that are submitted before it starts wait for it.

    Args:
        model: any callable from a batched TensorDict ``[B]`` to a batched TensorDict ``[B]``; or, with ``in_keys``
            and ``out_keys``, a module or function of tensors. It runs on
            one thread of the server's own, under ``torch.no_grad``; its ``train``/``eval`` mode is left alone.
        transport: how requests and replies travel; several transports, in a list, serve tasks, threads and
            processes at once. Clients that the server makes are then the first one's.
        max_batch_size: most rows in one forward pass. A request of more rows is split over several; no other is, and
            one that does not fit beside others waits for the next pass.
        min_batch_size: after the first request arrived, gather until this many rows are there, or
            ``batch_timeout`` passes. With 1, a lone caller's request leaves at once; while the model is busy, requests
            gather anyway.
        batch_timeout: seconds that a partial batch may wait, 0.01 by default: for ``min_batch_size`` counted from its
            oldest request, for ``batching`` from when the model is free. With 0, batches are never held back.
        timeout: the name that torchrl has for ``batch_timeout``. Give one of the two.
        batching: holds batches back for requests that are expected, within the limits above; a :class:`BatchingRule`
            of this server's own. By default a :class:`LearnedRule`.
        collate_fn: list of rows to a batched TensorDict ``[B]`` with as many rows in the same order, whatever their
            layouts. Each row is a TensorDict without a dimension of rows, also where a request has several. The
            default joins requests of like layout, and runs those of unlike layout apart.
        device: where batches are moved, and the model at the start; ``None`` moves nothing.
        in_keys: the entries whose tensors, each ``[B, ...]``, are the arguments of ``model``, where that is a module or
            function of tensors: it returns the tensors of ``out_keys``, each ``[B, ...]``, in this order, of which
            ``"_"`` is not kept; or a mapping that has them. By default the model is called with the batch.
        out_keys: the entries that replies have, each of which the model must return. By default the ``out_keys`` of
            the model if it is a TensorDict module, so that requests are not sent back; all that it returns if it is
            another callable.
        output_device: where replies are moved. By default back to where the requests were, if
            ``device`` is given.
        weight_sync: receives weights from a trainer; they are applied between two forward passes. The server
            serves what it has until the first ones come.
        weight_sync_model_id: the name under which this model's weights are published.
        policy_version: the version of the weights that the model has at the start.
        policy_version_key: the entry of each reply that says which version computed it, an integer tensor
            with the batch size of the reply: a number for each row. ``None``: none does.
        swap_weights: fill new weights into a spare copy beside the forward passes, and let the parameters take over its
            memory between two of them: no pass waits for a copy, unless :meth:`update_weights` is given weights
            of another device or dtype. By default new weights are copied into the
            memory that the parameters have, as CUDA graphs and other code that knows its address need it.
        request_spec: an example of one row. Requests that are neither such a row, of its batch size ``[*size]``, nor
            any number of such rows, ``[n, *size]``, are refused with :class:`InvalidRequestError` where they are
            submitted. Without it, rows of any layout are taken that have no batch dimension.
        max_pending: most rows that may wait; beyond, :class:`ServerOverloadedError`. A request that has more rows than
            this is taken while no other waits.
        split_failed_batches: where the model raises on a batch, run its halves again, until only those
            requests fail that the model can't serve alone (at most two extra passes for each request). Switch
            it off for a model whose passes must not be repeated. A batch that fails is then run again in one case: a
            caller has given up meanwhile, so that its request may have been to blame; the others run once more
            without it.
        plan: where the model is a ``TensorDictModule``, a ``TensorDictSequential``, a probabilistic one, or one of
            torchrl's actors, run the functions that it is made of without what is around them: a pass is 2 to 50 us
            shorter. For the first batch of each layout both run, and are compared: the model's own output counts, and
            buffers and torch's generators are left as its call left them. A model that has changed attributes of
            its modules meanwhile, such as a counter, is not run again, and is called as it is if it goes on so; what it
            changes elsewhere changes twice. Where a model has hooks, anything else about it is unusual, or the two
            don't agree, it is called as it is. With ``False`` it always is. Hooks that are registered and modules that
            are replaced later are noticed; what else is set on a TensorDict module after the server was made is not.
        compile: hand the plan of the model, or else the model, to ``torch.compile``; a dictionary has its options, to
            which ``dynamic=False`` is added. The model runs a batch of every bucket before the server has started, so
            nothing is compiled later. That needs requests of one layout: ``request_spec``, or only
            :class:`ProcessSlotTransport` of one layout.
        bucket_sizes: the batch sizes that are computed, in ascending order; batches are padded to them, and the rows
            that were added never reach a reply. By default batches are padded only for ``compile`` and
            ``cuda_graphs``: to the powers of two below ``max_batch_size``, and to that.
        cuda_graphs: capture a CUDA graph for each bucket before the server has started, and replay it for each batch.
            Those for another exploration mode than the default one are captured when it is first asked for. A model
            that can't be captured is run without graphs, and the log says why. It needs the same as ``compile``.

    Raises:
        TypeError: an argument of the wrong type, or a module of tensors instead of TensorDicts; or both
            ``batch_timeout`` and ``timeout``.
        ValueError: not ``1 <= min_batch_size <= max_batch_size``, a negative ``batch_timeout``, ``max_pending < 1``;
            ``out_keys`` that the model neither reads nor writes; ``in_keys`` without ``out_keys``; ``bucket_sizes``
            that are not in ascending order, or whose largest is below ``max_batch_size``; ``compile``,
            ``bucket_sizes`` or ``cuda_graphs`` where the layout of requests is unknown, or has entries that are no
            tensors; ``cuda_graphs`` without a CUDA ``device``, or with ``swap_weights``; options of ``compile`` that
            make constants of the weights, or capture graphs too.
        RuntimeError: ``transport`` has a running server already; or ``torch.compile`` refuses its options.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        transport: InferenceTransport | Sequence[InferenceTransport],
        *,
        max_batch_size: int = 64,
        min_batch_size: int = 1,
        batch_timeout: float | None = None,
        timeout: float | None = None,
        batching: BatchingRule | None = None,
        collate_fn: CollateFn | None = None,
        device: torch.device | str | int | None = None,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
        output_device: torch.device | str | int | None = None,
        weight_sync: WeightSyncScheme | None = None,
        weight_sync_model_id: str = "policy",
        policy_version: int = 0,
        policy_version_key: str | None = "policy_version",
        swap_weights: bool = False,
        request_spec: TensorDictBase | None = None,
        max_pending: int | None = None,
        split_failed_batches: bool = True,
        plan: bool = True,
        compile: bool | Mapping[str, Any] = False,
        bucket_sizes: Sequence[int] | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        _check_model(model, in_keys, out_keys)
        _check_out_keys(model, out_keys, request_spec)
        self.transports = _transports(transport)
        if not isinstance(batching, BatchingRule | None):
            raise TypeError(f"batching must be a BatchingRule, got {batching!r}")
        if collate_fn is not None and not callable(collate_fn):
            raise TypeError(f"collate_fn must be callable, got {type(collate_fn).__qualname__}")
        if not isinstance(weight_sync, WeightSyncScheme | None):
            raise TypeError(f"weight_sync must be a WeightSyncScheme, got {type(weight_sync).__qualname__}")
        if not isinstance(plan, bool):
            raise TypeError(f"plan must be True or False, got {plan!r}")
        if not isinstance(cuda_graphs, bool):
            raise TypeError(f"cuda_graphs must be True or False, got {cuda_graphs!r}")
        if cuda_graphs and swap_weights:
            raise ValueError(
                "cuda_graphs=True needs swap_weights=False: a graph reads weights where they were when it was captured"
            )
        check_version(policy_version)
        if not isinstance(policy_version_key, str | None):
            raise TypeError(f"policy_version_key must be a string, got {policy_version_key!r}")
        self.model = model
        self.weight_sync = weight_sync
        self.weight_sync_model_id = weight_sync_model_id
        self.policy_version_key = policy_version_key
        self._limits = BatchLimits(max_batch_size, min_batch_size, _batch_timeout(batch_timeout, timeout))
        self._scheduler = BatchScheduler(self._limits, LearnedRule() if batching is None else batching)
        self._stats = StatsRecorder()
        self._request_spec = request_spec
        self._max_pending = max_pending
        sizes, warm_up, compile_function = None, None, compiler(compile, cuda_graphs=cuda_graphs)
        if compile_function is not None or cuda_graphs or bucket_sizes is not None:
            sizes = make_bucket_sizes(max_batch_size, bucket_sizes)
            warm_up = WarmUp(find_example(self.transports, request_spec), sizes, all_modes=not cuda_graphs)
        placement = place(device, output_device, sizes if cuda_graphs else None)
        self._updates = WeightUpdates(
            model,
            placement,
            scheme=weight_sync,
            model_id=weight_sync_model_id,
            version=policy_version,
            swap=swap_weights,
            stats=self._stats,
        )
        self._forward = ForwardPass(
            model,
            _choose_runner(
                model if in_keys is None else plan_function(model, in_keys, out_keys or ()),
                plan=plan,
                compile=compile_function,
                sizes=None if cuda_graphs else sizes,
            ),
            placement,
            collate_fn=collate_fn,
            out_keys=out_keys if in_keys is None else [key for key in out_keys or () if key != "_"],
            version_key=policy_version_key,
            version=partial(getattr, self._updates, "version"),
            split_failed_batches=split_failed_batches,
            look=lambda: self._queue.read(),
            warm_up=warm_up,
        )
        self._attached = [
            transport if isinstance(transport, Transport) else transport._aioinfer_transport
            for transport in self.transports
        ]
        # Any thread may call the public methods; the lock guards the model thread, the queue and the portal.
        self._lock = threading.RLock()
        self._model_thread: ModelThread | None = None
        self._task: asyncio.Task[None] | None = None
        self._portal: ExitStack | None = None
        self._process = os.getpid()
        self._queue = self._attach()  # last: the transports take requests from now on, under the terms set above

    # -- clients and figures ---------------------------------------------------------------------------

    @property
    def max_batch_size(self) -> int:
        """Most rows in one forward pass."""
        return self._limits.max_batch_size

    @property
    def address(self) -> str:
        """Where processes that nobody has given a client can get one: :func:`connect`.

        Raises:
            AttributeError: the callers of all transports live in this process.
        """
        for transport in self.transports:
            if isinstance(transport, ProcessTransport):
                return transport.address
        raise AttributeError(
            "the server has no address, since its callers live in this process; give it an MPTransport or a "
            "ProcessSlotTransport"
        )

    def stats(self, *, reset: bool = False) -> ServerStats:
        """What the server did since it was made; ``reset=True`` starts anew afterwards."""
        return self._stats.snapshot(
            pending=self._queue.pending(),
            version=self.policy_version,
            trainer=self._updates.connected,
            pass_seconds=self._scheduler.cost.seen(),
            think_times=self._scheduler.think_times(),
            reset=reset,
        )

    async def astats(self, *, reset: bool = False) -> ServerStats:
        """Do as :meth:`stats`, which does not block, for code that serves either kind of server."""
        return self.stats(reset=reset)

    def health(self) -> Health:
        """How the server is: ``alive`` is about its worker, ``ready`` about whether it takes requests."""
        thread, closed = self._model_thread, self._queue.admission.closed
        alive = self.is_alive
        starting = alive and closed is None and thread is not None and not thread.is_ready
        ready = alive and closed is None and not starting
        if ready:
            reason = ""
        elif starting:
            reason = "the server starts"
        elif thread is None and closed is None:
            reason = "the server was not started"
        else:
            reason = str(closed or "the server's worker has ended")
        return Health(
            alive=alive,
            ready=ready,
            pid=os.getpid(),
            policy_version=self.policy_version,
            pending=self._queue.pending(),
            reason=reason,
        )

    async def ahealth(self) -> Health:
        """Do as :meth:`health`, which does not block, for code that serves either kind of server."""
        return self.health()

    # -- weights ---------------------------------------------------------------------------------------

    @property
    def policy_version(self) -> int:
        """The version of the weights in use: how many updates were applied, or what the trainer calls them."""
        return self._updates.version

    def update_weights(self, weights: WeightsLike, *, version: int | None = None, cast: bool = False) -> None:
        """Serve other weights, from the next forward pass on; return when they are in use.

        Args:
            weights: a module, a TensorDict or a state dict. They are copied, as they are now.
            version: your own number for them; ``None`` counts up.
            cast: convert weights of another dtype than the model's, instead of refusing them.

        Raises:
            ServerNotRunningError: the server does not run.
            ValueError: ``version`` does not fit into 64 bits.
            TypeError: the model, or what was given, has no weights; or ``version`` is no integer.
            WeightSyncError: the weights don't fit; the old ones serve on.
            ServerClosedError: the server was shut down meanwhile.
        """
        job = self._load(weights, version, cast)
        try:
            job.result()
        except CancelledError:
            raise _closed_meanwhile() from None

    async def aupdate_weights(self, weights: WeightsLike, *, version: int | None = None, cast: bool = False) -> None:
        """Do as :meth:`update_weights`, without blocking the event loop while a forward pass runs.

        The copy is taken before it first suspends. If it is cancelled, the weights are used all the same.
        """
        job = self._load(weights, version, cast)
        done = asyncio.wrap_future(job)
        done.add_done_callback(lambda future: future.cancelled() or future.exception())  # if nobody awaits it any more
        await asyncio.wait([done])
        if done.cancelled():
            raise _closed_meanwhile()
        done.result()

    def paused(self, pending: PendingPolicy = "keep") -> Pause:
        """Run no forward pass inside a ``with`` block, or an ``async with`` block. Weights may be updated inside.

        Args:
            pending: what becomes of requests that are pending when it begins: ``"keep"`` lets them wait,
                ``"wait"`` serves them first, unless another pause is under way, ``"reject"`` fails them, and what
                is submitted inside too, with :class:`ServerPausedError`. With the others, what is submitted inside
                waits.

        To shut down inside with ``drain=True`` serves nothing, and takes its whole timeout.

        Raises:
            ServerNotRunningError: the server does not run.
            ServerClosedError: where the block is entered, it was shut down meanwhile.
            ValueError: ``pending`` is none of the three.
        """
        check_policy(pending)
        thread, pause = self._running(), object()
        return Pause(partial(thread.pause, pending, pause), partial(thread.resume, pause))

    def _load(self, weights: WeightsLike, version: int | None, cast: bool) -> Future[None]:
        check_version(version)
        thread = self._running()
        return thread.submit(partial(self._updates.load, self._updates.copy(weights), version, cast=cast))

    # -- start and end, in a running event loop --------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        """Whether the server's worker runs. It may outlive a ``shutdown`` that did not wait for it."""
        thread = self._model_thread
        return thread is not None and thread.is_alive() and self._process == os.getpid()

    async def aclose(self, timeout: float | None = 5.0, *, drain: bool = False) -> None:  # noqa: ASYNC109 - as shutdown
        """Shut down without blocking the event loop; see :meth:`shutdown`.

        If it is cancelled, the server shuts down all the same and nobody waits for its worker.
        """
        if self._process != os.getpid():
            return
        thread, task, error = self._model_thread, self._task, _closed()
        if thread is not None and thread.is_alive():
            thread.refuse(error)
        # In a thread of its own: those of a pool may all be callers that wait for this server.
        ending = run_in_thread(lambda: self.shutdown(timeout, drain=drain), "aioinfer-shutdown")
        try:
            await asyncio.wrap_future(ending)
        except asyncio.CancelledError:
            if thread is not None:
                run_in_thread(lambda: thread.terminate(error), "aioinfer-terminate")
            raise
        if task is not None and task.get_loop() is asyncio.get_running_loop() and not self.is_alive:
            await asyncio.wait([task])

    async def _astart(self) -> Self:
        thread, ready = self._start_thread()
        self._task = asyncio.get_running_loop().create_task(self._supervise(thread), name="aioinfer-server")
        try:
            await asyncio.wrap_future(ready)
            if (error := self._shut_down_with()) is not None:
                raise clone_exception(error)
        except BaseException:
            await self.aclose(0.0 if thread.is_terminated else 5.0)
            raise
        return self

    async def _supervise(self, thread: ModelThread) -> None:
        """The server's task: it ends with the model thread, or ends it when its event loop goes down first."""
        create_task = asyncio.get_running_loop().create_task
        running = [
            create_task(_keep_running("a transport's task", transport.serve), name="aioinfer-transport")
            for transport in self._attached
        ]
        running.append(create_task(_keep_running("reading requests", self._queue.serve), name="aioinfer-queue"))
        receive = partial(self._updates.follow, thread.submit)
        running.append(create_task(_keep_running("receiving weights", receive), name="aioinfer-weights"))
        try:
            await asyncio.shield(asyncio.wrap_future(thread.ended))
        finally:
            thread.close(_closed(), drain=False)
            for task in running:
                task.cancel()
            await asyncio.wait(running)

    # -- start and end, in a background thread ---------------------------------------------------------

    def start(self) -> Self:
        """Start the server on an event loop in a background thread.

        Raises:
            RuntimeError: it runs already, or its last worker has not ended yet.
            ServerClosedError: it was shut down meanwhile.
            ModelError: the warm-up raised what no caller can be given as it is; other errors of it are raised as such.
        """
        with ExitStack() as host:
            portal = host.enter_context(start_blocking_portal(name="aioinfer-loop"))
            portal.call(self._astart)
            self._portal = host.pop_all()
        atexit.register(self.shutdown, 1.0)
        return self

    def shutdown(self, timeout: float | None = 5.0, *, drain: bool = False) -> None:
        """Refuse new requests, fail or serve the pending ones, and end the worker. Idempotent.

        In a forked child of the process that made the server nothing happens.

        The batch that the model works on is finished and answered. Where that takes longer than ``timeout``,
        its requests are failed too, and the worker ends, unnoticed, when the model returns.

        A signal handler may call it, with a ``timeout``: a call that the handler has interrupted may have to go on
        before the worker can end.

        Args:
            timeout: seconds to wait for the worker; ``None`` waits for ever.
            drain: serve the pending requests first, as far as ``timeout`` allows; by default they fail with
                :class:`ServerClosedError` at once. While the server is paused none is served, so the timeout passes.
        """
        if self._process != os.getpid():  # a forked child, which has none of the server's threads
            return
        error = _closed()
        if not self._close_thread(error, drain=drain) and not self._queue.released:
            self._queue.detach(error)
            self._close_thread(error, drain=drain)  # one that was started meanwhile has not seen it
        thread = self._model_thread
        if thread is not None and not thread.join(timeout):
            thread.terminate(error)
        with self._lock:
            portal, self._portal = self._portal, None
        if portal is not None:
            portal.close()
        atexit.unregister(self.shutdown)

    # -- the model thread ------------------------------------------------------------------------------

    def _attach(self) -> RequestQueue:
        admission = Admission(
            self._request_spec,
            self._max_pending,
            self._stats,
            self.policy_version_key,
            empty_reply=self._forward.empty_reply,
        )
        several = sum(isinstance(transport, ProcessTransport) for transport in self._attached) > 1
        queue = RequestQueue(admission, self.max_batch_size, Selector() if several else None)
        queue.attach(self._attached)
        return queue

    def _start_thread(self) -> tuple[ModelThread, Future[None]]:
        with self._lock:
            if self.is_alive:
                raise RuntimeError("the server runs already, or its worker has not ended since the last shutdown")
            if self._queue.admission.closed is not None or self._queue.released:
                self._queue = self._attach()
            self._updates.open()
            thread = ModelThread(self._queue, self._scheduler, self._forward, self._stats, self._updates.release)
            ready = thread.start()
            self._process, self._model_thread = os.getpid(), thread
            if (error := self._shut_down_with()) is not None:  # by one that found no thread yet
                thread.close(error, drain=False)
            return thread, ready

    def _shut_down_with(self) -> ServerClosedError | None:
        """The error of a shutdown since the last start; a worker that died has left one with a cause instead."""
        error = self._queue.admission.closed
        return error if error is not None and error.__cause__ is None else None

    def _running(self) -> ModelThread:
        thread = self._model_thread
        if thread is None or not self.is_alive:
            raise ServerNotRunningError("the server does not run; start it first")
        return thread

    def _close_thread(self, error: ServerClosedError, *, drain: bool) -> bool:
        thread = self._model_thread
        if thread is None or not thread.is_alive():
            return False
        thread.close(error, drain=drain)
        return True


def _check_model(model: Any, in_keys: Any, out_keys: Any) -> None:
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__qualname__}")
    if in_keys is not None:
        if isinstance(in_keys, str) or not isinstance(in_keys, Sequence):
            raise TypeError(f"in_keys must be a sequence of keys, got {in_keys!r}")
        if isinstance(model, TensorDictModuleBase):
            raise TypeError("in_keys are for a model that takes tensors; a TensorDict module has its own")
        if not in_keys or not out_keys or set(out_keys) == {"_"}:
            raise ValueError(f"a model that takes tensors needs in_keys and out_keys, got {in_keys!r} and {out_keys!r}")
        return
    inner = model
    while isinstance(inner, nn.Sequential) and not isinstance(inner, TensorDictModuleBase) and len(inner):
        inner = inner[0]
    if type(inner).__module__.startswith("torch.nn.modules") and not isinstance(inner, nn.Sequential):
        raise TypeError(
            f"model must take a TensorDict, and {type(model).__qualname__} takes tensors; name them: "
            'InferenceServer(model, transport, in_keys=["observation"], out_keys=["action"])'
        )


def _choose_runner(model: Runner, *, plan: bool, compile: Compile | None, sizes: Sequence[int] | None) -> Runner:
    """What a pass calls: the model, or what does the same faster.

    Args:
        model: as given; or the plan of one that takes tensors.
        plan: whether to plan a policy.
        compile: compiles a function; ``None``: nothing is compiled.
        sizes: to which batches are padded; ``None``: they are not.
    """
    run: Runner
    if isinstance(model, Plan):
        run = model if compile is None else model.compiled(compile)
    elif compile is None:
        run = make_runner(model) if plan else model
    else:
        planned = plan_policy(model) if plan else None
        run = compile(model) if planned is None else CompiledPlan(model, planned, compile)
    return run if sizes is None else PaddedRunner(run, sizes)


def find_example(transports: Sequence[InferenceTransport], request_spec: TensorDictBase | None) -> TensorDictBase:
    """A row of every request, for code that is made for it before one comes.

    Raises:
        TypeError: ``request_spec`` is no TensorDict.
        ValueError: there is none, and the transports take requests of other layouts than one; or it has an entry that
            is no tensor.
    """
    layouts = [one.request_layout if isinstance(one, ProcessSlotTransport) else None for one in transports]
    first = layouts[0]
    if request_spec is not None:
        example = request_spec
    elif first is None or any(other is None or other.signature() != first.signature() for other in layouts):
        raise ValueError(
            "compile, bucket_sizes and cuda_graphs need requests of one layout: give request_spec, an example of one "
            'row, such as TensorDict({"observation": torch.zeros(4)})'
        )
    else:
        example = first.example()
    if not isinstance(example, TensorDictBase):
        raise TypeError(f"request_spec must be a TensorDict, got {type(example).__qualname__}")
    BatchLayout(example.unsqueeze(0), None)
    return example


def _check_out_keys(model: Any, out_keys: Sequence[NestedKey] | None, request_spec: TensorDictBase | None) -> None:
    if out_keys is not None and (isinstance(out_keys, str) or not isinstance(out_keys, Sequence)):
        raise TypeError(f"out_keys must be a sequence of keys, got {out_keys!r}")
    if not out_keys or not isinstance(model, TensorDictModuleBase) or not model.out_keys:
        return
    known = {*model.out_keys, *model.in_keys}
    if isinstance(request_spec, TensorDictBase):
        known |= set(request_spec.keys(include_nested=True))
    tops = {key if isinstance(key, str) else key[0] for key in known}
    if unknown := [key for key in out_keys if key not in known and key not in tops]:
        raise ValueError(
            f"out_keys has {unknown}, which the model does not write; it writes {list(model.out_keys)} (an entry of "
            "the request that passes through must be in the model's in_keys, or in request_spec)"
        )


def _batch_timeout(batch_timeout: float | None, timeout: float | None) -> float:
    if batch_timeout is not None and timeout is not None:
        raise TypeError(
            "timeout and batch_timeout are two names for one argument; give one of them, "
            f"got timeout={timeout!r} and batch_timeout={batch_timeout!r}"
        )
    given = timeout if batch_timeout is None else batch_timeout
    return 0.01 if given is None else given


def _transports(transport: Any) -> list[InferenceTransport]:
    transports = list(transport) if isinstance(transport, (list, tuple)) else [transport]
    for one in transports:
        if not isinstance(one, InferenceTransport):
            raise TypeError(
                "transport must be an InferenceTransport, such as ThreadingTransport(), or a list of them, "
                f"got {one!r:.80}"
            )
    if not transports or len(set(map(id, transports))) < len(transports):
        raise ValueError("expected at least one transport, and none twice")
    return transports


async def _keep_running(what: str, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a background task of the server until it returns; if it fails, log the error and run it again."""
    pause = _FIRST_RETRY
    while True:
        try:
            await run()
        except (Exception, SystemExit):  # descriptors that have run out, or what unpickling has run
            _log.exception("%s failed; trying again in %g s", what, pause)
        else:
            return
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LAST_RETRY)


def _closed() -> ServerClosedError:
    return ServerClosedError("the server is shut down")


def _closed_meanwhile() -> ServerClosedError:
    return ServerClosedError("the server was shut down before the new weights were in use")
