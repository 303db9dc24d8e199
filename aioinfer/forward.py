"""A batch through the model: requests that agree run together, and only those that fail are failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey

from aioinfer.devices import Model, Placement
from aioinfer.errors import ModelError
from aioinfer.interaction import in_force
from aioinfer.stamps import VersionStamps
from aioinfer.tensors import UnlikeRequestsError, check_output, group_by_layout, rows, stack
from aioinfer.transports.requests import STORED, Request, SlotStore

__all__ = ["CollateFn", "ForwardPass", "Outcome"]

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
            those fail that the model can't serve alone; ``2n`` extra passes at most.
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
    ) -> None:
        if out_keys is None and isinstance(model, TensorDictModuleBase):
            out_keys = model.out_keys
        self._model = model
        self._placement = placement
        self._collate_fn = collate_fn
        # A nested key brings the whole entry that it lies in.
        self._keys = frozenset(map(_entry, out_keys)) if out_keys else None
        self._version_key = version_key
        self._version = version
        self._stamps = VersionStamps()
        self._split_failed_batches = split_failed_batches

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

    def _outcomes(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        started = time.perf_counter()
        try:
            replies = self._replies(requests)
        except UnlikeRequestsError as error:
            groups = group_by_layout([request.td for request in requests])
            parts: list[Sequence[Request]] = [[requests[i] for i in group] for group in groups]
            failure: BaseException = error
        except ModelError as error:  # what it returned says nothing about which request is to blame
            parts, failure = [], error
        except BaseException as error:  # also SystemExit: it must end these requests, not the model thread
            parts, failure = self._halves(requests), error
        else:
            yield Outcome(requests, replies, None, time.perf_counter() - started)
            return
        if len(parts) < 2:
            yield Outcome(requests, None, failure, time.perf_counter() - started)
        for part in parts if len(parts) > 1 else ():
            yield from self._outcomes(part)

    def _halves(self, requests: Sequence[Request]) -> list[Sequence[Request]]:
        if not self._split_failed_batches:
            return []
        middle = len(requests) // 2
        return [half for half in (requests[:middle], requests[middle:]) if half]

    def _replies(self, requests: Sequence[Request]) -> Sequence[TensorDictBase]:
        count, store = len(requests), requests[0].store
        if store is None or any([request.store is not store for request in requests]):  # noqa: C419 - faster
            batch, split = self._collate([request.td for request in requests]), self._split
        else:
            batch, split = self._gather(store, requests), partial(self._scatter, store, requests)
        with in_force(requests[0].mode):
            return self._placement.run(self._model, batch, lambda output: check_output(output, count), split)

    def _split(self, output: TensorDictBase) -> Sequence[TensorDictBase]:
        if self._version_key is None:
            return rows(output, self._keys)
        stamps = self._stamps.make(self._version(), output.batch_size, output.device)
        return rows(output, self._keys, {self._version_key: stamps})

    def _gather(self, store: SlotStore, requests: Sequence[Request]) -> TensorDictBase:
        if self._collate_fn is not None:
            return self._collate_fn([request.td for request in requests])
        return self._placement.build(lambda allocate: store.gather(requests, allocate))

    def _scatter(
        self, store: SlotStore, requests: Sequence[Request], output: TensorDictBase
    ) -> Sequence[TensorDictBase]:
        store.scatter(requests, output, self._keys, self._version())
        return [STORED] * len(requests)

    def _collate(self, tds: list[TensorDictBase]) -> TensorDictBase:
        if self._collate_fn is not None:
            return self._collate_fn(tds)
        try:
            return self._placement.build(partial(stack, tds))
        except RuntimeError:
            if len(group_by_layout(tds)) > 1:
                raise UnlikeRequestsError from None
            raise


def _entry(key: NestedKey) -> str:
    """The entry of a TensorDict in which a key lies."""
    return key if isinstance(key, str) else _entry(key[0])
