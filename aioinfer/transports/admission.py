"""What a server takes: its terms, checked where a request is submitted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDictBase

from aioinfer.errors import (
    InvalidRequestError,
    ServerClosedError,
    ServerOverloadedError,
    ServerPausedError,
    clone_exception,
)
from aioinfer.stats import StatsRecorder
from aioinfer.tensors import RequestSpec

__all__ = ["REFUSALS", "Admission"]

REFUSALS = (ServerClosedError, ServerPausedError, ServerOverloadedError)
"""What a server says to a request that is in order; it reaches the caller of ``submit`` through the future."""


class Admission:
    """What a server takes: checked in the caller's thread, before a request can meet another one.

    Any thread. There is no lock: ``closed`` and ``refusals`` are each changed in one step, and whoever derives
    something from them looks again after it has said so.

    Args:
        request_spec: an example of a request; ``None`` takes any layout without batch dimension.
        max_pending: most requests that may wait; ``None`` is without bound.
        stats: counts what is refused and dropped.
        version_key: the entry of replies that says which weights computed them; ``None``: none does.
    """

    def __init__(
        self,
        request_spec: TensorDictBase | None = None,
        max_pending: int | None = None,
        stats: StatsRecorder | None = None,
        version_key: str | None = None,
    ) -> None:
        if max_pending is not None and (
            not isinstance(max_pending, int) or isinstance(max_pending, bool) or max_pending < 1
        ):
            raise ValueError(f"max_pending must be an integer of at least 1, or None, got {max_pending!r}")
        self.spec = None if request_spec is None else RequestSpec(request_spec)
        self.batch_size = torch.Size([]) if self.spec is None else self.spec.batch_size
        self.max_pending = max_pending
        self.stats = StatsRecorder() if stats is None else stats
        self.version_key = version_key
        self.serving = False
        self.superseded = False
        self.closed: ServerClosedError | None = None
        self.refusals: set[object] = set()
        """Pauses during which requests are refused."""
        self.unchecked = self.spec is None and max_pending is None
        """Whether a TensorDict of the right batch size needs no check but that requests are taken at all."""
        self._watchers: list[Callable[[], None]] = []

    def close(self, error: ServerClosedError) -> None:
        """Refuse every request from now on."""
        self.closed = error
        self._tell()

    def refuse(self, pause: object) -> None:
        """Refuse every request until :meth:`accept` was called for each pause that was given."""
        self.refusals.add(pause)
        self._tell()

    def accept(self, pause: object) -> None:
        """Undo a :meth:`refuse`; idempotent."""
        self.refusals.discard(pause)
        self._tell()

    @property
    def refusing(self) -> bool:
        """Whether requests are refused until an :meth:`accept`."""
        return bool(self.refusals)

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call ``watcher`` now, and whenever requests are refused from then on, or taken again."""
        self._watchers.append(watcher)
        watcher()

    def _tell(self) -> None:
        for watcher in self._watchers:
            watcher()

    def check_hand_over(self, successor: Admission) -> None:
        """Raise :class:`RuntimeError` while this server runs and ``successor`` is another one's."""
        if self.serving and successor is not self:
            raise RuntimeError(
                "the transport has a running server already; shut it down first, or make a second transport"
            )

    def hand_over(self, successor: Admission) -> None:
        """Give way to another server's terms; raise :class:`RuntimeError` while this server runs."""
        self.check_hand_over(successor)
        self.superseded = successor is not self

    def leave_to_parent(self) -> None:
        """In a forked child: the server is in the parent, and so is all that hears of its end."""
        self._watchers.clear()
        self.stats.leave_to_parent()
        if self.serving:
            self.serving = False
            self.closed = ServerClosedError(
                "the server is in the process from which this one was forked; hand this process a client of an "
                "MPTransport or of a ProcessSlotTransport"
            )

    def check(self, td: TensorDictBase) -> None:
        """Let a request through, or count it as rejected and raise.

        Raises:
            InvalidRequestError: no TensorDict, or not of the layout that the server takes.
            ServerClosedError: the server is shut down.
            ServerPausedError: it is paused, and refuses requests meanwhile.
        """
        if self.closed is not None:
            raise clone_exception(self.closed)
        if self.refusals:
            raise self.paused()
        self.check_layout(td)

    def check_layout(self, td: TensorDictBase) -> None:
        """Do as :meth:`check`, whether or not requests are taken now."""
        if not isinstance(td, TensorDictBase):
            self.stats.reject()
            raise InvalidRequestError(f"a request must be a TensorDict, got {type(td).__qualname__}")
        if td.batch_size != self.batch_size:
            self.stats.reject()
            raise InvalidRequestError(
                f"the request has batch size {list(td.batch_size)}, "
                f"requests to this server have {list(self.batch_size)}"
                " (send each row as a request of its own, or give the server a request_spec)"
            )
        self.check_spec(td)

    def check_spec(self, td: TensorDictBase) -> None:
        """Do as :meth:`check_layout`, where the transport knows the layout, but not the server's ``request_spec``."""
        if self.spec is not None:
            try:
                self.spec.check(td)
            except InvalidRequestError:
                self.stats.reject()
                raise

    def paused(self) -> ServerPausedError:
        """Count a request as rejected and return the error that says so."""
        self.stats.reject()
        return ServerPausedError("the server is paused; try again when it goes on")

    def overloaded(self) -> ServerOverloadedError:
        """Count a request as rejected and return the error that says so."""
        self.stats.reject()
        return ServerOverloadedError(
            f"{self.max_pending} requests are pending already (max_pending={self.max_pending}); "
            "try again later, or call with wait=True"
        )
