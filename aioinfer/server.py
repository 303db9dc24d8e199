"""The batching server: takes a model and a transport, and lives on an event loop."""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import anyio.to_thread
import torch
from anyio.from_thread import start_blocking_portal
from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from aioinfer.batching import BatchRule
from aioinfer.client import AsyncInferenceClient, InferenceClient
from aioinfer.devices import Model, place
from aioinfer.errors import ServerClosedError
from aioinfer.forward import CollateFn, ForwardPass
from aioinfer.stats import ServerStats, StatsRecorder
from aioinfer.transports.admission import Admission
from aioinfer.transports.base import InferenceTransport
from aioinfer.worker import Worker

__all__ = ["InferenceServer"]


class InferenceServer:
    """Serves one model to many callers at once, in batches.

    Embed it in a running event loop with ``async with server:`` (and ``await server.aclose()``), or host
    it from code that has no loop with ``with server:`` or ``server.start()`` / ``server.shutdown()``.
    Requests that are submitted before it starts wait for it.

    Args:
        model: any callable from a batched TensorDict ``[B]`` to a batched TensorDict ``[B]``. It runs on
            one thread of the server's own, under ``torch.no_grad``; its ``train``/``eval`` mode is left alone.
        transport: how requests and replies travel.
        max_batch_size: most requests in one forward pass.
        min_batch_size: after the first request arrived, gather until this many are there, or
            ``timeout`` passes. 1 dispatches at once; while the model is busy, requests gather anyway.
        timeout: seconds a partial batch may wait.
        collate_fn: list of request TensorDicts to a batched TensorDict, whatever their layouts. The default
            stacks requests of like layout, and runs those of unlike layout apart.
        device: where batches are moved, and the model at the start; ``None`` moves nothing.
        out_keys: the entries that replies have. By default the ``out_keys`` of the model if it is a TensorDict
            module, so that requests are not sent back; all that it returns if it is another callable.
        output_device: where replies are moved. By default back to where the requests were, if
            ``device`` is given.
        weight_sync: receives weights from a trainer. Not there yet: only ``None`` is accepted.
        weight_sync_model_id: the name under which this model's weights are published.
        request_spec: an example of a request. Others are refused with :class:`InvalidRequestError`
            where they are submitted. Without it, requests of any layout are taken that have no batch dimension.
        max_pending: most requests that may wait; beyond, :class:`ServerOverloadedError`.
        split_failed_batches: where the model raises on a batch, run its halves again, until only those
            requests fail that the model can't serve alone (at most two extra passes for each request). Switch
            it off for a model whose passes must not be repeated.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: not ``1 <= min_batch_size <= max_batch_size``, a negative ``timeout``, ``max_pending < 1``.
        RuntimeError: ``transport`` has a running server already.
    """

    def __init__(
        self,
        model: Model,
        transport: InferenceTransport,
        *,
        max_batch_size: int = 64,
        min_batch_size: int = 1,
        timeout: float = 0.01,
        collate_fn: CollateFn | None = None,
        device: torch.device | str | int | None = None,
        out_keys: Sequence[NestedKey] | None = None,
        output_device: torch.device | str | int | None = None,
        weight_sync: Any = None,
        weight_sync_model_id: str = "policy",
        request_spec: TensorDictBase | None = None,
        max_pending: int | None = None,
        split_failed_batches: bool = True,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable, got {type(model).__qualname__}")
        if not isinstance(transport, InferenceTransport):
            raise TypeError(f"transport must be an InferenceTransport, got {type(transport).__qualname__}")
        if collate_fn is not None and not callable(collate_fn):
            raise TypeError(f"collate_fn must be callable, got {type(collate_fn).__qualname__}")
        if weight_sync is not None:
            raise NotImplementedError("weight_sync is not supported yet; pass None")
        self.model = model
        self.transport = transport
        self.weight_sync_model_id = weight_sync_model_id
        self._rule = BatchRule(max_batch_size, min_batch_size, timeout)
        self._stats = StatsRecorder()
        self._request_spec = request_spec
        self._max_pending = max_pending
        self._forward = ForwardPass(
            model,
            place(device, output_device),
            collate_fn=collate_fn,
            out_keys=out_keys,
            split_failed_batches=split_failed_batches,
        )
        self._lock = threading.Lock()  # guards the attributes below
        self._worker: Worker | None = None
        self._task: asyncio.Task[None] | None = None
        self._host: ExitStack | None = None
        self._admission = self._open_transport()

    # -- clients and figures ---------------------------------------------------------------------------

    def client(self) -> InferenceClient:
        """Make a client for a plain thread: ``transport.client()``."""
        return self.transport.client()

    def async_client(self) -> AsyncInferenceClient:
        """Make a client for coroutines: ``transport.async_client()``."""
        return self.transport.async_client()

    @property
    def is_alive(self) -> bool:
        """Whether the server's worker runs. It may outlive a ``shutdown`` that did not wait for it."""
        worker = self._worker
        return worker is not None and worker.is_alive()

    def stats(self, *, reset: bool = False) -> ServerStats:
        """What the server did since it was made; ``reset=True`` starts anew afterwards."""
        return self._stats.snapshot(pending=self.transport.pending(), reset=reset)

    # -- in a running event loop -----------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self, timeout: float | None = 5.0, *, drain: bool = False) -> None:  # noqa: ASYNC109 - as shutdown
        """Shut down without blocking the event loop; see :meth:`shutdown`.

        If it is cancelled, the server shuts down all the same and nobody waits for its worker.
        """
        if self._host is not None:
            await anyio.to_thread.run_sync(lambda: self.shutdown(timeout, drain=drain))
            return
        error = self._refuse(drain)
        worker, task = self._worker, self._task
        if worker is None:
            return
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(asyncio.wrap_future(worker.ended))
        except TimeoutError:
            pass
        finally:
            worker.abandon(error)
        if worker.ended.done():
            worker.join(None)  # of the thread, no more than its return is left
            if task is not None and task.get_loop() is asyncio.get_running_loop():
                await asyncio.wait([task])

    async def _open(self) -> None:
        worker, opened = self._start_worker()
        self._task = asyncio.get_running_loop().create_task(self._live(worker), name="aioinfer-server")
        try:
            await asyncio.wrap_future(opened)
        except BaseException:
            await self.aclose()
            raise

    async def _live(self, worker: Worker) -> None:
        """The server's task: it ends with the worker, or ends it when its event loop goes down first."""
        try:
            await asyncio.shield(asyncio.wrap_future(worker.ended))
        finally:
            worker.close(_closed(), drain=False)

    # -- hosted in a background thread -----------------------------------------------------------------

    def start(self) -> Self:
        """Start the server on an event loop in a background thread.

        Raises:
            RuntimeError: it runs already, or its last worker has not ended yet.
        """
        with ExitStack() as host:
            portal = host.enter_context(start_blocking_portal(name="aioinfer-loop"))
            portal.call(self._open)
            self._host = host.pop_all()
        atexit.register(self.shutdown, 1.0)
        return self

    def shutdown(self, timeout: float | None = 5.0, *, drain: bool = False) -> None:
        """Refuse new requests, fail or serve the pending ones, and end the worker. Idempotent.

        The batch that the model works on is finished and answered. Where that takes longer than ``timeout``,
        its requests are failed too, and the worker ends, unnoticed, when the model returns.

        Args:
            timeout: seconds to wait for the worker; ``None`` waits for ever.
            drain: serve the pending requests first, as far as ``timeout`` allows; by default they fail with
                :class:`ServerClosedError` at once.
        """
        atexit.unregister(self.shutdown)
        error = self._refuse(drain)
        worker = self._worker
        if worker is not None and not worker.join(timeout):
            worker.abandon(error)
        with self._lock:
            host, self._host = self._host, None
        if host is not None:
            host.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    # -- both ------------------------------------------------------------------------------------------

    def _open_transport(self) -> Admission:
        admission = Admission(self._request_spec, self._max_pending, self._stats)
        self.transport.open(admission)
        return admission

    def _start_worker(self) -> tuple[Worker, Any]:
        with self._lock:
            if self.is_alive:
                raise RuntimeError("the server runs already, or its worker has not ended since the last shutdown")
            if self._admission.closed is not None or self._admission.superseded:
                self._admission = self._open_transport()
            self._worker = Worker(self.transport, self._admission, self._rule, self._forward, self._stats)
            return self._worker, self._worker.start()

    def _refuse(self, drain: bool) -> ServerClosedError:
        error = _closed()
        if self._worker is not None and self._worker.is_alive():
            self._worker.close(error, drain=drain)
        elif not self._admission.superseded:
            self.transport.finish(error)
        return error


def _closed() -> ServerClosedError:
    return ServerClosedError("the server is shut down; it serves again after start()")
