"""New weights for the served model: from a trainer in this process, or from another process through a scheme."""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

from anyio import CapacityLimiter, to_thread
from torch import nn

from aioinfer.devices import Model, Placement, settle
from aioinfer.errors import WeightSyncError
from aioinfer.modes import long_lived
from aioinfer.stats import StatsRecorder
from aioinfer.weight_sync.loader import StagingBuffers, WeightLoader
from aioinfer.weight_sync.receiver import ReceivedUpdate, Receiver
from aioinfer.weight_sync.scheme import WeightSyncScheme
from aioinfer.weight_sync.snapshot import clone_tensors
from aioinfer.weight_sync.weights import MAX_VERSION, Weights, WeightsLike, extract_weights

__all__ = ["WeightUpdates"]

Submit = Callable[[Callable[[], None]], "Future[None]"]

_log = logging.getLogger("aioinfer")

# Seconds before the next attempt to receive after one has failed; doubled by each failure.
_MIN_RETRY_DELAY = 0.01
_MAX_RETRY_DELAY = 1.0


class WeightUpdates:
    """Loads new weights into the model, on the model thread, between two forward passes.

    The model thread owns ``load``, ``release`` and ``version``, which any thread may read. The event loop owns ``open``
    and ``follow``. Any thread may call ``copy``.

    Args:
        model: the served model.
        placement: the model's device.
        scheme: receives weights from a trainer.
        model_id: the name under which the weights are published.
        version: of the weights that the model has now.
        swap: whether parameters alias the memory of new weights, which was filled beside the forward passes, instead
            of being written in place.
        stats: counts updates.

    Attributes:
        version: of the weights in use.
        on_update: called on the model thread with each new version, and the names of the tensors that came with it; it
            must neither block nor raise.
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
        self.on_update: Callable[[int, Collection[str]], None] = lambda version, names: None
        self._placement = placement
        self._scheme = scheme
        self._model_id = model_id
        self._swap = swap
        self._stats = stats
        self._loader: WeightLoader | None = None
        if isinstance(model, nn.Module):
            self._loader = WeightLoader(model, cast=False if scheme is None else scheme.cast)
        elif scheme is not None:
            raise TypeError(f"weight_sync needs a model that is an nn.Module, got {type(model).__qualname__}")
        self._receiver: Receiver | None = None
        self._aliased = False  # whether the parameters lie in the trainer's memory

    # -- from a trainer in this process ----------------------------------------------------------------

    def copy(self, source: WeightsLike) -> Weights:
        """Copy weights as they are now.

        Raises:
            TypeError: ``source`` has no weights, or the model has none.
        """
        with self._count_refusals():
            if self._loader is None:
                raise TypeError("the model must be an nn.Module for its weights to be updated")
            found = extract_weights(source, "tensordict")
            own = clone_tensors(found.tensors)
            settle(own.values())
            with long_lived():
                return Weights(own, copy.deepcopy(found.extra_states))

    def load(self, own: Weights, version: int | None, *, cast: bool) -> None:
        """Load a copy of weights, or raise and leave the model and the version as they are.

        Raises:
            WeightSyncError: the weights don't fit, or there is no version left.
        """
        with self._count_refusals():
            self._load(own, version, cast=cast)

    def _load(self, weights: Weights, version: int | None, *, cast: bool = False) -> None:
        assert self._loader is not None  # checked by `copy` and `__init__`
        loader = self._loader
        if version is None and self.version == MAX_VERSION:
            raise WeightSyncError(f"there is no version after {self.version}; give these weights a number")
        version = self.version + 1 if version is None else int(version)
        self._placement.update(
            lambda: loader.load(weights, swap=self._swap, cast=cast), tensors_only=not weights.extra_states
        )
        self.version = version
        self.on_update(version, weights.tensors.keys())
        self._stats.update(applied=True)

    @contextmanager
    def _count_refusals(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # also of set_extra_state, or of the device
            self._stats.update(applied=False)
            raise

    # -- from a trainer that a scheme connects ---------------------------------------------------------

    def open(self) -> None:
        """Connect to the trainer, and receive on the event loop of the calling thread.

        Raises:
            ValueError: the scheme has no queue for this server.
        """
        if self._scheme is not None:
            self._receiver = self._scheme.open_receiver(self._model_id, thread=threading.get_ident())

    @property
    def connected(self) -> bool | None:
        """Whether a trainer has accepted the connection and is still alive; ``None`` if nothing is received."""
        return None if self._receiver is None else self._receiver.connected

    async def follow(self, submit: Submit) -> None:
        """Receive updates until cancelled, and load each on the model thread before the next is received.

        Args:
            submit: gives the model thread a job.
        """
        # Not kept for the server's next run: the thread of a run that was cancelled may still fill its own buffers.
        buffers: StagingBuffers = []
        limiter = CapacityLimiter(1)  # one thread of our own, however many calls wait for the event loop's usual ones
        delay = _MIN_RETRY_DELAY
        while self._receiver is not None:
            try:
                update = await self._receiver.areceive()
            except ValueError as error:
                self._stats.update(applied=False)
                _log.warning("ignored a message on the weight queue of %r: %s", self._model_id, error)
                continue
            except OSError as error:  # mostly because no descriptor is free
                if delay == _MIN_RETRY_DELAY:
                    _log.warning("can't receive weights of %r; trying again: %s", self._model_id, error)
                await asyncio.sleep(delay)
                delay = min(2 * delay, _MAX_RETRY_DELAY)
                continue
            if update is None:
                return
            if delay > _MIN_RETRY_DELAY:
                _log.info("weights of %r are received again", self._model_id)
                delay = _MIN_RETRY_DELAY
            weights = update.weights
            if self._swap:
                try:
                    weights = await to_thread.run_sync(self._stage, update, buffers, limiter=limiter)
                except (Exception, SystemExit) as error:  # the sender waits for an answer
                    self._nack(update, error)
                    continue
            await asyncio.wrap_future(submit(partial(self._apply, update, weights)))

    def _stage(self, update: ReceivedUpdate, buffers: StagingBuffers) -> Weights:
        """Return weights that the parameters can alias: the trainer's memory, if the scheme and the model allow it.

        Else a staging buffer, which is filled in the calling thread, beside the forward passes.
        """
        assert self._scheme is not None
        assert self._loader is not None
        if self._scheme.shares_memory and self._loader.can_alias(update.weights):
            return update.weights
        return self._loader.stage(update.weights, buffers)

    def _apply(self, update: ReceivedUpdate, weights: Weights) -> None:
        try:
            self._load(weights, update.ref.version)
        except BaseException as error:  # also of set_extra_state, or of the device: the old weights stay in use
            self._nack(update, error)
        else:
            self._aliased = self._swap and weights is update.weights
            update.ack(aliased=self._aliased)

    def _nack(self, update: ReceivedUpdate, error: BaseException) -> None:
        self._stats.update(applied=False)
        update.nack(error)

    def release(self) -> None:
        """Move the parameters out of the trainer's memory, and disconnect from the trainer."""
        try:
            if self._loader is not None and self._aliased:
                self._loader.copy_aliased()
                self._aliased = False
        finally:
            if self._receiver is not None:
                self._receiver.close()
