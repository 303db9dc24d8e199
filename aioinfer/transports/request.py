"""One request on its way to a batch and back: what it carries, how it is settled, and how one is split over passes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer.batching import Caller
from aioinfer.entries import Entries, make_td
from aioinfer.errors import ModelError, ServerPausedError, clone_exception
from aioinfer.interaction_type import Mode
from aioinfer.stats import StatsRecorder
from aioinfer.tensors import UnlikeRequestsError, concatenate
from aioinfer.transports.replies import ReplySink, TransportSink

if TYPE_CHECKING:
    from aioinfer.transports.base import Transport
    from aioinfer.transports.ipc.slots import SlotTable

__all__ = [
    "WRITTEN_IN_PLACE",
    "NamedRequest",
    "PartReceiver",
    "Request",
    "RequestPart",
    "set_exceptions",
    "set_results",
    "split",
]

_log = logging.getLogger("aioinfer")


WRITTEN_IN_PLACE = TensorDict({}, batch_size=[])
"""Stands for a reply that lies in a store."""


class Request:
    """One request on its way: what is asked, in which mode, since when, by whom, and where the reply goes.

    ``store`` is the shared memory in which the request lies and the reply is expected, if there is one. ``rows`` is how
    many rows it has, and ``batched`` whether it has a dimension for them, as its reply then has. ``caller`` is who
    makes one request after the other, where that is known. ``is_part`` tells the part of a request from a whole one.
    """

    store: SlotTable | None = None
    is_part = False

    __slots__ = ("batched", "caller", "mode", "receiver", "rows", "sink", "submitted_at", "td")

    def __init__(
        self,
        td: TensorDictBase,
        receiver: Any,
        sink: TransportSink,
        submitted_at: float,
        mode: Mode,
        caller: Caller | None = None,
    ) -> None:
        self.td = td
        self.receiver = receiver
        self.sink = sink
        self.submitted_at = submitted_at
        self.mode = mode
        self.caller = caller
        self.rows = 1
        self.batched = False

    def set_rows(self) -> None:
        """Note that the TensorDict ``[n, *size]`` has a dimension of rows."""
        self.batched = True
        self.rows = self.td.batch_size[0]

    def part(self, start: int, stop: int, receiver: PartReceiver) -> Request:
        """Make a request of some of its rows, which its own reply waits for."""
        part = RequestPart(self.td[start:stop], receiver, receiver.sink, self.submitted_at, self.mode)
        part.batched, part.rows = True, stop - start
        return part

    def join(self, replies: Sequence[TensorDictBase]) -> TensorDictBase:
        """Make its reply of those of its parts.

        Raises:
            ModelError: they are unlike each other.
        """
        try:
            return concatenate(replies, [True] * len(replies))
        except (UnlikeRequestsError, RuntimeError):
            raise ModelError("the model returned unlike entries for parts of one request, which had to be split") from (
                None
            )


class NamedRequest(Request):
    """A request whose entries were given by name. Its TensorDict is made where it is asked for.

    Args:
        entries: checked ones.
        size: the batch size of a row.
    """

    __slots__ = ("_td", "entries", "size")

    def __init__(
        self,
        entries: Entries,
        size: torch.Size,
        receiver: Any,
        sink: TransportSink,
        submitted_at: float,
        mode: Mode,
        caller: Caller | None = None,
    ) -> None:
        self.entries = entries
        self.size = size
        self._td: TensorDict | None = None
        self.receiver = receiver
        self.sink = sink
        self.submitted_at = submitted_at
        self.mode = mode
        self.caller = caller
        self.rows = 1
        self.batched = False

    @property
    def td(self) -> TensorDictBase:  # type: ignore[override]
        """The request, ``[*size]`` or ``[rows, *size]``."""
        if self._td is None:
            self._td = make_td(self.entries, torch.Size((self.rows, *self.size)) if self.batched else self.size)
        return self._td

    def set_rows(self) -> None:
        self.batched = True
        self.rows = next(iter(self.entries.values())).shape[0]


class RequestPart(Request):
    """Some rows of a request that has more than a forward pass takes."""

    is_part = True

    __slots__ = ()


def split(request: Request, max_rows: int) -> list[Request]:
    """Split a request into parts of at most ``max_rows`` rows, in order, which take its place.

    It is answered once all of them are. The first one that fails fails it, and then, as when its caller goes away, the
    others need not be computed any more. The last part has its ``caller``, who has no reply before.
    """
    starts = range(0, request.rows, max_rows)
    sink = _PartSink(request, len(starts))
    parts = [
        request.part(start, min(start + max_rows, request.rows), PartReceiver(sink, index))
        for index, start in enumerate(starts)
    ]
    parts[-1].caller = request.caller
    return parts


class PartReceiver:
    """The receiver of the reply to one part of a request."""

    __slots__ = ("index", "sink")

    def __init__(self, sink: _PartSink, index: int) -> None:
        self.sink = sink
        self.index = index

    def done(self) -> bool:
        """Whether the whole request is settled, or its caller went away."""
        return self.sink.done()


class _PartSink(ReplySink):
    """Gathers the replies to the parts of a request, and settles it.

    Any thread. The one that takes the claim token settles the request. One thread at a time hands over replies.
    """

    def __init__(self, request: Request, count: int) -> None:
        self._request = request
        self._replies: dict[int, TensorDictBase] = {}  # by part
        self._count = count
        self._claim_token = [True]

    @property
    def transport(self) -> Transport:
        return self._request.sink.transport

    def done(self) -> bool:
        return not self._claim_token or bool(self._request.receiver.done())

    def _claim(self) -> bool:
        try:
            self._claim_token.pop()
        except IndexError:
            return False
        return True

    def set_results(self, receivers: Sequence[PartReceiver], replies: Sequence[TensorDictBase]) -> None:
        for receiver, reply in zip(receivers, replies, strict=True):
            self._replies[receiver.index] = reply
        if len(self._replies) < self._count or not self._claim():
            return
        request = self._request
        try:
            whole = request.join([self._replies[index] for index in range(self._count)])
        except BaseException as error:
            self._record(StatsRecorder.fail)
            set_exceptions([request], [clone_exception(error)])
        else:
            self._record(StatsRecorder.succeed)
            set_results([request], [whole])

    def set_exceptions(self, receivers: Sequence[PartReceiver], errors: Sequence[Exception]) -> None:
        if self._claim():
            rejected = isinstance(errors[0], ServerPausedError)
            self._record(StatsRecorder.reject if rejected else StatsRecorder.fail)
            set_exceptions([self._request], errors[:1])

    def discard(self, receiver: PartReceiver) -> None:
        if self._claim():
            self._record(StatsRecorder.cancel)
            self._request.sink.discard(self._request.receiver)

    def _record(self, count: Callable[[StatsRecorder, int], None]) -> None:
        """Count the request, unless it is itself a part: then the whole is counted when that is settled."""
        if not self._request.is_part:
            cancelled = self._request.receiver.done()
            (StatsRecorder.cancel if cancelled else count)(self.transport.queue.admission.stats, 1)


def set_results(requests: Sequence[Request], replies: Sequence[TensorDictBase]) -> None:
    """Answer claimed requests, with one call for each sink.

    It raises nothing: where a sink raises, its requests fail with that error, and the others are answered all the same.
    """
    _settle(requests, replies, failed=False)


def set_exceptions(requests: Sequence[Request], errors: Sequence[Exception]) -> None:
    """Fail claimed requests, each with an error of its own; see :func:`set_results`."""
    _settle(requests, errors, failed=True)


def _settle(requests: Sequence[Request], outcomes: Sequence[Any], *, failed: bool) -> None:
    if not requests:
        return
    groups: dict[TransportSink, tuple[list[Any], Any]]
    first = requests[0].sink
    if not any([request.sink is not first for request in requests]):  # noqa: C419 - faster
        groups = {first: ([request.receiver for request in requests], outcomes)}
    else:
        groups = {}
        for request, outcome in zip(requests, outcomes, strict=True):
            group = groups.get(request.sink)
            if group is None:
                group = groups[request.sink] = ([], [])
            group[0].append(request.receiver)
            group[1].append(outcome)
    for sink, (receivers, own) in groups.items():
        try:
            (sink.set_exceptions if failed else sink.set_results)(receivers, own)
        except BaseException as error:
            _log.exception("replies could not be handed over")
            _try_to_fail(sink, receivers, error)


def _try_to_fail(sink: TransportSink, receivers: Sequence[Any], error: BaseException) -> None:
    for receiver in receivers:
        try:
            sink.set_exceptions([receiver], [clone_exception(error)])
        except BaseException:
            _log.exception("a request could not be failed")
