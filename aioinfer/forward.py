"""A batch through the model: requests that agree run together, and only those that fail are failed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import nn

from aioinfer.compilation import WarmUp
from aioinfer.devices import Model, Placement
from aioinfer.entries import stack_entries
from aioinfer.errors import InvalidRequestError, ModelError, describe
from aioinfer.interaction_type import Mode, use_mode
from aioinfer.modes import long_lived
from aioinfer.plan import Runner
from aioinfer.tensors import (
    UnlikeRequestsError,
    VersionTensorCache,
    check_output,
    concatenate,
    empty_rows,
    entries,
    group_by_layout,
    rows,
    split,
    stack,
    unbind,
)
from aioinfer.transports.ipc.slots import SlotTable
from aioinfer.transports.request import WRITTEN_IN_PLACE, NamedRequest, Request

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
    rows: int
    """Of the requests."""
    parts: int
    """How many of the requests are parts of one that has too many rows."""


class ForwardPass:
    """Turns requests into replies. Model thread only.

    Args:
        model: batched TensorDict to batched TensorDict.
        run: what a pass calls: the model, or what does the same faster.
        placement: where it runs.
        collate_fn: list of rows to a batch, whatever their layouts; ``None`` stacks those of like layout.
        out_keys: the entries that replies have; ``None``: the model's ``out_keys`` if it is a TensorDict module,
            else all that it returns.
        version_key: the entry of replies that says which weights computed them; ``None``: none does.
        version: of the weights that the model has.
        split_failed_batches: where the model raises on several requests, run each half again, until only
            those fail that the model can't serve alone; ``2n`` extra passes at most. Otherwise only those whose callers
            went away are left out, and the rest run once more.
        look: takes note of callers that went away.
        warm_up: runs batches before the first request; ``None``: none are.
    """

    def __init__(
        self,
        model: Model,
        run: Runner,
        placement: Placement,
        *,
        collate_fn: CollateFn | None,
        out_keys: Sequence[NestedKey] | None,
        version_key: str | None,
        version: Callable[[], int],
        split_failed_batches: bool,
        look: Callable[[], object],
        warm_up: WarmUp | None = None,
    ) -> None:
        self._model = model
        self._run = run
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
        self._warm_up = warm_up
        self._warned = False
        self._empty: TensorDict | None = None

    @property
    def _takes_tensordicts(self) -> bool:
        return isinstance(self._model, TensorDictModuleBase) or not isinstance(self._model, nn.Module)

    def open(self, is_stopping: Callable[[], bool]) -> None:
        """Prepare the device, move the model there, and warm it up.

        Args:
            is_stopping: whether to return before the end of the warm-up.
        """
        self._placement.open(self._model)
        if self._warm_up is not None:
            self._warm_up(self._run_rows, is_stopping)

    def _run_rows(self, tds: list[TensorDictBase], mode: Mode) -> None:
        """Run the model over rows as over those of requests, and throw the replies away."""
        batch = self._placement.build(partial(stack, tds)) if self._collate_fn is None else self._collate_rows(tds)
        with use_mode(mode):
            self._placement.run(
                self._run, batch, lambda output: check_output(output, len(tds)), self._split, self._keys
            )

    def __call__(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Run the model, once where all requests agree in layout and exploration mode.

        Returns:
            Outcomes that cover each request once, computed as they are asked for.
        """
        modes = [request.mode for request in requests]
        if modes.count(modes[0]) == len(modes) and not any(_batched(requests)):
            return self._outcomes(requests, batched=False)
        groups = [[request for request in requests if request.mode is mode] for mode in set(modes)]
        return chain.from_iterable(self._outcomes(group, batched=any(_batched(group))) for group in groups)

    def _outcomes(self, requests: Sequence[Request], *, batched: bool, again: bool = False) -> Iterator[Outcome]:
        started = time.perf_counter()
        try:
            replies = self._replies(requests, batched)
        except BaseException as error:  # also SystemExit: it must end these requests, not the model thread
            failure = self._explained(error)
        else:
            yield _outcome(requests, replies, None, time.perf_counter() - started, batched)
            return
        try:
            seconds = time.perf_counter() - started
            parts = self._parts(requests, failure)
            if isinstance(failure, UnlikeRequestsError) and not parts:
                failure = InvalidRequestError("the request can't be stacked to a batch")
            if not isinstance(failure, UnlikeRequestsError):
                rerun = set(map(id, chain.from_iterable(parts)))
                left = [request for request in requests if id(request) not in rerun]
                yield _outcome(left, None, failure, seconds, batched)
            served = True
            for part in parts:
                repeated = again or not isinstance(failure, UnlikeRequestsError)
                for outcome in self._outcomes(part, batched=any(_batched(part)), again=repeated):
                    served &= outcome.error is None or not outcome.requests
                    yield outcome
            if len(parts) > 1 and served and not again and not isinstance(failure, UnlikeRequestsError):
                self._warn(failure, len(requests))
        finally:
            del failure  # its traceback leads here: it must not lead back

    def _parts(self, requests: Sequence[Request], failure: BaseException) -> list[Sequence[Request]]:
        """Which of the requests that have failed together run again, and which of them together."""
        if isinstance(failure, UnlikeRequestsError):
            groups = group_by_layout([request.td for request in requests], _batched(requests))
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
                'name them: InferenceServer(model, transport, in_keys=["observation"], out_keys=["action"])'
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

    def _replies(self, requests: Sequence[Request], batched: bool) -> Sequence[TensorDictBase]:
        store = requests[0].store
        count = sum([request.rows for request in requests]) if batched else len(requests)
        if store is None or any([request.store is not store for request in requests]):  # noqa: C419 - faster
            batch = self._collate(requests, batched)
            make = partial(self._split_rows, requests) if batched else self._split
        else:
            batch, make = self._gather(store, requests), partial(self._scatter, store, requests)
        with use_mode(requests[0].mode):
            return self._placement.run(self._run, batch, lambda output: check_output(output, count), make, self._keys)

    def _split(self, output: TensorDictBase) -> Sequence[TensorDictBase]:
        if self._required or self._empty is None:
            self._check_keys(output)
        if self._version_key is None:
            return rows(output, self._keys)
        tensors = self._version_tensors.make(self._version(), output.batch_size, output.device)
        return rows(output, self._keys, {self._version_key: tensors})

    def _split_rows(self, requests: Sequence[Request], output: TensorDictBase) -> Sequence[TensorDictBase]:
        """Do as :meth:`_split`, where some of the requests have a dimension of rows."""
        if self._required or self._empty is None:
            self._check_keys(output)
        sizes = [request.rows if request.batched else None for request in requests]
        if self._version_key is None:
            return split(output, sizes, self._keys)
        version, size, device = self._version(), output.batch_size[1:], output.device
        one_row = sizes.count(None)
        left = iter(self._version_tensors.make(version, torch.Size((one_row, *size)), device) if one_row else ())
        tensors = [
            next(left)
            if rows is None
            else torch.full((rows, *size), version, dtype=torch.int64, device=device or torch.device("cpu"))
            for rows in sizes
        ]
        return split(output, sizes, self._keys, {self._version_key: tensors})

    def _check_keys(self, output: TensorDictBase) -> None:
        found = entries(output).keys()
        if not self._required <= found:
            missing = self._required - found
            raise ModelError(f"out_keys names {sorted(missing)}, the model returned {sorted(map(str, found))}")
        if self._empty is None:
            self._note_entries(output)

    def _note_entries(self, output: TensorDictBase) -> None:
        with long_lived():
            self._empty = empty_rows(output, self._keys)

    def empty_reply(self, size: torch.Size) -> TensorDictBase:
        """The reply to a request ``[0, *size]``, with the entries that the first pass has shown. Any thread."""
        known = self._empty
        reply = TensorDict({}, batch_size=(0, *size)) if known is None else known.clone()
        if self._version_key is not None:
            device = reply.device or torch.device("cpu")
            reply[self._version_key] = torch.zeros(reply.batch_size, dtype=torch.int64, device=device)
        return reply

    def _gather(self, store: SlotTable, requests: Sequence[Request]) -> TensorDictBase:
        if self._collate_fn is not None:
            return self._collate_rows(_rows(requests))
        return self._placement.build(lambda allocate: store.gather(requests, allocate))

    def _scatter(
        self, store: SlotTable, requests: Sequence[Request], output: TensorDictBase
    ) -> Sequence[TensorDictBase]:
        store.scatter(requests, output, self._keys, self._version())
        if self._empty is None:
            self._note_entries(output)
        return [WRITTEN_IN_PLACE] * len(requests)

    def _collate_rows(self, tds: list[TensorDictBase]) -> TensorDictBase:
        assert self._collate_fn is not None
        collate = self._collate_fn
        return self._placement.build(lambda _: collate(tds))

    def _collate(self, requests: Sequence[Request], batched: bool) -> TensorDictBase:
        if self._collate_fn is not None:
            return self._collate_rows(_rows(requests))
        first = requests[0]
        try:
            if not batched and isinstance(first, NamedRequest):
                named = [request.entries for request in requests if isinstance(request, NamedRequest)]
                if len(named) == len(requests):
                    return self._placement.build(partial(stack_entries, named, first.size))
            tds = [request.td for request in requests]
            return self._placement.build(
                partial(concatenate, tds, _batched(requests)) if batched else partial(stack, tds)
            )
        except RuntimeError:
            tds = [request.td for request in requests]
            if len(group_by_layout(tds, _batched(requests))) > 1:
                raise UnlikeRequestsError("requests of unlike layout can't be stacked") from None
            raise


def _outcome(
    requests: Sequence[Request],
    replies: Sequence[TensorDictBase] | None,
    error: BaseException | None,
    seconds: float,
    batched: bool,
) -> Outcome:
    if not batched:
        return Outcome(requests, replies, error, seconds, len(requests), 0)
    rows, parts = sum([request.rows for request in requests]), sum([request.is_part for request in requests])
    return Outcome(requests, replies, error, seconds, rows, parts)


def _batched(requests: Sequence[Request]) -> list[bool]:
    return [request.batched for request in requests]


def _rows(requests: Sequence[Request]) -> list[TensorDictBase]:
    """The rows of requests, each a TensorDict of its own."""
    return unbind([request.td for request in requests], _batched(requests))


def _entry(key: NestedKey) -> str:
    """The entry of a TensorDict in which a key lies."""
    return key if isinstance(key, str) else _entry(key[0])
