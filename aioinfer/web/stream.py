"""The protocol of :func:`aioinfer.connect`: many requests under way on one WebSocket, many in one message."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from tensordict import TensorDictBase

from aioinfer.errors import InvalidRequestError
from aioinfer.interaction_type import MODES, requests_carry
from aioinfer.transports.network.messages import Payload, decode_message, encode_message, group_payloads
from aioinfer.web.asgi import Disconnected
from aioinfer.web.front import Front
from aioinfer.web.websocket import GOING_AWAY, WebSocketConnection, WebSocketSession

__all__ = ["StreamSession"]


class StreamSession(WebSocketSession):
    """One connection of a client process.

    Args:
        connection: accepted here.
        front: answers.
    """

    protocol = "stream"

    def __init__(self, connection: WebSocketConnection, front: Front) -> None:
        super().__init__(connection)
        self._front = front
        self._client = front.backend.client()
        self._loop = asyncio.get_running_loop()
        self._pending: dict[int, asyncio.Future[TensorDictBase]] = {}
        self._settled: list[tuple[int, asyncio.Future[TensorDictBase]]] = []
        self._errors: list[tuple[int, str, str]] = []
        self._outbox: list[bytes] = []
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Serve until the caller goes."""
        await self.connection.accept()
        writing = asyncio.create_task(self._write())
        try:
            while True:
                self._take(await self.connection.receive())
        except Disconnected:
            pass
        finally:
            for future in list(self._pending.values()):
                future.cancel()
            writing.cancel()
            await asyncio.wait([writing])

    async def drain(self) -> None:
        await self.connection.close(GOING_AWAY, self._front.draining)

    def _take(self, message: bytes | str) -> None:
        if isinstance(message, str):
            raise Disconnected
        header, groups = decode_message(message)
        for about, payloads in groups:
            with requests_carry(MODES[about["mode"]]):  # type: ignore[arg-type]
                self._submit(about["numbers"], payloads)
        for number in header["cancelled"]:
            if (future := self._pending.pop(number, None)) is not None:
                future.cancel()

    def _submit(self, numbers: Sequence[int], payloads: Sequence[Payload]) -> None:
        submit, pending, done = self._client.submit, self._pending, self._done
        for number, payload in zip(numbers, payloads, strict=True):
            try:
                future = submit(payload)
            except InvalidRequestError as error:
                self._fail(number, error)
                continue
            pending[number] = future
            future.add_done_callback(partial(done, number))

    def _done(self, number: int, future: asyncio.Future[TensorDictBase]) -> None:
        if self._pending.pop(number, None) is None:
            return
        if not self._settled:
            self._loop.call_soon(self._flush)
        self._settled.append((number, future))

    def _fail(self, number: int, error: Exception) -> None:
        if not self._errors:
            self._loop.call_soon(self._flush)
        self._errors.append((number, type(error).__qualname__, self._front.failure_of(error).message))

    def _flush(self) -> None:
        settled, self._settled = self._settled, []
        errors, self._errors = self._errors, []
        numbers, replies = [], []
        for number, future in settled:
            error = future.exception()
            if error is None:
                numbers.append(number)
                replies.append(future.result())
            else:
                errors.append((number, type(error).__qualname__, self._front.failure_of(error).message))
        groups = [({"numbers": [numbers[i] for i in group.indices]}, group) for group in group_payloads(replies)]
        self._outbox.append(encode_message({"errors": errors}, groups))
        self._changed.set()

    async def _write(self) -> None:
        try:
            while True:
                if not self._outbox:
                    self._changed.clear()
                    await self._changed.wait()
                messages, self._outbox = self._outbox, []
                for message in messages:
                    await self.connection.send(message)
        except Disconnected:
            pass
