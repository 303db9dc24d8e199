"""New weights for the served model: from a trainer in this process, or from one that a scheme connects."""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import anyio.to_thread
from torch import nn

from aioinfer.devices import Model, Placement, settle
from aioinfer.stats import StatsRecorder
from aioinfer.weight_sync.receiver import Arrival, Receiver
from aioinfer.weight_sync.scheme import WeightSyncScheme
from aioinfer.weight_sync.snapshots import snapshot
from aioinfer.weight_sync.targets import ModelTarget
from aioinfer.weight_sync.weights import Weights, WeightsLike, read

__all__ = ["Updates"]

Submit = Callable[[Callable[[], None]], "Future[None]"]

_log = logging.getLogger("aioinfer")


class Updates:
    """Gets weights into the model, on the model thread, between two forward passes.

    Model thread only: ``load``, ``release``, and writing ``version``. Event loop only: ``open``, ``follow``.

    Args:
        model: what is served.
        placement: where it runs.
        scheme: brings weights from a trainer.
        model_id: the name under which they are published.
        version: of the weights that the model has now.
        swap: whether parameters take over the memory of new weights, which was filled beside the forward passes,
            instead of being written in place.
        stats: counts updates.
    """

    def __init__(
        self,
        model: Model,
        placement: Placement,
        *,
        scheme: WeightSyncScheme | None,
        model_id: str,
        version: int,
        swap: bool,
        stats: StatsRecorder,
    ) -> None:
        self.version = version
        self.on_version: Callable[[int], None] = lambda version: None
        """Called on the model thread with each version that came into use; it must neither block nor raise."""
        self._placement = placement
        self._scheme = scheme
        self._model_id = model_id
        self._swap = swap
        self._stats = stats
        self._target: ModelTarget | None = None
        if isinstance(model, nn.Module):
            self._target = ModelTarget(model, cast=False if scheme is None else scheme.cast)
        elif scheme is not None:
            raise TypeError(f"weight_sync needs a model that is an nn.Module, got {type(model).__qualname__}")
        self._receiver: Receiver | None = None
        self._lent = False  # whether the parameters lie in the trainer's memory

    # -- from a trainer in this process ----------------------------------------------------------------

    def copied(self, source: WeightsLike) -> Weights:
        """Copy weights as they are now (any thread).

        Raises:
            TypeError: they are none, or the model has none.
        """
        if self._target is None:
            raise TypeError("the model must be an nn.Module for its weights to be updated")
        found = read(source, "tensordict")
        own = snapshot(found.tensors)
        settle(own.values())
        return Weights(own, copy.deepcopy(found.extra_states))

    def load(self, own: Weights, version: int | None, *, cast: bool) -> None:
        """Load weights that nobody else writes to.

        Raises:
            WeightSyncError: they don't fit.
        """
        try:
            self._load(own, version, swap=self._swap, cast=cast)
        except Exception:
            self._stats.update(applied=False)
            raise

    def _load(self, weights: Weights, version: int | None, *, swap: bool, cast: bool = False) -> None:
        assert self._target is not None  # checked where the weights came in
        target = self._target
        self._placement.update(lambda: target.load(weights, swap=swap, cast=cast))
        self.version = self.version + 1 if version is None else version
        self.on_version(self.version)
        self._stats.update(applied=True)

    # -- from a trainer that a scheme connects ---------------------------------------------------------

    def open(self) -> None:
        """Begin to receive, on the event loop of this thread.

        Raises:
            ValueError: the scheme has no queue for this server.
        """
        if self._scheme is not None:
            self._receiver = self._scheme.open_receiver(self._model_id, thread=threading.get_ident())

    @property
    def connected(self) -> bool | None:
        """Whether a trainer has published weights and is still there; ``None`` if there is nothing to receive."""
        return None if self._receiver is None else self._receiver.connected

    async def follow(self, submit: Submit) -> None:
        """Receive, and have the model thread load, one update after the other, until cancelled.

        Args:
            submit: gives the model thread a job.
        """
        while self._receiver is not None:
            try:
                arrival = await self._receiver.async_next()
            except ValueError as error:
                self._stats.update(applied=False)
                _log.warning("ignored a message on the weight queue of %r: %s", self._model_id, error)
                continue
            if arrival is None:
                return
            try:
                weights = await anyio.to_thread.run_sync(self._swappable, arrival) if self._swap else arrival.weights
            except Exception as error:
                self._refuse(arrival, error)
                continue
            await asyncio.wrap_future(submit(partial(self._apply, arrival, weights)))

    def _swappable(self, arrival: Arrival) -> Weights:
        """Weights whose memory the parameters can take over: the trainer's, if it is lent and will do, or a spare copy.

        That is filled in a thread of its own, beside the forward passes.
        """
        assert self._scheme is not None
        assert self._target is not None
        if self._scheme.lends and self._target.can_borrow(arrival.weights):
            return arrival.weights
        return self._target.spare(arrival.weights)

    def _apply(self, arrival: Arrival, weights: Weights) -> None:
        try:
            self._load(weights, arrival.version, swap=self._swap)
        except BaseException as error:  # also what set_extra_state, or the device, may raise: the old weights serve on
            self._refuse(arrival, error)
        else:
            self._lent = self._swap and weights is arrival.weights
            arrival.applied(lent=self._lent)

    def _refuse(self, arrival: Arrival, error: BaseException) -> None:
        self._stats.update(applied=False)
        arrival.refused(error)

    def release(self) -> None:
        """End the model thread's part: give borrowed memory back, and say farewell to the trainer."""
        if self._target is not None and self._lent:
            self._target.copy_borrowed()
            self._lent = False
        if self._receiver is not None:
            self._receiver.close()
