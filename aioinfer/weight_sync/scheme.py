"""The interface of every scheme of weight synchronisation, for the trainer and for the workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from torch import nn

from aioinfer.weight_sync.receiver import Receiver
from aioinfer.weight_sync.sender import DeviceMapFn, Work
from aioinfer.weight_sync.weights import Strategy, WeightsLike

__all__ = ["WeightSyncScheme"]


class WeightSyncScheme(ABC):
    """Sends the weights of one model from a trainer to any number of workers (servers, collectors).

    A scheme starts in two phases. First ``init_on_sender`` in the trainer assigns weights to workers, and
    ``init_on_receiver`` in each worker names the model to update. Then both sides ``connect``, in any order, and the
    trainer may ``send``. The scheme is handed to the other processes as they start, by fork or pickled; each process
    calls the methods of its side.

    Published weights are a copy: the trainer may change its parameters afterwards, and no worker sees the change before
    the next ``send``. A worker applies all of an update or nothing.

    ``async`` in a name means that the call returns before the workers have applied the weights, as in ``send_async``.
    Coroutines have the prefix ``a``: ``asend`` is ``send``, and ``await_async`` is ``wait_async``.

    Args:
        strategy: ``"tensordict"`` takes every parameter and buffer of a module, ``"state_dict"`` those in its
            ``state_dict()``. Both take the extra states of modules.
        sync: whether ``send`` returns when the workers have applied the weights, or at once.

    Attributes:
        cast: whether workers convert weights of another dtype than their model's, instead of refusing them.

    Raises:
        ValueError: another strategy.
    """

    shares_memory: ClassVar[bool] = False
    """Whether a worker may go on reading the trainer's memory after it has applied weights."""

    def __init__(self, strategy: Strategy = "tensordict", sync: bool = True) -> None:
        if strategy not in ("tensordict", "state_dict"):
            raise ValueError(f'strategy must be "tensordict" or "state_dict", got {strategy!r}')
        self.strategy: Strategy = strategy
        self.sync = sync
        self.cast = False

    # -- the trainer -----------------------------------------------------------------------------------

    @abstractmethod
    def init_on_sender(
        self,
        *,
        model_id: str | None = None,
        context: Any = None,
        weights: WeightsLike | None = None,
        model: nn.Module | None = None,
        params_map: Mapping[int, WeightsLike] | None = None,
        devices: Sequence[torch.device | str | int] | None = None,
        device_map_fn: DeviceMapFn | None = None,
        num_workers: int | None = None,
        ctx: Any = None,
    ) -> None:
        """Assign weights to workers. Copies are made later, by each ``send``.

        There are three ways, which don't mix: ``params_map``; ``weights`` or ``model``, with ``devices``; and
        ``weights`` or ``model``, with ``device_map_fn`` and ``num_workers``. With ``num_workers`` alone, or without
        any of these, all workers get the same weights.

        Args:
            model_id: the name under which the weights are published; ``None`` is ``"policy"``.
            context: an object that has the model: its ``get_model(model_id)``, or its attribute of this name, which
                may be dotted. It may have ``num_workers``.
            weights: a module, a TensorDict or a state dict, which ``send`` publishes if it is given no weights. Each
                ``send`` reads it anew.
            model: the same as ``weights``.
            params_map: for each worker, by index, its weights.
            devices: for each worker, the device on which it gets the weights if it has no model to load them into.
            device_map_fn: makes the weights of a worker from its index and the trainer's weights.
            num_workers: the number of workers.
            ctx: a multiprocessing context, accepted for compatibility; schemes use none.

        Raises:
            ValueError: ways are mixed, or none is given, or the numbers of workers differ.
        """

    def send(
        self,
        weights: WeightsLike | None = None,
        worker_ids: int | Sequence[int] | None = None,
        *,
        version: int | None = None,
    ) -> None:
        """Publish weights as they are now. Always returns.

        With ``sync``, the call returns when the workers have applied the weights. Without, it returns at once; a worker
        that falls behind applies the newest weights and skips the others.

        Args:
            weights: a module, a TensorDict or a state dict; ``None``: those of ``init_on_sender``.
            worker_ids: one worker or several; ``None``: all workers, except those that have shut down.
            version: your own number for these weights. By default servers count the updates that they apply.

        Raises:
            RuntimeError: before ``init_on_sender`` or ``connect``, or in a process that was forked from the trainer; in
                a signal handler that has interrupted another call of the scheme; or the scheme is shut down meanwhile.
            TypeError: ``weights`` is none of these, or has entries that can't be copied byte by byte: sparse,
                quantized, conjugate, without values. ``version`` is no ``int``. Nothing was published.
            ValueError: an unknown worker, or one that is named twice, or a ``version`` that does not fit into 64 bits.
            WeightSyncError: with ``sync``, it names the workers that refused the weights, died, or did not answer
                in time, in its ``failures`` too. The others have applied them.
        """
        work = self._publish(weights, worker_ids, version, sequential=self.sync)
        if self.sync:
            self._wait(work)

    async def asend(
        self,
        weights: WeightsLike | None = None,
        worker_ids: int | Sequence[int] | None = None,
        *,
        version: int | None = None,
    ) -> None:
        """Do as :meth:`send`, without blocking the event loop while the workers apply the weights.

        The copy is taken before it first suspends. If it is cancelled, the weights are published all the same.
        """
        work = self._publish(weights, worker_ids, version)
        if self.sync:
            await self._async_wait(work)

    def send_async(
        self,
        weights: WeightsLike | None = None,
        worker_ids: int | Sequence[int] | None = None,
        *,
        version: int | None = None,
    ) -> None:
        """Publish weights as they are now, and return at once; :meth:`wait_async` waits for the workers."""
        work = self._publish(weights, worker_ids, version)
        self._pending().append(work)

    def wait_async(self) -> None:
        """Block until the workers have applied the weights that :meth:`send_async` has published.

        Raises:
            WeightSyncError: as for :meth:`send`.
        """
        for work in tuple(self._pending()):
            try:
                self._wait(work)
            finally:
                self._forget_finished(work)

    async def await_async(self) -> None:
        """Do as :meth:`wait_async`, without blocking the event loop. If it is cancelled, it may be called again."""
        for work in tuple(self._pending()):
            try:
                await self._async_wait(work)
            finally:
                self._forget_finished(work)

    def _forget_finished(self, work: Work) -> None:
        if not work.pending:
            with suppress(ValueError):  # another waiting thread has removed it
                self._pending().remove(work)

    @abstractmethod
    def _publish(
        self,
        weights: WeightsLike | None,
        worker_ids: int | Sequence[int] | None,
        version: int | None,
        *,
        sequential: bool = False,
        timeout: float | None = None,
    ) -> Work:
        """Publish weights as they are now; for ``sequential`` and ``timeout`` see ``Sender.publish``."""

    @abstractmethod
    def _wait(self, work: Work) -> None:
        """Block until the workers have applied the weights, or raise :class:`WeightSyncError`."""

    @abstractmethod
    async def _async_wait(self, work: Work) -> None:
        """Do as :meth:`_wait`, without blocking the event loop."""

    @abstractmethod
    def _pending(self) -> list[Work]:
        """The work that ``send_async`` has started and no call has waited for."""

    # -- the worker ------------------------------------------------------------------------------------

    @abstractmethod
    def init_on_receiver(
        self,
        *,
        model_id: str,
        context: Any = None,
        worker_idx: int | None = None,
        model: nn.Module | TensorDictBase | None = None,
    ) -> None:
        """Name this worker and the model to update. An ``InferenceServer`` needs no such call.

        Args:
            model_id: the name under which the weights are published.
            context: an object that has the model, as for :meth:`init_on_sender`. It may have ``worker_idx``.
            worker_idx: the worker's index; ``None`` where there is only one, or the scheme was made by ``for_worker``.
            model: the model to update; ``None``: :meth:`receive` only returns the weights.

        Raises:
            ValueError: the sender has not registered the worker, or no worker is named and there are several.
        """

    @abstractmethod
    def receive(self, timeout: float | None = None) -> WeightsLike | None:
        """Apply the newest weights that have come.

        Args:
            timeout: seconds to wait for weights; ``None``: the scheme's timeout.

        Returns:
            The weights in use now, as a TensorDict or a state dict; ``None`` if none came.

        Raises:
            RuntimeError: before ``init_on_receiver`` or ``connect``.
            WeightSyncError: the weights don't fit the model, which keeps the ones it had. The sender is told too.
            ValueError: another object came.
        """

    @abstractmethod
    def open_receiver(self, model_id: str, *, thread: int) -> Receiver | None:
        """Make the receiver of a server, which waits for weights itself; ``None`` if the scheme sends nothing.

        Args:
            model_id: the name under which the server's weights are published.
            thread: the thread of the server's event loop.

        Raises:
            ValueError: there are several workers, and none was named.
        """

    # -- both ------------------------------------------------------------------------------------------

    @abstractmethod
    def connect(
        self, worker_idx: int | None = None, *, version: int | None = None, timeout: float | None = None
    ) -> None:
        """Send, or receive and apply, the first weights.

        Without a ``timeout``, the trainer does not wait for workers that have not connected yet: they find the weights
        when they connect. With ``sync`` it waits until the connected workers have applied them. A worker waits for the
        trainer.

        Args:
            worker_idx: in the trainer, one worker to connect to; in a worker, its index.
            version: in the trainer, your own number for these weights, as for :meth:`send`.
            timeout: in the trainer, seconds to wait until all workers have connected and applied the weights; in a
                worker, seconds to wait for weights, by default the scheme's timeout.

        Raises:
            RuntimeError: before ``init_on_sender`` or ``init_on_receiver``, or in a process that was forked from the
                trainer.
            TypeError: as for :meth:`send`.
            ValueError: an unknown worker, or a ``version`` that does not fit into 64 bits.
            TimeoutError: in a worker, no weights came in time; ``connect`` may be called again.
            WeightSyncError: weights were refused; or, with a ``timeout``, a worker has not connected or not answered.
        """

    @abstractmethod
    def shutdown(self) -> None:
        """End this process's side, and release its queues. Other processes are not affected. Idempotent.

        A call that waits in another thread ends with an error. A signal handler may call it at any moment.
        """
