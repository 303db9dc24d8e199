"""Programs that end without a shutdown, and what a server costs while nobody asks."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.testing import double, eventually, request
from aioinfer.weight_sync import MultiProcessWeightSyncScheme, SharedMemWeightSyncScheme
from tests.idle import use_nothing
from tests.leftovers import assert_no_descriptor_stays, needs_descriptors
from tests.limits import HANG
from tests.programs import running
from tests.transports import TRANSPORTS
from tests.weight_models import SCHEMES, policy

PROGRAM = """
import asyncio, sys, threading
from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.testing import double, request

server = InferenceServer(double, ThreadingTransport()).start()
server.client()(request(1))
{ending}
"""

ENDINGS = {
    "falling off the end": ("", 0),
    "an exception": ("raise SystemExit(7)", 7),
    "a request under way": (
        "server.client().submit(request(2))",
        0,
    ),
    "a thread that reads for futures": (
        "from aioinfer import ProcessSlotTransport\n"
        "transport = ProcessSlotTransport(request(0), double(request(0)), num_slots=1)\n"
        "with InferenceServer(double, transport) as other:\n"
        "    other.client().submit(request(2)).result(60)",
        0,
    ),
    "an embedded server in a loop that is left": (
        "async def main():\n    await InferenceServer(double, ThreadingTransport()).__aenter__()\nasyncio.run(main())",
        0,
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_program_that_forgets_to_shut_down_ends_all_the_same(ending: str, tmp_path: Path) -> None:
    code, status = ENDINGS[ending]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(ending=code))
    with running(program) as process:
        assert (process.wait(), process.errors) == (status, "")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_program_that_is_killed_ends_with_its_server(number: signal.Signals, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(ending="print('ready', flush=True); threading.Event().wait()"))
    with running(program) as process:
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, number)
        assert process.wait() == -number


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="needs clocks of threads")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_idle_server_uses_no_measurable_processor_time(transport: str) -> None:
    before = set(threading.enumerate())
    with InferenceServer(double, TRANSPORTS[transport]()) as server:
        server.client()(request(1), HANG)
        asyncio.run(server.async_client()(request(1)))
        threads = set(threading.enumerate()) - before
        pumps = {"aioinfer-pump"} if transport == "five-verbs" else set()
        assert {thread.name for thread in threads} == {"aioinfer-model", "aioinfer-loop", *pumps}
        time.sleep(0.1)  # what the request left to do
        assert use_nothing(threads)


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="needs clocks of threads")
@pytest.mark.parametrize("trainer", [False, True], ids=["no trainer yet", "a trainer that sends nothing"])
@pytest.mark.parametrize("kind", SCHEMES)
def test_an_idle_server_with_weight_sync_uses_no_measurable_processor_time(
    kind: type[MultiProcessWeightSyncScheme] | type[SharedMemWeightSyncScheme], trainer: bool
) -> None:
    before = set(threading.enumerate())
    scheme = kind(num_workers=1)
    with InferenceServer(policy(), ThreadingTransport(), weight_sync=scheme):
        if trainer:
            scheme.init_on_sender(model=policy())
            scheme.connect()
        threads = set(threading.enumerate()) - before
        assert {thread.name for thread in threads} == {"aioinfer-model", "aioinfer-loop"}
        time.sleep(0.1)  # what the first weights left to do
        assert use_nothing(threads)
    scheme.shutdown()


@needs_descriptors
def test_weights_leave_no_file_descriptor_and_no_memory_behind() -> None:
    def cycle() -> None:
        for kind in SCHEMES:
            for swap in (False, True):
                scheme = kind(num_workers=1)
                with InferenceServer(policy(), ThreadingTransport(), weight_sync=scheme, swap_weights=swap):
                    scheme.init_on_sender(model=policy())
                    scheme.connect()
                    for size in (500, 900):  # which is refused, and needs other memory
                        for _ in range(20):
                            scheme.send_async(policy(size=size))
                scheme.shutdown()

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:aioinfer")

    before = mappings()
    assert_no_descriptor_stays(cycle, 3)
    eventually(lambda: mappings() <= before)


@needs_descriptors
def test_servers_leave_no_file_descriptor_behind() -> None:
    def cycle() -> None:
        for make in TRANSPORTS.values():
            with InferenceServer(double, make()) as server:
                server.client()(request(1), HANG)

    assert_no_descriptor_stays(cycle, 5)
