"""Whatever torch modes a program runs under where it makes, starts and calls a server: the contract holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer import InferenceServer
from aioinfer.modes import long_lived
from aioinfer.testing import (
    CHECKS,
    AwaitingCallers,
    BlockingCallers,
    Callers,
    TransportHarness,
    double,
    eventually,
    request,
)
from aioinfer.testing.callers import is_double
from tests.limits import HANG
from tests.transports import CANNOT_DROP_CANCELLED, FIXED_LAYOUT, REMOTE, TRANSPORTS


@contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "device": lambda: torch.device("meta"),  # it stands for CUDA
    "dtype": default_dtype,
}
# Those in which tensors are made, kept and handed over; the others say nothing of tensors.
TELLING = [
    check
    for check in CHECKS
    if check.__name__
    in {
        "every_caller_gets_its_own_reply",
        "requests_that_wait_meet_in_one_batch",
        "a_reply_shares_no_memory",
        "unlike_requests_are_batched_apart",
        "a_request_that_the_model_cannot_serve_fails_alone",
        "a_call_that_times_out_leaves_its_client_usable",
        "a_server_serves_again_after_a_restart",
    }
]


# One that is polled takes seconds, and hands over tensors as the others do.
@pytest.mark.parametrize("callers", [BlockingCallers, AwaitingCallers])
@pytest.mark.parametrize(
    "transport", [pytest.param(name, marks=pytest.mark.stress if name == "five-verbs" else []) for name in TRANSPORTS]
)
@pytest.mark.parametrize("mode", MODES)
def test_the_contract_holds_inside_a_mode(mode: str, transport: str, callers: type[Callers]) -> None:
    def make(*layouts: Any) -> Any:
        with MODES[mode]():
            return TRANSPORTS[transport](*layouts)

    harness = TransportHarness(
        make,
        partial(callers, mode=MODES[mode]),
        drops_cancelled=transport not in CANNOT_DROP_CANCELLED,
        fixed_layout=transport in FIXED_LAYOUT,
        remote=transport in REMOTE,
    )
    with default_dtype() if mode == "dtype" else nullcontext():  # which is every thread's
        for check in TELLING:
            check(harness)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_calls_inside_and_outside_of_inference_mode_may_alternate(transport: str) -> None:
    with InferenceServer(double, TRANSPORTS[transport]()) as server:
        client = server.client()
        for value in range(12):
            with torch.inference_mode(value % 3 == 0):
                reply = client(request(value), HANG)
                assert is_double(reply, value)
            assert int(reply["policy_version"]) == 0


def test_a_server_made_and_started_inside_a_mode_serves_outside() -> None:
    for mode in MODES.values():
        td = request(1)
        with mode():
            server = InferenceServer(double, TRANSPORTS["slots-preallocated"](), request_spec=td).start()
        client = server.client()
        for value in range(3):
            assert is_double(client(request(value), HANG), value)
        server.shutdown()


def test_a_model_that_sets_a_default_device_gets_its_versions_across() -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        torch.set_default_device("meta")
        return double(td)

    for transport in TRANSPORTS:
        with InferenceServer(model, TRANSPORTS[transport]()) as server:
            reply = server.client()(request(2), HANG)
            assert is_double(reply, 2)
            assert int(reply["policy_version"]) == 0


def test_long_lived_tensors_can_be_written_to_under_any_mode() -> None:
    with torch.inference_mode(), torch.device("meta"):
        with long_lived():
            made = torch.zeros(3, dtype=torch.int64)
        made += 1
    made += 1
    assert (made.device.type, made.is_inference(), made.tolist()) == ("cpu", False, [2, 2, 2])


# -- nothing shared shows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_rows_of_one_batch_share_no_autograd_history(transport: str) -> None:
    """One caller's in-place change must not invalidate a graph that another caller's row is part of."""
    layout = TensorDict({"action": torch.zeros(3)})
    wire = TRANSPORTS[transport](request(0), layout) if transport in FIXED_LAYOUT else TRANSPORTS[transport]()
    server = InferenceServer(double, wire)
    clients = server.clients(2)
    futures = [client.submit(request(value)) for value, client in enumerate(clients, 1)]
    eventually(lambda: server.stats().pending == 2)
    with server:
        one, other = [future.result(HANG)["action"] for future in futures]
    weight = torch.nn.Parameter(torch.ones(3))
    loss = (one * weight).sum()
    other.clamp_(-1, 1)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [2, 2, 2]
    other.mul_(weight)
    assert other.requires_grad
    assert not one.requires_grad


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("write", ["numpy", "data", "dlpack", "in place"])
def test_what_a_caller_writes_into_its_version_nobody_else_reads(transport: str, write: str) -> None:
    with InferenceServer(double, TRANSPORTS[transport]()) as server:
        clients = [server.client() for _ in range(2)]
        kept: list[Any] = []
        for turn in range(6):
            reply = clients[0](request(turn), HANG)
            version = reply["policy_version"]
            match write:
                case "numpy":
                    version.numpy()[...] = 99
                case "data":
                    version.data.fill_(99)
                case "dlpack":
                    kept.append(torch.utils.dlpack.from_dlpack(version))
                    kept[-1].fill_(99)
                case _:
                    version.fill_(99)
            del reply, version
            for held in kept:
                held.fill_(99)
            assert int(clients[1](request(turn), HANG)["policy_version"]) == 0
