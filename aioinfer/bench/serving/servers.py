"""The process of a server: ``python -m aioinfer.bench.serving.servers SYSTEM WORKLOAD PORT ADDRESS``."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import torch

from aioinfer import InferenceServer, ProcessSlotTransport, ThreadingTransport, cli
from aioinfer.bench.models import Policy
from aioinfer.bench.serving import peers
from aioinfer.bench.serving.policies import WORKLOAD_VARIABLE, make_policy, make_served_policy
from aioinfer.bench.workloads import Job, Protocol, System, Workload, named
from aioinfer.web import create_app

__all__ = ["RunningServer", "running_server"]

_HOST = "127.0.0.1"
_START_LIMIT = 60.0  # seconds
_END_LIMIT = 10.0


class RunningServer(NamedTuple):
    """Where a server listens.

    Attributes:
        port: on the loopback interface.
        address: of its process slots, where it has any.
    """

    port: int
    address: str


@contextmanager
def running_server(job: Job) -> Iterator[RunningServer]:
    """Run the server of a job's system in a process of its own, and end it, and all processes that it has started."""
    with tempfile.TemporaryDirectory(prefix="aioinfer-bench-") as folder:
        server = RunningServer(_free_port(), str(Path(folder) / "slots"))
        command = [sys.executable, "-m", __name__, job.system, job.workload, str(server.port), server.address]
        process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
        try:
            _wait_until_it_is_ready(process, job.system, server.port)
            yield server
        finally:
            _signal_group(process, signal.SIGTERM)
            try:
                process.wait(_END_LIMIT)
            except subprocess.TimeoutExpired:
                pass
            _signal_group(process, signal.SIGKILL)
            process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((_HOST, 0))
        port: int = listener.getsockname()[1]
        return port


def _wait_until_it_is_ready(process: subprocess.Popen[bytes], system: str, port: int) -> None:
    end = time.monotonic() + _START_LIMIT
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        if _is_ready(system, port):
            return
        time.sleep(0.05)
    raise RuntimeError(f"the server was not ready within {_START_LIMIT:g} s")


def _is_ready(system: str, port: int) -> bool:
    """Whether a server listens; ours does so before it has its policy."""
    try:
        if system == System.OURS:
            urlopen(f"http://{_HOST}:{port}/readyz", timeout=5.0).close()
        else:
            socket.create_connection((_HOST, port), 1.0).close()
    except OSError:  # an HTTP status above 400 is one
        return False
    return True


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def main() -> None:
    """Serve until a signal ends the process."""
    system, workload = System(sys.argv[1]), named(sys.argv[2])
    port, address = int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    if system is System.OPENPI:
        peers.serve_openpi(make_policy(workload), port)
    elif system is System.LITSERVE:
        peers.serve_litserve(workload.model, port)
    elif system is System.MOSEC:
        peers.serve_mosec(workload.model, port)
    elif system is System.ECHO:
        _run_app(peers.echo, port)
    else:
        _serve_ours(workload, port, address)


def _serve_ours(workload: Workload, port: int, address: str) -> None:
    assert workload.serving is not None
    if workload.serving.protocol is not Protocol.STREAM:
        os.environ[WORKLOAD_VARIABLE] = workload.name
        reference = f"{make_served_policy.__module__}:{make_served_policy.__name__}"
        sys.exit(cli.main(["serve", reference, "--port", str(port), "--log-level", "warning"]))
    policy = Policy(workload.model)
    slots = ProcessSlotTransport(policy.request(), policy.reply(), num_slots=workload.callers, address=address)
    with InferenceServer(make_policy(workload), [ThreadingTransport(), slots]) as server:
        _run_app(create_app(server), port)


def _run_app(app: Any, port: int) -> None:
    import uvicorn

    uvicorn.run(
        app, host=_HOST, port=port, log_level="warning", access_log=False, ws_per_message_deflate=False, lifespan="off"
    )


if __name__ == "__main__":
    main()
