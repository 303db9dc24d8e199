"""Robots: each a process with a blocking connection, as openpi's client has it."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from websockets.sync.client import connect

from aioinfer.bench.peer_process import PeerProcess, Pipe
from aioinfer.bench.report import Figures, percentiles
from aioinfer.bench.serving.policies import ACTIONS_SHAPE, make_observation
from aioinfer.bench.workloads import Job, Serving, named
from aioinfer.web.arrays import packb, unpackb

__all__ = ["measure"]


class _Robot:
    """A client with the calls of openpi's ``WebsocketClientPolicy``."""

    def __init__(self, port: int) -> None:
        self._connection = connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None)
        self.metadata = unpackb(_binary(self._connection.recv()))

    def infer(self, observation: dict[str, Any]) -> Any:
        self._connection.send(packb(observation))
        return unpackb(_binary(self._connection.recv()))

    def close(self) -> None:
        self._connection.close()


def _binary(message: str | bytes) -> bytes:
    if isinstance(message, str):
        raise RuntimeError(f"the server failed: {message}")
    return message


def measure(job: Job, serving: Serving, port: int) -> Figures:
    """``rate``, ``p50``, ``p99``, and ``median`` in milliseconds, of robots in a closed loop."""
    with ExitStack() as stack:
        robots = [
            stack.enter_context(PeerProcess(_run, serving, port, fork=True)) for _ in range(named(job.workload).callers)
        ]
        begins = time.perf_counter() + job.warm_up  # all processes of a machine have one such clock
        for robot in robots:
            robot.send((begins, begins + job.seconds))
        times = [latency for robot in robots for latency in robot.answer()]
    figures = percentiles(times)
    return {"rate": len(times) / job.seconds, **figures, "median": figures["p50"] * 1e3}


def _run(pipe: Pipe, serving: Serving, port: int) -> None:
    observation = make_observation(serving)
    robot = _Robot(port)
    pipe.send("ready")
    begins, ends = pipe.recv()
    latencies: list[float] = []
    while (started := time.perf_counter()) < ends:
        actions = robot.infer(observation)["actions"]
        done = time.perf_counter()
        if actions.shape != ACTIONS_SHAPE:
            raise RuntimeError(f"the actions have shape {actions.shape}")
        if started >= begins:
            latencies.append(done - started)
    pipe.send(latencies)
    robot.close()
