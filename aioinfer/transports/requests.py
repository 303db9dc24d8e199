"""One request on its way through the server, and how it is answered."""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from typing import Any, Protocol

from tensordict import TensorDict, TensorDictBase

from aioinfer.errors import clone_exception
from aioinfer.interaction_type import Mode
from aioinfer.tensors import Allocate
from aioinfer.transports.outlets import Outlet

__all__ = ["STORED", "Request", "SlotStore", "answer"]

_log = logging.getLogger("aioinfer")


class SlotStore(Protocol):
    """Memory in which requests lie as rows, and which takes replies as rows. Model thread only."""

    def gather(self, requests: Sequence[Any], allocate: Allocate | None) -> TensorDict:
        """Copy the rows of requests into a batch ``[B, ...]``."""
        ...

    def scatter(
        self,
        requests: Sequence[Any],
        output: TensorDictBase,
        keys: Set[str] | None,
        version: int,
    ) -> None:
        """Copy the rows of an output ``[B, ...]`` to where the replies belong.

        Args:
            requests: those that the rows answer.
            output: what the model returned.
            keys: the entries that replies have; ``None``: all.
            version: of the weights that computed it.

        Raises:
            ModelError: they are not of the layout that replies have.
        """
        ...


STORED = TensorDict({}, batch_size=[])
"""Stands for a reply that lies in a store."""


class Request:
    """One request on its way: what is asked, in which mode, since when, and where the reply goes.

    ``outlet`` is ``None`` where only the transport's own ``resolve`` knows what ``receiver`` is. ``store`` is the
    shared memory in which the request lies and the reply is expected, if there is one.
    """

    store: SlotStore | None = None

    __slots__ = ("mode", "outlet", "receiver", "submitted_at", "td")

    def __init__(
        self, td: TensorDictBase, receiver: Any, outlet: Outlet | None, submitted_at: float, mode: Mode
    ) -> None:
        self.td = td
        self.receiver = receiver
        self.outlet = outlet
        self.submitted_at = submitted_at
        self.mode = mode


def answer(requests: Sequence[Request], outcomes: Sequence[Any], *, failed: bool) -> None:
    """Settle requests of this process, with one call for each way back that they came by.

    It raises nothing: where a way back raises, its requests fail with that error, and the others are settled all the
    same.

    Args:
        requests: claimed before, and settled by nobody else.
        outcomes: a reply for each, or an error for each if ``failed``.
        failed: whether ``outcomes`` are errors.
    """
    if not requests:
        return
    groups: dict[Outlet | None, tuple[list[Any], Any]]
    first = requests[0].outlet
    if not any([request.outlet is not first for request in requests]):  # noqa: C419 - faster
        groups = {first: ([request.receiver for request in requests], outcomes)}
    else:
        groups = {}
        for request, outcome in zip(requests, outcomes, strict=True):
            group = groups.get(request.outlet)
            if group is None:
                group = groups[request.outlet] = ([], [])
            group[0].append(request.receiver)
            group[1].append(outcome)
    for outlet, (receivers, own) in groups.items():
        if outlet is not None:
            try:
                (outlet.fail if failed else outlet.deliver)(receivers, own)
            except BaseException as error:
                _log.exception("replies could not be handed over")
                _try_to_fail(outlet, receivers, error)


def _try_to_fail(outlet: Outlet, receivers: Sequence[Any], error: BaseException) -> None:
    for receiver in receivers:
        try:
            outlet.fail([receiver], [clone_exception(error)])
        except BaseException:
            _log.exception("a request could not be failed")
