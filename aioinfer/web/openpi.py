"""The protocol of robots: WebSocket messages of msgpack, as the clients of openpi, RoboArena, vLLM-Omni and SGLang speak.

The first message is the server's: its metadata. Then each observation gets one reply, in the order in which they came: a
map in a binary message, or an error as text, after which the connection goes on. A message with an ``"endpoint"`` is of
RoboArena's dialect: ``infer`` gets the bare actions, ``reset`` a text.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from enum import Enum
from typing import Any

from tensordict import TensorDictBase

from aioinfer.errors import InvalidRequestError, SupersededError
from aioinfer.web.arrays import packb, unpackb
from aioinfer.web.backend import Backend, PendingReply
from aioinfer.web.failures import failure_of
from aioinfer.web.websocket import Disconnected, WebSocketConnection

__all__ = ["Dialect", "RobotSession"]

_MOST_PENDING = 16  # requests of a session, whose replies its caller has not waited for


class Dialect(Enum):
    """Whose clients a path is for."""

    OPENPI = "openpi"
    VLLM_OMNI = "vllm-omni"
    SGLANG = "sglang"


class RobotSession:
    """One connection of a robot: what it asks is answered in order.

    Args:
        connection: accepted here.
        backend: answers.
        dialect: of the path.
        metadata: the first message.
        newest_wins: whether a request takes the place of those before it that have no reply yet.
        debug: whether errors have tracebacks.
    """

    def __init__(
        self,
        connection: WebSocketConnection,
        backend: Backend,
        dialect: Dialect,
        metadata: Mapping[str, Any],
        *,
        newest_wins: bool = False,
        debug: bool = False,
    ) -> None:
        self._connection = connection
        self._backend = backend
        self._dialect = dialect
        self._metadata = metadata
        self._newest_wins = newest_wins
        self._debug = debug
        self._pending: deque[tuple[PendingReply, bool] | bytes | str] = deque()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._previous_seconds: float | None = None

    async def run(self) -> None:
        """Serve until the caller goes."""
        await self._connection.accept()
        await self._connection.send(packb(dict(self._metadata)))
        writing = asyncio.create_task(self._write())
        try:
            while True:
                message = await self._connection.receive()
                self._add(self._take(message))
                while len(self._pending) > _MOST_PENDING:
                    self._room.clear()
                    await self._room.wait()
        except Disconnected:
            pass
        finally:
            for item in self._pending:
                if isinstance(item, tuple):
                    item[0].cancel()
            writing.cancel()
            await asyncio.wait([writing])

    def _add(self, item: tuple[PendingReply, bool] | bytes | str) -> None:
        self._pending.append(item)
        self._changed.set()

    def _take(self, message: bytes | str) -> tuple[PendingReply, bool] | bytes | str:
        received_at = time.perf_counter()
        try:
            if isinstance(message, str):
                raise InvalidRequestError("an observation is a binary message of msgpack, this is text")
            entries = unpackb(message)
            if not isinstance(entries, dict):
                raise InvalidRequestError(f"an observation is a map, got {type(entries).__name__}")
            endpoint = entries.pop("endpoint", None)
            if endpoint == "reset":
                return self._reset()
            if endpoint not in (None, "infer"):
                raise InvalidRequestError(f'the endpoint is "infer" or "reset", got {str(endpoint)[:50]!r}')
            if self._newest_wins:
                self._supersede()
            pending = self._backend.submit(entries, received_at)
        except Exception as error:
            return failure_of(error, debug=self._debug).message
        return pending, endpoint is not None or self._dialect is Dialect.VLLM_OMNI

    def _supersede(self) -> None:
        for item in self._pending:
            if isinstance(item, tuple):
                item[0].withdraw(SupersededError("a newer observation of this session came before the reply"))

    def _reset(self) -> bytes | str:
        if self._dialect is Dialect.VLLM_OMNI:
            return packb({"status": "reset successful"})
        return "reset successful"

    async def _write(self) -> None:
        try:
            while True:
                if not self._pending:
                    self._changed.clear()
                    await self._changed.wait()
                item = self._pending[0]
                if isinstance(item, tuple):
                    item = await self._reply(*item)
                self._pending.popleft()
                self._room.set()
                await self._connection.send(item)
        except Disconnected:
            pass  # the task that receives is told

    async def _reply(self, pending: PendingReply, bare: bool) -> bytes | str:
        try:
            reply = to_entries(await pending.reply())
            if bare:
                return packb(reply["actions"])
            seconds = time.perf_counter() - pending.received_at
            timing = {"infer_ms": seconds * 1000}
            if self._previous_seconds is not None:
                timing["prev_total_ms"] = self._previous_seconds * 1000
            self._previous_seconds = seconds
            return packb({**reply, "server_timing": timing})
        except Exception as error:
            return failure_of(error, debug=self._debug).message


def to_entries(reply: TensorDictBase) -> dict[str, Any]:
    """The entries of a reply to one row: arrays, and numbers where they are of no dimension."""
    entries: dict[str, Any] = {}
    for name, value in reply.items():
        if isinstance(value, TensorDictBase):
            entries[name] = to_entries(value)
        else:
            entries[name] = value.item() if value.ndim == 0 else value.numpy()
    return entries
