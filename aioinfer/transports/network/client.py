"""Clients over a WebSocket, and the one connection that those of a process share."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

from websockets.asyncio.client import ClientConnection as WebSocket
from websockets.asyncio.client import connect

from aioinfer.client import AsyncInferenceClient
from aioinfer.entries import make_request
from aioinfer.interaction_type import caller_mode, mode_code
from aioinfer.transports.network.messages import decode_message, encode_message, group_payloads


class NetworkConnection:
    def __init__(self, url: str) -> None:
        self.url = url
        self.numbers = itertools.count()
        self.calls: dict[int, Any] = {}
        self._outgoing: deque[Any] = deque()
        self._scheduled: list[bool] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        self._ready.wait(10)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        async with connect(self.url, compression=None, max_size=None) as self._socket:
            self._ready.set()
            writing = asyncio.create_task(self._write(self._socket))
            async for message in self._socket:
                self._receive(message)

    def post(self, requests: Sequence[Any]) -> None:
        self._outgoing.extend(requests)
        if not self._scheduled:
            self._scheduled.append(True)
            self._loop.call_soon_threadsafe(self._changed.set)

    async def _write(self, socket: WebSocket) -> None:
        while True:
            self._changed.clear()
            self._scheduled.clear()
            requests = [self._outgoing.popleft() for _ in range(len(self._outgoing))]
            if requests:
                groups = group_payloads([payload for _, payload, _ in requests])
                await socket.send(
                    encode_message(
                        {"cancelled": []},
                        [
                            (
                                {
                                    "numbers": [requests[i][0] for i in group.indices],
                                    "mode": requests[group.indices[0]][2],
                                },
                                group,
                            )
                            for group in groups
                        ],
                    )
                )
            else:
                await self._changed.wait()

    def _receive(self, message: Any) -> None:
        header, groups = decode_message(message)
        for about, payloads in groups:
            by_loop: dict[Any, Any] = {}
            for number, reply in zip(about["numbers"], payloads):
                call = self.calls.pop(number, None)
                if call is not None:
                    by_loop.setdefault(call[1], []).append((call[0], reply))
            for reader, settled in by_loop.items():
                reader.loop.call_soon_threadsafe(reader.settle, settled)


class Reader:
    def __init__(self, connection: NetworkConnection) -> None:
        self.loop = asyncio.get_running_loop()
        self.connection = connection
        self.outgoing: list[Any] = []

    def send(self, request: Any) -> None:
        if not self.outgoing:
            self.loop.call_soon(self.flush)
        self.outgoing.append(request)

    def flush(self) -> None:
        requests, self.outgoing = self.outgoing, []
        self.connection.post(requests)

    def settle(self, settled: Any) -> None:
        for future, reply in settled:
            if not future.done():
                future.set_result(reply)


class AsyncClient(AsyncInferenceClient):
    def __init__(self, connection: NetworkConnection, reader: Reader) -> None:
        self._connection, self._reader = connection, reader

    def submit(self, td: Any = None, **entries: Any) -> Any:
        td = make_request(td, entries)
        number = next(self._connection.numbers)
        future = self._reader.loop.create_future()
        self._connection.calls[number] = future, self._reader
        self._reader.send((number, td, mode_code(caller_mode())))
        return future

    async def __call__(
        self, td: Any = None, timeout: float | None = None, *, wait: bool = False, **entries: Any
    ) -> Any:
        return await self.submit(td, **entries)
