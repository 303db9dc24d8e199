"""A batch through the model: requests that agree run together, and only those that fail are failed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import nn

from aioinfer.devices import Model, Placement
from aioinfer.errors import InvalidRequestError, ModelError, describe
from aioinfer.interaction_type import use_mode
from aioinfer.tensors import UnlikeRequestsError, VersionTensorCache, check_output, group_by_layout, rows, stack
from aioinfer.transports.ipc.slots import SlotTable
from aioinfer.transports.queue import WRITTEN_IN_PLACE, Request

__all__ = ["CollateFn", "ForwardPass", "Outcome"]

_log = logging.getLogger("aioinfer")

CollateFn = Callable[[list[TensorDictBase]], TensorDictBase]


@dataclass(slots=True)
class Outcome:
    """What one forward pass made of some of the requests: a reply for each, or one error for all of them."""

    requests: Sequence[Request]
    replies: Sequence[TensorDictBase] | None
    error: BaseException | None
    seconds: float


class ForwardPass:
    """Turns requests into replies. Model thread only.

    Args:
        model: batched TensorDict to batched TensorDict.
        placement: where it runs.
        collate_fn: list of requests to a batch, whatever their layouts; ``None`` stacks those of like layout.
        out_keys: the entries that replies have; ``None``: the model's ``out_keys`` if it is a TensorDict module,
            else all that it returns.
        version_key: the entry of replies that says which weights computed them; ``None``: none does.
        version: of the weights that the model has.
        split_failed_batches: where the model raises on several requests, run each half again, until only
            those fail that the model can't serve alone; ``2n`` extra passes at most. Otherwise only those whose callers
            went away are left out, and the rest run once more.
        look: takes note of callers that went away.
    """

    def __init__(
        self,
        model: Model,
        placement: Placement,
        *,
        collate_fn: CollateFn | None,
        out_keys: Sequence[NestedKey] | None,
        version_key: str | None,
        version: Callable[[], int],
        split_failed_batches: bool,
        look: Callable[[], object],
    ) -> None:
        self._model = model
        self._placement = placement
        self._collate_fn = collate_fn
        self._required = frozenset(map(_entry, out_keys or ()))
        if out_keys is None and isinstance(model, TensorDictModuleBase):
            out_keys = model.out_keys
        # A nested key brings the whole entry that it lies in.
        self._keys = frozenset(map(_entry, out_keys)) if out_keys else None
        self._version_key = version_key
        self._version = version
        self._version_tensors = VersionTensorCache()
        self._split_failed_batches = split_failed_batches
        self._look = look
        self._warned = False

    @property
    def _takes_tensordicts(self) -> bool:
        return isinstance(self._model, TensorDictModuleBase) or not isinstance(self._model, nn.Module)

    def open(self) -> None:
        """Prepare the device, and move the model there."""
        self._placement.open(self._model)

    def __call__(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Run the model, once where all requests agree in layout and exploration mode.

        Returns:
            Outcomes that cover each request once, computed as they are asked for.
        """
        first = requests[0].mode
        if not any([request.mode is not first for request in requests]):  # noqa: C419 - faster
            return self._outcomes(requests)
        modes = {request.mode for request in requests}
        groups = ([request for request in requests if request.mode is mode] for mode in modes)
        return chain.from_iterable(map(self._outcomes, groups))

    def _outcomes(self, requests: Sequence[Request], *, again: bool = False) -> Iterator[Outcome]:
        started = time.perf_counter()
        try:
            replies = self._replies(requests)
        except BaseException as error:  # also SystemExit: it must end these requests, not the model thread
            failure = self._explained(error)
        else:
            yield Outcome(requests, replies, None, time.perf_counter() - started)
            return
        try:
            seconds = time.perf_counter() - started
            parts = self._parts(requests, failure)
            if isinstance(failure, UnlikeRequestsError) and not parts:
                failure = InvalidRequestError("the request can't be stacked to a batch")
            if not isinstance(failure, UnlikeRequestsError):
                rerun = set(map(id, chain.from_iterable(parts)))
                yield Outcome([request for request in requests if id(request) not in rerun], None, failure, seconds)
            served = True
            for part in parts:
                for outcome in self._outcomes(part, again=again or not isinstance(failure, UnlikeRequestsError)):
                    served &= outcome.error is None or not outcome.requests
                    yield outcome
            if len(parts) > 1 and served and not again and not isinstance(failure, UnlikeRequestsError):
                self._warn(failure, len(requests))
        finally:
            del failure  # its traceback leads here: it must not lead back

    def _parts(self, requests: Sequence[Request], failure: BaseException) -> list[Sequence[Request]]:
        """Which of the requests that have failed together run again, and which of them together."""
        if isinstance(failure, UnlikeRequestsError):
            groups = group_by_layout([request.td for request in requests])
            if len(groups) > 1:
                return [[requests[i] for i in group] for group in groups]
        if isinstance(failure, ModelError):  # what it returned says nothing about which request is to blame
            return []
        if self._split_failed_batches:
            middle = len(requests) // 2
            return [requests[:middle], requests[middle:]] if middle else []
        # The row of a caller that gave up may have been written anew while it was read.
        self._look()
        left = [request for request in requests if not request.receiver.done()]
        return [left] if 0 < len(left) < len(requests) else []

    def _explained(self, error: BaseException) -> BaseException:
        """The error to tell callers of, where what was raised says little."""
        if isinstance(error, TypeError) and "__torch_function__" in str(error) and not self._takes_tensordicts:
            explained: BaseException = ModelError(
                f"the model is called with a TensorDict, and {type(self._model).__qualname__} seems to take tensors; "
                'wrap it: TensorDictModule(model, in_keys=["observation"], out_keys=["action"])'
            )
            explained.__cause__ = error
            return explained
        return error

    def _warn(self, failure: BaseException, count: int) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "the model raised on a batch of %d requests (%s), and served all of them in smaller batches; if it "
                "can't take a batch, it costs up to twice as many passes as requests (see stats().failed_passes): "
                "let it take a first dimension of any size, or set max_batch_size=1. This is said once",
                count,
                describe(failure),
            )

    def _replies(self, requests: Sequence[Request]) -> Sequence[TensorDictBase]:
        count, store = len(requests), requests[0].store
        if store is None or any([request.store is not store for request in requests]):  # noqa: C419 - faster
            batch, split = self._collate([request.td for request in requests]), self._split
        else:
            batch, split = self._gather(store, requests), partial(self._scatter, store, requests)
        with use_mode(requests[0].mode):
            return self._placement.run(self._model, batch, lambda output: check_output(output, count), split)

    def _split(self, output: TensorDictBase) -> Sequence[TensorDictBase]:
        if missing := self._required - set(output.keys()) if self._required else ():
            raise ModelError(f"out_keys names {sorted(missing)}, the model returned {sorted(map(str, output.keys()))}")
        if self._version_key is None:
            return rows(output, self._keys)
        tensors = self._version_tensors.make(self._version(), output.batch_size, output.device)
        return rows(output, self._keys, {self._version_key: tensors})

    def _gather(self, store: SlotTable, requests: Sequence[Request]) -> TensorDictBase:
        if self._collate_fn is not None:
            return self._collate_fn([request.td for request in requests])
        return self._placement.build(lambda allocate: store.gather(requests, allocate))

    def _scatter(
        self, store: SlotTable, requests: Sequence[Request], output: TensorDictBase
    ) -> Sequence[TensorDictBase]:
        store.scatter(requests, output, self._keys, self._version())
        return [WRITTEN_IN_PLACE] * len(requests)

    def _collate(self, tds: list[TensorDictBase]) -> TensorDictBase:
        if self._collate_fn is not None:
            return self._collate_fn(tds)
        try:
            return self._placement.build(partial(stack, tds))
        except RuntimeError:
            if len(group_by_layout(tds)) > 1:
                raise UnlikeRequestsError("requests of unlike layout can't be stacked") from None
            raise


def _entry(key: NestedKey) -> str:
    """The entry of a TensorDict in which a key lies."""
    return key if isinstance(key, str) else _entry(key[0])
