"""HTTP callers: connections of one event loop, each of which asks again at its reply."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import numpy as np

from aioinfer.bench.report import Figures, percentiles
from aioinfer.bench.workloads import Job, Protocol, Serving, System, named

__all__ = ["measure"]

_PATHS = {System.OURS: "/v2/models/policy/infer", System.LITSERVE: "/predict", System.MOSEC: "/inference"}
_OBSERVATION = 64  # numbers, of the mlp
_TURNS = 4  # without idle connections, and beside them


def measure(job: Job, serving: Serving, port: int) -> Figures:
    """``rate``, ``p50`` and ``p99``; beside idle connections and slow senders, also ``quiet p99`` without, by turns."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        from asyncio import new_event_loop  # type: ignore[assignment]
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_measure(job, serving, port))


async def _measure(job: Job, serving: Serving, port: int) -> Figures:
    request = _make_request(System(job.system), serving, port)
    callers = named(job.workload).callers
    if not serving.idle_connections:
        latencies = await _load(request, port, callers, job.warm_up, job.seconds)
        return {"rate": len(latencies) / job.seconds, **percentiles(latencies)}
    quiet: list[float] = []
    beside: list[float] = []
    seconds = job.seconds / 2
    for _ in range(_TURNS):  # a drift of the machine affects both
        quiet += await _load(request, port, callers, job.warm_up, seconds / _TURNS)
        async with AsyncExitStack() as stack:
            await _open_idle(stack, port, serving)
            beside += await _load(request, port, callers, job.warm_up, seconds / _TURNS)
    return {"rate": len(beside) / seconds, **percentiles(beside), "quiet p99": percentiles(quiet)["p99"]}


def _make_request(system: System, serving: Serving, port: int) -> bytes:
    observation = np.random.default_rng(0).random(_OBSERVATION, np.float32)
    header = b""
    if system in (System.LITSERVE, System.MOSEC):
        body = json.dumps({"observation": observation.tolist()}).encode()
    else:
        tensor: dict[str, Any] = {"name": "observation", "shape": [1, _OBSERVATION], "datatype": "FP32"}
        if serving.protocol is Protocol.HTTP_JSON:
            body = json.dumps({"inputs": [{**tensor, "data": observation.tolist()}]}).encode()
        else:
            tensor["parameters"] = {"binary_data_size": observation.nbytes}
            head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
            header = b"Inference-Header-Content-Length: %d\r\n" % len(head)
            body = head + observation.tobytes()
    path = _PATHS.get(system, "/")
    head_line = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n".encode()
    return head_line + header + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def _load(request: bytes, port: int, callers: int, warm_up: float, seconds: float) -> list[float]:
    """The latencies of callers in a closed loop, but for those of the warm-up."""
    begins = time.perf_counter() + warm_up
    ends = begins + seconds
    latencies: list[float] = []
    loop = asyncio.get_running_loop()
    ended = [loop.create_future() for _ in range(callers)]

    def protocol(done: asyncio.Future[None]) -> Callable[[], _Caller]:
        return lambda: _Caller(request, latencies, begins, ends, done)

    for done in ended:
        await loop.create_connection(protocol(done), "127.0.0.1", port)
    await asyncio.gather(*ended)
    return latencies


class _Caller(asyncio.Protocol):
    """One connection, which reads no more of a reply than it must, so that the server is what is measured."""

    def __init__(
        self, request: bytes, latencies: list[float], begins: float, ends: float, done: asyncio.Future[None]
    ) -> None:
        self._request = request
        self._latencies = latencies
        self._begins, self._ends = begins, ends
        self._done = done
        self._received = b""
        self._started = 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._started = time.perf_counter()
        if self._started >= self._ends:
            self._done.set_result(None)
            self._transport.close()
        else:
            self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator or len(body) < _content_length(head):
            return
        if not head.startswith(b"HTTP/1.1 200"):
            self._done.set_exception(RuntimeError(f"the server answered {self._received[:300]!r}"))
            return
        self._received = b""
        if self._started >= self._begins:
            self._latencies.append(time.perf_counter() - self._started)
        self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(RuntimeError(f"the server closed a connection: {error}"))


def _content_length(head: bytes) -> int:
    _, _, rest = head.lower().partition(b"\r\ncontent-length:")
    return int(rest.partition(b"\r\n")[0])


async def _open_idle(stack: AsyncExitStack, port: int, serving: Serving) -> None:
    """Connections that never finish the head of a request, and senders of a body that go on byte by byte."""
    writers: list[asyncio.StreamWriter] = []
    for number in range(serving.idle_connections + serving.slow_senders):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        stack.callback(writer.close)
        if number < serving.idle_connections:
            writer.write(b"POST /act HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        else:
            writer.write(b"POST /act HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n")
            writers.append(writer)
    sending = asyncio.create_task(_send_slowly(writers))
    stack.push_async_callback(_cancel, sending)


async def _send_slowly(writers: Sequence[asyncio.StreamWriter]) -> None:
    while True:
        for writer in writers:
            writer.write(b" ")
        await asyncio.sleep(0.1)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
