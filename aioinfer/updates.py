"""New weights for the served model: from a trainer in this process, or from one that a scheme connects."""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

from anyio import CapacityLimiter, to_thread
from torch import nn

from aioinfer.devices import Model, Placement, settle
from aioinfer.errors import WeightSyncError
from aioinfer.modes import long_lived
from aioinfer.stats import StatsRecorder
from aioinfer.weight_sync.receiver import Arrival, Receiver
from aioinfer.weight_sync.scheme import WeightSyncScheme
from aioinfer.weight_sync.snapshots import snapshot
from aioinfer.weight_sync.targets import ModelTarget, Spares
from aioinfer.weight_sync.weights import Weights, WeightsLike, check_version, read

__all__ = ["Updates"]

Submit = Callable[[Callable[[], None]], "Future[None]"]

_log = logging.getLogger("aioinfer")

# Seconds between two attempts to receive, where the first one failed; each time twice as many.
_FIRST_DELAY = 0.01
_LONGEST_DELAY = 1.0


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
        with self._counts_refusals():
            if self._target is None:
                raise TypeError("the model must be an nn.Module for its weights to be updated")
            found = read(source, "tensordict")
            own = snapshot(found.tensors)
            settle(own.values())
            with long_lived():
                return Weights(own, copy.deepcopy(found.extra_states))

    def load(self, own: Weights, version: int | None, *, cast: bool) -> None:
        """Load weights that nobody else writes to, or leave the model and the version as they are.

        Raises:
            WeightSyncError: they don't fit, or the versions are used up.
        """
        with self._counts_refusals():
            self._load(own, version, cast=cast)

    def _load(self, weights: Weights, version: int | None, *, cast: bool = False) -> None:
        assert self._target is not None  # checked where the weights came in
        target = self._target
        version = self._next_version() if version is None else int(version)
        self._placement.update(lambda: target.load(weights, swap=self._swap, cast=cast))
        self.version = version
        self.on_version(version)
        self._stats.update(applied=True)

    def _next_version(self) -> int:
        try:
            check_version(self.version + 1)
        except ValueError:
            raise WeightSyncError(f"there is no version after {self.version}; give these weights a number") from None
        return self.version + 1

    @contextmanager
    def _counts_refusals(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # also what set_extra_state, or the device, may raise
            self._stats.update(applied=False)
            raise

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
        spares: Spares = []  # of this life: the helper of another one that was cancelled may still fill its own
        helper = CapacityLimiter(1)  # a thread of its own, however many wait for the event loop's usual ones
        delay = _FIRST_DELAY
        while self._receiver is not None:
            try:
                arrival = await self._receiver.anext()
            except ValueError as error:
                self._stats.update(applied=False)
                _log.warning("ignored a message on the weight queue of %r: %s", self._model_id, error)
                continue
            except OSError as error:  # no descriptor is free, mostly
                if delay == _FIRST_DELAY:
                    _log.warning("can't receive weights of %r; trying again: %s", self._model_id, error)
                await asyncio.sleep(delay)
                delay = min(2 * delay, _LONGEST_DELAY)
                continue
            if arrival is None:
                return
            if delay > _FIRST_DELAY:
                _log.info("weights of %r are received again", self._model_id)
                delay = _FIRST_DELAY
            weights = arrival.weights
            if self._swap:
                try:
                    weights = await to_thread.run_sync(self._swappable, arrival, spares, limiter=helper)
                except (Exception, SystemExit) as error:  # the sender must not wait for an answer in vain
                    self._refuse(arrival, error)
                    continue
            await asyncio.wrap_future(submit(partial(self._apply, arrival, weights)))

    def _swappable(self, arrival: Arrival, spares: Spares) -> Weights:
        """Weights whose memory the parameters can take over: the trainer's, if it is lent and will do, or a spare copy.

        That is filled in a thread of its own, beside the forward passes.
        """
        assert self._scheme is not None
        assert self._target is not None
        if self._scheme.lends and self._target.can_borrow(arrival.weights):
            return arrival.weights
        return self._target.spare(arrival.weights, spares)

    def _apply(self, arrival: Arrival, weights: Weights) -> None:
        try:
            self._load(weights, arrival.version)
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
        try:
            if self._target is not None and self._lent:
                self._target.copy_borrowed()
                self._lent = False
        finally:
            if self._receiver is not None:
                self._receiver.close()
