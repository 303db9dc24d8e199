"""The protocol of robots, openpi's: WebSocket messages of msgpack, in which arrays are maps.

The server speaks first: its metadata. Then each observation, a map in a binary message, gets one reply, in the order in
which they came; a caller need not wait for one before it sends the next. What goes wrong with an observation is its own
reply, and the connection goes on. Which kind of client it is, the path and the message tell:

==============================  =======================  ================================  =========================
client                          reply                    error                             reply to a reset
==============================  =======================  ================================  =========================
openpi, and SGLang              a map of arrays, with    text                              they have none
                                ``server_timing``
RoboArena: the message has      the array ``actions``    text                              text,
``"endpoint"``                                                                             ``"reset successful"``
vLLM-Omni, by its path          the array, or a map of   a map, ``{"type": "error",        a map, ``{"status":
                                arrays if there are      "message": ...}``                 "reset successful"}``
                                several
==============================  =======================  ================================  =========================

SGLang's own server reports errors in a map too, but nobody looks for it: its path is for the clients of openpi, and
these, like SGLang's own, take a text for an error and any map for a reply. Clients of vLLM-Omni unpack every message,
and do look.

``"session_id"`` names a session, which may outlive its connection; without one, the connection is the session. A reset
starts it anew, and may carry a ``"seed"``.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase, is_non_tensor

from aioinfer.batching import Caller
from aioinfer.errors import InvalidRequestError, ModelError
from aioinfer.tensors import entries as entries_of
from aioinfer.tensors import is_nested
from aioinfer.web.arrays import packb, unpackb
from aioinfer.web.asgi import Disconnected
from aioinfer.web.backend import PendingReply
from aioinfer.web.failures import Failure
from aioinfer.web.front import Front
from aioinfer.web.plain_requests import PlainRequest, PlainRequests
from aioinfer.web.sessions import Session
from aioinfer.web.submission import tells_callers
from aioinfer.web.websocket import GOING_AWAY, WebSocketConnection, WebSocketSession

__all__ = ["OPENPI", "ROBOARENA", "VLLM_OMNI", "Dialect", "RobotSession"]

Message = bytes | str

_ENDPOINTS = (None, "infer", "reset")
_ENDPOINT_TYPES = (type(None), str)
_LONGEST_NAME = 256  # of a session


class Dialect(ABC):
    """How one kind of clients is answered."""

    @abstractmethod
    def reply(self, entries: dict[str, Any], timing: Mapping[str, float]) -> Message:
        """Pack a reply.

        Args:
            entries: of one row, by name.
            timing: of its request, in milliseconds.

        Raises:
            ModelError: this kind of client can't be told such a reply.
            TypeError: messages can't carry one of the entries.
        """

    def failure(self, failure: Failure) -> Message:
        """Tell what went wrong."""
        return failure.message.encode("utf-8", "backslashreplace").decode()

    def reset(self) -> Message:
        """Tell that the session starts anew."""
        return "reset successful"


class _OpenPI(Dialect):
    def reply(self, entries: dict[str, Any], timing: Mapping[str, float]) -> Message:
        return packb({**entries, "server_timing": timing})


class _RoboArena(Dialect):
    def reply(self, entries: dict[str, Any], timing: Mapping[str, float]) -> Message:
        if "actions" not in entries:
            raise ModelError(f'clients of RoboArena get the entry "actions", and the policy wrote {list(entries)}')
        return packb(entries["actions"])


class _VLLMOmni(Dialect):
    def reply(self, entries: dict[str, Any], timing: Mapping[str, float]) -> Message:
        arrays = {name: value for name, value in entries.items() if isinstance(value, np.ndarray)}
        return packb(*arrays.values()) if len(arrays) == 1 else packb(arrays)

    def failure(self, failure: Failure) -> Message:
        return packb({"type": "error", "message": super().failure(failure)})

    def reset(self) -> Message:
        return packb({"status": "reset successful"})


OPENPI, ROBOARENA, VLLM_OMNI = _OpenPI(), _RoboArena(), _VLLMOmni()


class _Turn(PlainRequest):
    """A message of a robot, which is answered in its turn.

    Args:
        session: of the robot.
        dialect: that it is answered in.
        received_at: when it had arrived.

    Attributes:
        pending: the request, if it is asked by itself.
        outcome: of the request, once there is one.
        message: that it is answered with, once it is known.
    """

    __slots__ = ("_session", "dialect", "message", "outcome", "pending")

    def __init__(self, session: RobotSession, dialect: Dialect, received_at: float) -> None:
        super().__init__(received_at)
        self._session = session
        self.dialect = dialect
        self.pending: PendingReply | None = None
        self.outcome: TensorDictBase | Exception | None = None
        self.message: Message | None = None

    @property
    def protocol(self) -> str:
        return self._session.protocol

    def prepare(self, outcome: TensorDictBase | Exception) -> None:
        self.outcome = outcome
        self._session.next_message()  # which may be this one's

    def answer(self) -> None:
        self._session.answer()


class RobotSession(WebSocketSession):
    """One connection of a robot: what it asks is answered in order.

    It is not read where it has asked as much as it may without having been answered.

    Args:
        connection: not accepted yet.
        front: answers.
        plain_requests: asks, where neither the session of a request matters nor a deadline, and the server learns all
            the same who asks.
        greeting: the first message.
        dialect: of messages without ``"endpoint"``.
    """

    protocol = "openpi"

    def __init__(
        self,
        connection: WebSocketConnection,
        front: Front,
        plain_requests: PlainRequests,
        greeting: bytes,
        dialect: Dialect,
    ) -> None:
        super().__init__(connection)
        self._front = front
        self._plain_requests = plain_requests
        backend = front.backend
        self._asks_plainly = backend.deadline is None and not front.keeps_sessions and tells_callers(backend)
        self._dialect = dialect
        self._caller = Caller()
        self._session = Session()
        self._session_name: str | None = None
        first = _Turn(self, dialect, 0.0)
        first.message = greeting
        self._turns = deque([first])
        self._bytes = 0  # of the messages that wait for their turn
        self._ready = asyncio.Event()  # set where the task that writes has something to send
        self._taken = asyncio.Event()
        self._draining = False
        self._previous_ms: float | None = None

    async def run(self) -> None:
        """Serve until the caller goes."""
        try:
            await self.connection.accept()
            if self._asks_plainly:  # else the server takes the task that reads for the caller
                self.connection.on_message(self._receive_now)
            self.answer()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read())
                tasks.create_task(self._write())
        except* Disconnected:
            pass
        finally:
            while self._turns:
                turn = self._end_turn()
                if turn.pending is not None:
                    turn.pending.cancel()
                elif turn.message is None:
                    self._plain_requests.cancel(turn)

    async def drain(self) -> None:
        self._draining = True
        while self._turns:
            self._taken.clear()
            await self._taken.wait()
        await self.connection.close(GOING_AWAY, self._front.draining)

    # -- what the robot asks ---------------------------------------------------------------------------

    async def _read(self) -> None:
        """Receive what :meth:`_receive_now` does not take, or is not offered."""
        while True:
            self._take(await self.connection.receive())
            while not self._has_room():
                self._taken.clear()
                await self._taken.wait()

    def _receive_now(self, message: bytes) -> bool:
        """Take a message as it comes, if there is room for another one then, which the task that reads may receive."""
        if not self._has_room(1, len(message)):
            return False
        self._take(message)
        return True

    def _has_room(self, turns: int = 0, size: int = 0) -> bool:
        """Whether there is room for a message, behind those that are there and some more."""
        limits = self._front.limits
        return (
            len(self._turns) + turns < limits.max_pending_per_connection
            and self._bytes + size < limits.max_message_size
        )

    def _take(self, message: Message) -> None:
        """Ask what a message asks, or answer it."""
        if self._draining:
            return
        turn = _Turn(self, self._dialect, time.perf_counter())
        self._turns.append(turn)
        try:
            self._front.bytes_in_flight.add(len(message))
            turn.size = len(message)
            self._bytes += turn.size
            self._read_message(turn, message)
        except Exception as error:
            self._front.count_refusal(self.protocol, error)
            turn.message = turn.dialect.failure(self._front.failure_of(error))
        if turn.message is not None:
            self.answer()

    def _read_message(self, turn: _Turn, message: Message) -> None:
        if isinstance(message, str):
            raise InvalidRequestError("an observation is a binary message of msgpack, this is a text")
        entries = unpackb(message)
        if type(entries) is not dict:
            raise InvalidRequestError(f"an observation is a map, got {type(entries).__name__}")
        endpoint = entries.pop("endpoint", None)
        if endpoint is not None and turn.dialect is OPENPI:
            turn.dialect = ROBOARENA
        if type(endpoint) not in _ENDPOINT_TYPES or endpoint not in _ENDPOINTS:
            raise InvalidRequestError(f'the endpoint is "infer" or "reset", got {str(endpoint)[:50]!r}')
        self._choose_session(entries)
        if endpoint == "reset":
            seed = entries.get("seed")
            self._session.reset(None if seed is None else _integer("seed", seed))
            turn.message = turn.dialect.reset()
        elif self._asks_plainly:
            self._plain_requests.ask(turn, entries, self._caller)
        else:
            turn.pending = self._front.submit(
                entries, protocol=self.protocol, size=turn.size, received_at=turn.received_at, session=self._session
            )
            turn.pending.future.add_done_callback(partial(self._answer_pending, turn, turn.pending))

    def _choose_session(self, entries: dict[Any, Any]) -> None:
        """Go to the session that a message names; without a name, the connection stays in the one that it is in."""
        given = entries.get("session_id")
        if given is None:
            return
        if "session_id" not in self._front.in_keys:
            del entries["session_id"]
        name = given if isinstance(given, str) else str(_integer("session_id", given))
        if len(name) > _LONGEST_NAME:
            raise InvalidRequestError(f"a session_id has at most {_LONGEST_NAME} characters, got {len(name)}")
        self._session = self._front.sessions.find(name)
        if self._dialect is VLLM_OMNI and self._session_name not in (None, name):
            self._session.reset()
        self._session_name = name

    # -- what it is answered ---------------------------------------------------------------------------

    def _answer_pending(self, turn: _Turn, pending: PendingReply, _: object) -> None:
        turn.outcome = pending.outcome()
        self.answer()

    def answer(self) -> None:
        """Send what is ready, in order, as long as there is room: a task would have to be woken for each reply."""
        while (message := self.next_message()) is not None:
            if not self.connection.send_now(message):
                self._ready.set()
                return
            self._end_answered_turn()

    async def _write(self) -> None:
        """Send what has to wait for room."""
        while True:
            await self._ready.wait()
            self._ready.clear()
            while (message := self.next_message()) is not None:
                await self.connection.send(message)
                self._end_answered_turn()

    def next_message(self) -> Message | None:
        """What is sent next, which is packed now if it was not before; ``None``: it is not there yet."""
        if not self._turns:
            return None
        turn = self._turns[0]
        if turn.message is None and turn.outcome is not None:
            turn.message = self._message(turn, turn.outcome)
        return turn.message

    def _message(self, turn: _Turn, outcome: TensorDictBase | Exception) -> Message:
        try:
            if isinstance(outcome, Exception):
                raise outcome
            timing = {"infer_ms": _ms_since(turn.received_at)}
            if self._previous_ms is not None:
                timing["prev_total_ms"] = self._previous_ms
            return turn.dialect.reply(to_entries(outcome), timing)
        except Exception as error:
            return turn.dialect.failure(self._front.failure_of(error))

    def _end_answered_turn(self) -> None:
        turn = self._end_turn()
        if turn.outcome is not None:
            self._previous_ms = _ms_since(turn.received_at)

    def _end_turn(self) -> _Turn:
        turn = self._turns.popleft()
        self._bytes -= turn.size
        self._front.bytes_in_flight.remove(turn.size)
        self._taken.set()
        return turn


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1000


def _integer(name: str, value: Any) -> int:
    """An integer that a robot has sent in any form: plain, or as an array of one element.

    Raises:
        InvalidRequestError: it is none that 64 bits hold.
    """
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise InvalidRequestError(f"{name} is an integer of 64 bits, got {str(value)[:50]!r}")
    return value


def to_entries(reply: TensorDictBase) -> dict[str, Any]:
    """The entries of a reply to one row: arrays, and plain numbers where they are of no dimension.

    Clients take every array for a sequence of actions, one for each step.
    """
    return {name: _value(value) for name, value in entries_of(reply).items()}


def _value(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.ndim == 0:
            return value.item()
        return (value.float() if value.dtype is torch.bfloat16 else value).numpy()  # numpy has no bfloat16
    if is_nested(value):
        return to_entries(value)
    return value.tolist() if is_non_tensor(value) else value
