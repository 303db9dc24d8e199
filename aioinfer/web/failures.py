"""What callers over the network are told of an error: an HTTP status, a message, and an id to find it in the log."""

from __future__ import annotations

import logging
import secrets
import traceback
from typing import NamedTuple

from aioinfer.errors import (
    ClientBusyError,
    ClientClosedError,
    DeadlineExceededError,
    InvalidRequestError,
    NoFreeSlotError,
    PeerDiedError,
    ServerClosedError,
    ServerNotRunningError,
    ServerOverloadedError,
    ServerPausedError,
    SupersededError,
    describe,
)
from aioinfer.web.access import Refusal
from aioinfer.web.asgi import Disconnected

__all__ = ["Failure", "failure_of", "outcome_of"]

_RETRY_AFTER = "1"  # seconds
_STATUSES: dict[type[Exception], int] = {
    InvalidRequestError: 400,
    SupersededError: 409,
    ServerOverloadedError: 429,
    NoFreeSlotError: 429,
    ClientBusyError: 429,
    ServerPausedError: 503,
    ServerClosedError: 503,
    ServerNotRunningError: 503,
    ClientClosedError: 503,
    PeerDiedError: 503,
    DeadlineExceededError: 504,
}
_TEMPORARY = (ServerOverloadedError, NoFreeSlotError, ClientBusyError, ServerPausedError)

_log = logging.getLogger("aioinfer.web")


class Failure(NamedTuple):
    """What a caller is told.

    Attributes:
        status: of the HTTP reply.
        message: in one line, or with a traceback where the app is being debugged.
        retry_after: seconds after which the caller may ask again, where it may.
        error_id: under which the log has the error, where it is the model's.
    """

    status: int
    message: str
    retry_after: str | None = None
    error_id: str | None = None

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Of an HTTP reply that tells of it."""
        headers = []
        if self.retry_after is not None:
            headers.append((b"retry-after", self.retry_after.encode()))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        return headers


_OUTCOMES = {409: "superseded", 429: "rejected", 503: "rejected", 504: "expired"}


def outcome_of(error: BaseException | None) -> str:
    """How a request counts that ended with this error, or with a reply."""
    if error is None:
        return "ok"
    if isinstance(error, Disconnected):
        return "cancelled"
    status = _status_of(error)
    return _OUTCOMES.get(status, "error" if status >= 500 else "invalid")


def _status_of(error: BaseException) -> int:
    if isinstance(error, Refusal):
        return error.status
    return next((status for kind, status in _STATUSES.items() if isinstance(error, kind)), 500)


def failure_of(error: BaseException, *, debug: bool = False) -> Failure:
    """What a caller is told of an error; one of the model's is logged with its traceback.

    Args:
        error: that ended the request.
        debug: whether callers get tracebacks.
    """
    status = _status_of(error)
    if status != 500:
        return Failure(status, _readable(str(error)), _RETRY_AFTER if isinstance(error, _TEMPORARY) else None)
    error_id = secrets.token_hex(4)
    _log.error("error %s: the model failed", error_id, exc_info=error)
    message = f"{describe(error)} (error id {error_id})"
    if debug:
        message += "\n" + "".join(traceback.format_exception(error))
    return Failure(500, _readable(message), error_id=error_id)


def _readable(message: str) -> str:
    """A message that every protocol can carry: UTF-8 has no lone surrogates."""
    return message.encode("utf-8", "backslashreplace").decode()
