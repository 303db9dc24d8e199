"""The protocol of :func:`aioinfer.connect`: many requests under way on one WebSocket, many in one message.

``aioinfer/transports/network/protocol.py`` says what its messages say, and ``messages.py`` there how they are written.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from tensordict import TensorDictBase

from aioinfer.batching import Caller
from aioinfer.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelError,
    ServerClosedError,
    ServerOverloadedError,
)
from aioinfer.interaction_type import Mode
from aioinfer.transports.network.errors import pack_error
from aioinfer.transports.network.messages import (
    Payload,
    check_numbers,
    columns_size,
    decode_group,
    decode_header,
    encode_message,
    group_payloads,
)
from aioinfer.transports.network.protocol import MODES_BY_NAME, PROTOCOL
from aioinfer.web.asgi import Disconnected
from aioinfer.web.failures import outcome_of
from aioinfer.web.front import Front
from aioinfer.web.submission import Asked, submission_to
from aioinfer.web.websocket import GOING_AWAY, POLICY_VIOLATION, WebSocketConnection, WebSocketSession

__all__ = ["StreamSession"]

_MESSAGE_BYTES = 2**20  # of tensors in a message of several replies
_MOST_CALLERS = 4096  # of a connection that are known as such; then all of them are forgotten
_MOST_REFUSED = 2**20  # that one message may count
_MOST_COMPLAINT = 1024  # characters
_ERRORS_LENGTH = 2**18  # characters of the errors in one message
_PATIENCE = 2  # times as many requests as there may be: then a client that does not read their errors is closed


class _Message:
    """A message of requests, until all of them have ended."""

    __slots__ = ("left", "received_at", "requests", "size", "timers")

    def __init__(self, size: int, received_at: float, requests: int) -> None:
        self.size = size
        self.received_at = received_at
        self.requests = self.left = requests
        self.timers: list[asyncio.TimerHandle] = []


class _Request:
    """A request, until its reply is sent; it is the receiver of its reply."""

    __slots__ = ("message", "number", "settled")

    def __init__(self, number: int, message: _Message) -> None:
        self.number = number
        self.message = message
        self.settled = False

    def done(self) -> bool:
        """Whether it has an outcome, or its caller is gone. Any thread."""
        return self.settled


_Reply: TypeAlias = tuple[_Request, TensorDictBase]
_PackedError: TypeAlias = tuple[int, str, str, str]  # the number of a request, and a WireError


class StreamSession(WebSocketSession):
    """One connection of a client process.

    It is read at all times, so that it is noticed when the caller is gone: a client knows how many requests it may have
    under way, and what goes beyond is refused. A request counts until its reply is written to the network, so a
    client that does not read gets no more of them.

    Args:
        connection: accepted here.
        front: answers.
    """

    protocol = "stream"

    def __init__(self, connection: WebSocketConnection, front: Front) -> None:
        super().__init__(connection)
        self._front = front
        self._loop = asyncio.get_running_loop()
        self._submission = submission_to(front.backend, self._settle)
        self._pending: dict[int, _Request] = {}  # by number
        self._callers: dict[int, Caller] = {}
        self._replies: list[_Reply] = []  # to be sent
        self._errors: list[tuple[_Request, Exception]] = []
        self._malformed: list[str] = []
        self._to_send = asyncio.Event()
        self._sent = asyncio.Event()

    async def run(self) -> None:
        await self.connection.accept()
        limits = self._front.limits
        hello = {
            "protocol": PROTOCOL,
            "policy": self._front.name,
            "max_message_size": limits.max_message_size,
            "max_pending": limits.max_pending_per_connection,
        }
        await self.connection.send(encode_message(hello))
        tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            for request in list(self._pending.values()):
                self._cancel(request)
            await asyncio.wait(tasks)

    async def drain(self) -> None:
        asked = set(self._pending)
        while not asked.isdisjoint(self._pending):
            self._sent.clear()
            await self._sent.wait()
        await self.connection.close(GOING_AWAY, self._front.draining)

    # -- requests --------------------------------------------------------------------------------------

    async def _read(self) -> None:
        try:
            while True:
                if not self._take(await self.connection.receive()):
                    await self.connection.close(POLICY_VIOLATION, "requests are sent while the errors are not read")
                    return
        except Disconnected:
            pass

    def _take(self, data: bytes | str) -> bool:
        """Ask what a message asks; return whether the client may say more."""
        received_at = time.perf_counter()
        try:
            if isinstance(data, str):
                raise InvalidRequestError("the message is malformed: a text")
            header, groups, position = decode_header(data)
            cancelled, refused = _checked_header(header)
            for about in groups:
                _check_group(about)
            numbers = [number for about in groups for number in about["numbers"]]
            if len(set(numbers)) < len(numbers) or not self._pending.keys().isdisjoint(numbers):
                raise InvalidRequestError("the message is malformed: it has the number of another request")
        except InvalidRequestError as error:
            self._front.count_refusal(self.protocol, error)
            self._malformed = self._malformed or [str(error)[:_MOST_COMPLAINT]]
            self._to_send.set()
            return True
        for number in cancelled:
            if (request := self._pending.get(number)) is not None:
                self._cancel(request)
        self._count_refused(refused)
        if not numbers:
            return True
        limit = self._front.limits.max_pending_per_connection
        count = len(self._pending) + len(numbers)
        if count > _PATIENCE * limit:
            return False
        message = _Message(len(data), received_at, len(numbers))
        requests = [_Request(number, message) for number in numbers]
        self._pending.update(zip(numbers, requests, strict=True))
        try:
            self._front.bytes_in_flight.add(message.size)
        except ServerOverloadedError as error:
            message.size = 0
            self._settle(requests, [error] * len(requests))
            return True
        try:
            if self._front.draining:
                raise ServerClosedError(self._front.draining)
            if count > limit:
                raise ServerOverloadedError(f"a connection has at most {limit} requests under way")
            asked = self._asked(data, groups, position, requests)
        except (InvalidRequestError, ServerClosedError, ServerOverloadedError) as error:
            self._settle(requests, [error] * len(requests))
        else:
            self._submission.submit(asked)
        return True

    def _asked(
        self, data: bytes, groups: Sequence[Mapping[str, Any]], position: int, requests: Sequence[_Request]
    ) -> list[Asked]:
        """Decode the requests of a message; those of a group that can't be read fail.

        Raises:
            InvalidRequestError: nothing of the message can be read.
        """
        asked: list[Asked] = []
        first = 0
        for about in groups:
            own = requests[first : first + len(about["numbers"])]
            first += len(own)
            try:
                mode = _mode_of(about)
                payloads, end = decode_group(about, data, position)
            except InvalidRequestError as error:
                self._settle(own, [error] * len(own))
                position += columns_size(about)
                continue
            position = end
            callers = map(self._caller, about["callers"])
            asked += [
                Asked(payload, request, mode, about["wait"], caller)
                for payload, request, caller in zip(payloads, own, callers, strict=True)
            ]
            self._set_deadline(own, about["deadline"])
        if position != len(data):
            raise InvalidRequestError(f"the message has {len(data)} bytes, {position} were expected")
        if len(groups) > 1:
            asked.sort(key=lambda one: one.receiver.number)  # type: ignore[attr-defined]
        return asked

    def _caller(self, number: int) -> Caller | None:
        if not number:
            return None
        caller = self._callers.get(number)
        if caller is None:
            if len(self._callers) >= _MOST_CALLERS:
                self._callers.clear()
            caller = self._callers[number] = Caller()
        return caller

    def _set_deadline(self, requests: Sequence[_Request], deadline: float | None) -> None:
        default = self._front.backend.deadline
        seconds = default if deadline is None else deadline
        if seconds is not None and requests:
            left = requests[0].message.received_at + seconds - time.perf_counter()
            self._look(requests, seconds, left / 2)

    def _look(self, requests: Sequence[_Request], seconds: float, most_spared: float) -> None:
        """End requests whose deadline has passed, or that wait and can't be answered in time; see :class:`Deadline`."""
        requests = [request for request in requests if not request.settled]
        if not requests:
            return
        message = requests[0].message
        left = message.received_at + seconds - time.perf_counter()
        needed = min(self._submission.least_seconds, most_spared)
        late = requests
        if left > 0:
            late = [one for one in requests if self._submission.withdraw(one)] if left <= needed else []
            wait = left - needed if left > needed else left
            message.timers.append(self._loop.call_later(wait, self._look, requests, seconds, most_spared))
        error = DeadlineExceededError(f"no reply within {seconds:g} seconds of the request's arrival")
        self._settle(late, [error] * len(late))
        for request in late:
            self._submission.cancel(request)

    def _cancel(self, request: _Request) -> None:
        """Nobody waits for the reply any more."""
        if not request.settled:
            request.settled = True
            self._submission.cancel(request)
        self._end(request, "cancelled")

    def _count_refused(self, count: int) -> None:
        """Count requests that a client has refused itself."""
        self._front.stats.requests[self.protocol, "invalid"] += count
        self._submission.count_rejections(count)

    # -- replies ---------------------------------------------------------------------------------------

    def _settle(self, requests: Sequence[_Request], outcomes: Sequence[TensorDictBase | Exception]) -> None:
        for request, outcome in zip(requests, outcomes, strict=True):
            if request.settled:
                continue
            request.settled = True
            if isinstance(outcome, Exception):
                self._errors.append((request, outcome))
            else:
                self._replies.append((request, outcome))
        self._to_send.set()

    async def _write(self) -> None:
        try:
            while True:
                await self._to_send.wait()
                self._to_send.clear()
                while self._replies or self._errors or self._malformed:
                    await self._send_some()
        except Disconnected:
            pass

    async def _send_some(self) -> None:
        replies, self._replies = _cut(self._replies)
        errors, self._errors = self._errors, []
        malformed, self._malformed = self._malformed, []
        messages = self._encoded(replies, errors) if replies else []
        if errors:
            packed = [self._packed(request, error) for request, error in errors]
            messages += [encode_message({"errors": some}) for some in _portions(packed)]
        if malformed:
            messages.append(encode_message({"errors": [], "malformed": malformed[0]}))
        for message in messages:
            await self.connection.send(message)
        for request, _ in replies:
            self._end(request, "ok")
        for request, error in errors:
            self._end(request, outcome_of(error))

    def _encoded(self, replies: list[_Reply], errors: list[tuple[_Request, Exception]]) -> list[bytes]:
        """Write replies into one message, or into several where one does not travel, which becomes an error."""
        try:
            groups = group_payloads([reply for _, reply in replies])
            numbered = [({"numbers": [replies[index][0].number for index in group.indices]}, group) for group in groups]
            return [encode_message({"errors": []}, numbered)]
        except Exception as error:  # whatever the entries of a reply are
            if len(replies) > 1:
                middle = len(replies) // 2
                halves = replies[:middle], replies[middle:]
                messages = [message for half in halves for message in self._encoded(half, errors)]
                replies[:] = halves[0] + halves[1]
                return messages
            failed = ModelError(f"the reply does not travel to another machine: {error}")
            failed.__cause__ = error
            errors.append((replies.pop()[0], failed))
            return []

    def _packed(self, request: _Request, error: Exception) -> _PackedError:
        failure = self._front.failure_of(error)
        note = ""
        if failure.error_id is not None:
            note = failure.message if self._front.debug else f"error id {failure.error_id}"
        return (request.number, *pack_error(error, note=note))

    def _end(self, request: _Request, outcome: str) -> None:
        """Count a request, and the bytes of its message no more once it is the last one."""
        if self._pending.pop(request.number, None) is None:
            return
        message = request.message
        seconds = time.perf_counter() - message.received_at
        self._front.stats.count(self.protocol, outcome, message.size // message.requests, seconds)
        message.left -= 1
        if not message.left:
            self._front.bytes_in_flight.remove(message.size)
            for timer in message.timers:
                timer.cancel()
        self._sent.set()


def _cut(replies: list[_Reply]) -> tuple[list[_Reply], list[_Reply]]:
    """Those replies that go into one message, and the others."""
    if not replies:
        return [], []
    count = max(1, _MESSAGE_BYTES // max(1, _size(replies[0][1])))
    return replies[:count], replies[count:]


def _portions(errors: Sequence[_PackedError]) -> Iterator[list[_PackedError]]:
    """The errors that go into one message each."""
    some: list[_PackedError] = []
    length = 0
    for error in errors:
        _, _, text, note = error
        length += len(text) + len(note)
        if some and length > _ERRORS_LENGTH:
            yield some
            some, length = [], len(text) + len(note)
        some.append(error)
    yield some


def _size(reply: Payload) -> int:
    return sum([value.nbytes for value in reply.values() if hasattr(value, "nbytes")])


def _checked_header(header: Mapping[str, Any]) -> tuple[list[int], int]:
    """The numbers of requests that are cancelled, and how many the client has refused."""
    cancelled, refused = header.get("cancelled", []), header.get("refused", 0)
    check_numbers(cancelled)
    if type(refused) is not int or not 0 <= refused <= _MOST_REFUSED:
        raise InvalidRequestError("the message is malformed: it says nothing about refused requests")
    return cancelled, refused


def _mode_of(about: Mapping[str, Any]) -> Mode:
    try:
        return MODES_BY_NAME[about["mode"]]
    except KeyError:
        raise InvalidRequestError(f"this server knows no exploration mode {about['mode'][:50]!r}") from None


def _check_group(about: Mapping[str, Any]) -> None:
    callers, deadline = about.get("callers"), about.get("deadline")
    if (
        not isinstance(callers, list)
        or len(callers) != len(about["numbers"])
        or not all([type(caller) is int for caller in callers])  # noqa: C419 - faster
        or not isinstance(about.get("mode"), str)
        or type(about.get("wait")) is not bool
        or "deadline" not in about
        or not (deadline is None or (type(deadline) in (int, float) and math.isfinite(deadline)))
    ):
        raise InvalidRequestError("the message is malformed: it lacks what is to be said of a group")
