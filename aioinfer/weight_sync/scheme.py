"""What every scheme of weight synchronisation offers, to the trainer and to the workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, TypeAlias

import torch
from tensordict import TensorDictBase
from torch import nn

from aioinfer.weight_sync.peers import Delivery
from aioinfer.weight_sync.receiver import Receiver
from aioinfer.weight_sync.weights import Strategy, WeightsLike, check_strategy

__all__ = ["DeviceMapFn", "WeightSyncScheme"]

DeviceMapFn: TypeAlias = Callable[[int, TensorDictBase], WeightsLike]


class WeightSyncScheme(ABC):
    """How the weights of one model travel from a trainer to any number of workers (servers, collectors).

    It starts in two phases: ``init_on_sender`` in the trainer says who gets what, ``init_on_receiver`` in each worker
    names the model to update; then both ``connect``, in any order, and the trainer may ``send``. One object is
    handed to the other processes as they start, by fork or pickled; each of them plays its own part.

    What is published is a copy: whatever the trainer does to its parameters afterwards, no worker sees it before the
    next ``send``. A worker applies all of an update or nothing.

    ``async`` in a name means that the call returns before the workers have applied the weights, as in ``send_async``.
    What is awaited has the prefix ``a``: ``asend`` is ``send``, and ``await_async`` is ``wait_async``.

    Args:
        strategy: ``"tensordict"`` takes every parameter and buffer of a module, ``"state_dict"`` what its
            ``state_dict()`` has. Both take the extra states of modules.
        sync: whether ``send`` returns when the workers have applied the weights, or at once.

    Attributes:
        cast: whether workers convert weights of another dtype than their model's, instead of refusing them.

    Raises:
        ValueError: another strategy.
    """

    lends: ClassVar[bool] = False
    """Whether a worker may go on reading the trainer's memory after it has applied weights."""

    def __init__(self, strategy: Strategy = "tensordict", sync: bool = True) -> None:
        check_strategy(strategy)
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
        """Store who gets which weights; copies are made later, on demand.

        There are three ways to say it, which don't mix: ``params_map``; ``weights`` or ``model``, with ``devices``;
        and ``weights`` or ``model``, with ``device_map_fn`` and ``num_workers``. With ``num_workers`` alone, or
        nothing, all workers get the same.

        Args:
            model_id: the name under which the weights are published; ``None`` is ``"policy"``.
            context: an object that has the model: its ``get_model(model_id)``, or its attribute of this name, which
                may be dotted. It may have ``num_workers``.
            weights: what is published where ``send`` is given nothing: a module, a TensorDict or a state dict. It is
                read anew each time.
            model: the same; modules are mostly named so.
            params_map: for each worker, by index, its weights.
            devices: for each worker, where it gets the weights if it has no model to load them into.
            device_map_fn: makes the weights of a worker, given its index and those of the trainer.
            num_workers: how many workers there are.
            ctx: a multiprocessing context. Any works; it is taken for those who name one.

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
        """Publish weights as they are now. It always returns.

        With ``sync``, it returns when the workers have applied them. Without, it returns at once; a worker that
        falls behind applies the newest and skips the rest.

        Args:
            weights: a module, a TensorDict or a state dict; ``None``: what ``init_on_sender`` was given.
            worker_ids: one worker or several; ``None``: all but those that have shut down.
            version: your own number for these weights. By default servers count the updates that they apply.

        Raises:
            RuntimeError: before ``init_on_sender`` or ``connect``, or in a process that was forked from the trainer; in
                a signal handler that has interrupted another call of the scheme; or the scheme is shut down meanwhile.
            TypeError: ``weights`` is none of these, or has entries that can't be copied as they are: sparse, quantized,
                conjugate, without values. ``version`` is no ``int``. Nothing was published.
            ValueError: an unknown worker, or one that is named twice, or a ``version`` that does not fit into 64 bits.
            WeightSyncError: with ``sync``, it names the workers that refused the weights, died, or did not answer
                in time, in its ``failures`` too. The others have applied them.
        """
        delivery = self._publish(weights, worker_ids, version, in_turn=self.sync)
        if self.sync:
            self._wait(delivery)

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
        delivery = self._publish(weights, worker_ids, version)
        if self.sync:
            await self._await(delivery)

    def send_async(
        self,
        weights: WeightsLike | None = None,
        worker_ids: int | Sequence[int] | None = None,
        *,
        version: int | None = None,
    ) -> None:
        """Publish weights as they are now, and return at once; :meth:`wait_async` waits for the workers."""
        delivery = self._publish(weights, worker_ids, version)
        self._unawaited().append(delivery)

    def wait_async(self) -> None:
        """Block until the workers have applied what :meth:`send_async` has published.

        Raises:
            WeightSyncError: as for :meth:`send`.
        """
        for delivery in tuple(self._unawaited()):
            try:
                self._wait(delivery)
            finally:
                self._forget_answered(delivery)

    async def await_async(self) -> None:
        """Do as :meth:`wait_async`, without blocking the event loop. If it is cancelled, it may be called again."""
        for delivery in tuple(self._unawaited()):
            try:
                await self._await(delivery)
            finally:
                self._forget_answered(delivery)

    def _forget_answered(self, delivery: Delivery) -> None:
        if not delivery.waiting:
            with suppress(ValueError):  # another thread that waits has
                self._unawaited().remove(delivery)

    @abstractmethod
    def _publish(
        self,
        weights: WeightsLike | None,
        worker_ids: int | Sequence[int] | None,
        version: int | None,
        *,
        in_turn: bool = False,
        patience: float | None = None,
    ) -> Delivery:
        """Publish weights as they are now; for ``in_turn`` and ``patience`` see ``Sender.publish``."""

    @abstractmethod
    def _wait(self, delivery: Delivery) -> None:
        """Block until the workers have applied it, or raise :class:`WeightSyncError`."""

    @abstractmethod
    async def _await(self, delivery: Delivery) -> None:
        """Do as :meth:`_wait`, without blocking the event loop."""

    @abstractmethod
    def _unawaited(self) -> list[Delivery]:
        """What ``send_async`` has published and nobody has waited for."""

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
        """Say which worker this is, and what to update. An ``InferenceServer`` does it by itself.

        Args:
            model_id: the name under which the weights are published.
            context: an object that has the model, as for :meth:`init_on_sender`. It may have ``worker_idx``.
            worker_idx: the worker's index; ``None`` where there is only one, or the scheme was made by ``for_worker``.
            model: what is updated; ``None``: weights are only handed out by :meth:`receive`.

        Raises:
            ValueError: a worker that the sender has not registered, or none where there are several.
        """

    @abstractmethod
    def receive(self, timeout: float | None = None) -> WeightsLike | None:
        """Apply the newest weights that have come.

        Args:
            timeout: seconds to wait for them; ``None``: as many as the scheme waits for an answer.

        Returns:
            The weights in use now, as a TensorDict or a state dict; ``None`` if none came.

        Raises:
            RuntimeError: before ``init_on_receiver`` or ``connect``.
            WeightSyncError: they don't fit the model, which keeps what it had. The sender is told too.
            ValueError: something else came.
        """

    @abstractmethod
    def open_receiver(self, model_id: str, *, thread: int) -> Receiver | None:
        """Make the receiving end for a server, which waits for weights itself; ``None`` where nothing travels.

        Args:
            model_id: the name under which the server's weights are published.
            thread: the thread of the server's event loop.

        Raises:
            ValueError: there are several workers, and nobody has said which one this is.
        """

    # -- both ------------------------------------------------------------------------------------------

    @abstractmethod
    def connect(
        self, worker_idx: int | None = None, *, version: int | None = None, timeout: float | None = None
    ) -> None:
        """Send, or receive and apply, the first weights.

        The trainer does not wait for workers that are not there yet, unless it is given a ``timeout``: they find the
        weights when they come. With ``sync`` it gives those that are there the time to apply them. A worker waits
        for the trainer.

        Args:
            worker_idx: in the trainer, one worker to connect to; in a worker, its index.
            version: in the trainer, your own number for these weights, as for :meth:`send`.
            timeout: in the trainer, seconds to wait until all workers have come and applied the weights; in a
                worker, seconds to wait for them, by default as many as the scheme waits for an answer.

        Raises:
            RuntimeError: before ``init_on_sender`` or ``init_on_receiver``, or in a process that was forked from the
                trainer.
            TypeError: as for :meth:`send`.
            ValueError: an unknown worker, or a ``version`` that does not fit into 64 bits.
            TimeoutError: in a worker, no weights came in time; ``connect`` may be called again.
            WeightSyncError: weights were refused; or, with a ``timeout``, a worker has not come, or has not answered.
        """

    @abstractmethod
    def shutdown(self) -> None:
        """End this process's part, and give up its queues. Other processes are not touched. Idempotent.

        A call that waits in another thread ends, with an error. A signal handler may shut down at any moment.
        """
