"""What is wrong is said where it is given, with the way out; what a policy's users expect is taken."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import (
    AsyncInferenceClient,
    DispatchReason,
    InferenceClient,
    InferenceServer,
    InferenceTransport,
    ModelError,
    MPTransport,
    PolicyClientModule,
    ProcessInferenceServer,
    ProcessSlotTransport,
    SlotTransport,
    ThreadingTransport,
)
from aioinfer.testing import GatedModel, double, request
from aioinfer.testing.callers import is_double
from tests.limits import HANG
from tests.transports import FIXED_LAYOUT, TRANSPORTS
from tests.weight_models import policy


def linear() -> TensorDictModule:
    return TensorDictModule(nn.Linear(3, 2), in_keys=["observation"], out_keys=["action"])


# -- out_keys ----------------------------------------------------------------------------------------------


def test_out_keys_that_a_module_does_not_write_are_refused_where_they_are_given() -> None:
    with pytest.raises(ValueError, match=r"actoin.*it writes \['action'\]"):
        InferenceServer(linear(), ThreadingTransport(), out_keys=["actoin"])
    with pytest.raises(TypeError, match="sequence of keys"):
        InferenceServer(linear(), ThreadingTransport(), out_keys="action")
    for keys in (["action"], ["action", "observation"]):
        InferenceServer(linear(), ThreadingTransport(), out_keys=keys)
    InferenceServer(linear(), ThreadingTransport(), out_keys=["goal"], request_spec=TensorDict({"goal": torch.ones(1)}))


def test_out_keys_that_a_function_does_not_return_are_an_error_of_the_model() -> None:
    with InferenceServer(double, ThreadingTransport(), out_keys=["actoin"]) as server:
        with pytest.raises(ModelError, match=r"\['actoin'\], the model returned \['action'\]"):
            server.client()(request(1), HANG)
        assert server.is_alive


# -- the batch timeout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batch_timeout", "timeout"])
@pytest.mark.parametrize("hosted", [False, True])
def test_the_batch_timeout_has_the_name_that_torchrl_gives_it_too(name: str, hosted: bool) -> None:
    def make(**options: Any) -> object:
        if hosted:
            return ProcessInferenceServer(linear, MPTransport(), **options)
        return InferenceServer(linear(), ThreadingTransport(), **options)

    make(**{name: 0.5})
    make(**{name: 0})
    with pytest.raises(ValueError, match="batch_timeout must be at least 0 seconds, got -1"):
        make(**{name: -1})
    with pytest.raises(TypeError, match="batch_timeout must be a number of seconds, got '2'"):
        make(**{name: "2"})
    with pytest.raises(TypeError, match=r"two names for one argument.*got timeout=0\.2 and batch_timeout=0\.1"):
        make(batch_timeout=0.1, timeout=0.2)


@pytest.mark.parametrize("name", ["batch_timeout", "timeout"])
def test_a_partial_batch_leaves_when_the_batch_timeout_has_passed_whatever_its_name(name: str) -> None:
    options: dict[str, Any] = {name: 0.05}
    with InferenceServer(double, ThreadingTransport(), min_batch_size=2, **options) as server:
        started = time.monotonic()
        assert is_double(server.client()(request(1), HANG), 1)
        assert time.monotonic() - started >= 0.05
        assert server.stats().batches == {DispatchReason.TIMEOUT: 1}


def test_a_partial_batch_waits_for_a_hundredth_of_a_second_by_default() -> None:
    with InferenceServer(double, ThreadingTransport(), min_batch_size=2) as server:
        started = time.monotonic()
        assert is_double(server.client()(request(1), HANG), 1)
        assert time.monotonic() - started >= 0.01


# -- models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2), nn.Tanh()), nn.LSTM(3, 2)])
def test_a_layer_of_tensors_is_refused_as_a_model(model: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"takes tensors; name them: InferenceServer\(model, transport, in_keys="):
        InferenceServer(model, ThreadingTransport())


def test_a_module_of_tensors_says_how_to_wrap_it_when_it_is_called() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, observation: Any) -> Any:
            return self.layer(observation)

    with (
        InferenceServer(Net(), ThreadingTransport()) as server,
        pytest.raises(ModelError, match=r"Net seems to take tensors; name them") as raised,
    ):
        server.client()(request(1), HANG)
    assert isinstance(raised.value.__cause__, ModelError)
    assert isinstance(raised.value.__cause__.__cause__, TypeError)


def test_a_model_that_cannot_batch_is_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        if len(td) > 1:
            raise RuntimeError("Expected hidden[0] size (1, 1, 2), got [1, 64, 2]")
        return double(td)

    server = InferenceServer(model, ThreadingTransport())
    futures = [server.client().submit(request(value)) for value in range(8)]
    with server:
        for value, future in enumerate(futures):
            assert is_double(future.result(HANG), value)
        stats = server.stats()
        assert (stats.ok, stats.failed, stats.failed_passes) == (8, 0, 7)
        assert sum(stats.batches.values()) == 15
        assert stats.mean_batch_size == 8 / 15
        with server.paused():
            futures = [server.client().submit(request(value)) for value in range(4)]
        for future in futures:
            future.result(HANG)
    said = [record for record in caplog.records if "max_batch_size=1" in record.getMessage()]
    assert len(said) == 1
    assert "batch of 8 requests" in said[0].getMessage()


def test_one_bad_request_does_not_count_as_a_model_that_cannot_batch(caplog: pytest.LogCaptureFixture) -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        if (td["observation"] < 0).any():
            raise ArithmeticError("negative")
        return double(td)

    server = InferenceServer(model, ThreadingTransport())
    futures = [server.client().submit(request(value)) for value in (1, -1, 2, 3)]
    with server:
        assert isinstance(futures[1].exception(HANG), ArithmeticError)
        assert server.stats().failed_passes == 3
    assert not [record for record in caplog.records if "max_batch_size" in record.getMessage()]


# -- clients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_an_awaited_call_takes_a_timeout(transport: str) -> None:
    model = GatedModel()
    async with InferenceServer(model, TRANSPORTS[transport]()) as server:
        client = server.async_client()
        with pytest.raises(TimeoutError):
            await client(request(1), timeout=0.02)
        with pytest.raises(TimeoutError):
            await client(request(1), 0.02, wait=True)
        model.open()
        assert is_double(await client(request(2), timeout=HANG), 2)


@pytest.mark.parametrize("make", [ThreadingTransport, lambda: SlotTransport(2)])
def test_a_client_of_this_process_says_why_it_does_not_pickle(make: Callable[[], InferenceTransport]) -> None:
    for client in (make().client(), make().async_client()):
        with pytest.raises(TypeError, match="MPTransport or a ProcessSlotTransport"):
            pickle.dumps(client)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_clients_are_made_of_a_transport_by_their_class(transport: str) -> None:
    wire = TRANSPORTS[transport]()
    first = wire[0] if isinstance(wire, list) else wire
    with InferenceServer(double, wire):
        client = InferenceClient(first)  # type: ignore[abstract,call-arg]
        assert isinstance(client, InferenceClient)
        assert is_double(client(request(2), HANG), 2)
        assert isinstance(AsyncInferenceClient(first), AsyncInferenceClient)  # type: ignore[abstract,call-arg]


# -- a client in the place of a policy ---------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("max_pending", [None, 2])
def test_a_batch_of_any_size_is_served_whatever_the_transport_and_the_bound(
    transport: str, max_pending: int | None
) -> None:
    layout = TensorDict({"action": torch.zeros(2)})
    wire = TRANSPORTS[transport](request(0), layout) if transport in FIXED_LAYOUT else TRANSPORTS[transport]()
    model = linear()
    with InferenceServer(model, wire, max_pending=max_pending) as server:
        remote = PolicyClientModule(server, in_keys=["observation"], out_keys=["action"])
        for size in ([], [1], [5], [2, 3]):
            td = TensorDict({"observation": torch.randn(*size, 3)}, batch_size=size)
            result = remote(td)
            with torch.no_grad():
                torch.testing.assert_close(result["action"], model.module(td["observation"]))
            assert result["policy_version"].shape == torch.Size(size)
        assert server.stats().pending == 0


@pytest.mark.parametrize("transport", ["threading", "slots", "mp", "process-slots"])
def test_requests_with_a_batch_size_of_their_own_go_whole(transport: str) -> None:
    spec = TensorDict({"observation": torch.zeros(8, 3)}, batch_size=[8])
    layout = TensorDict({"action": torch.zeros(8, 3)}, batch_size=[8])
    wire: Any = (
        ProcessSlotTransport(spec, layout, num_slots=2) if transport == "process-slots" else TRANSPORTS[transport]()
    )
    with InferenceServer(double, wire, request_spec=spec) as server:
        remote = PolicyClientModule(server)
        for size in ([8], [3, 8]):
            td = TensorDict({"observation": torch.randn(*size, 3)}, batch_size=size)
            torch.testing.assert_close(remote(td)["action"], 2 * td["observation"])
            assert td["policy_version"].shape == torch.Size(size)
        assert server.stats().ok == (4 if transport == "process-slots" else 2)


def test_a_batch_that_fails_leaves_nothing_to_be_computed() -> None:
    model = GatedModel()
    with InferenceServer(model, ThreadingTransport(), max_batch_size=1) as server:
        blocker = server.client().submit(request(9))
        assert model.entered.wait(HANG)

        def collate(value: float) -> TensorDictBase:
            return TensorDict({"observation": torch.full((4, 3), value)}, batch_size=[4])

        remote = PolicyClientModule(server)
        bad = collate(1.0)
        del bad["observation"]
        bad["other"] = torch.ones(4, 3)
        model.open()
        with pytest.raises(KeyError):
            remote(bad)
        assert is_double(blocker.result(HANG), 9)
        assert server.stats().pending == 0
        assert is_double(remote(request(2)), 2)


def test_the_policy_version_is_kept() -> None:
    with InferenceServer(policy(1.0), ThreadingTransport()) as server:
        server.update_weights(policy(2.0), version=7)
        kept = PolicyClientModule(server, out_keys=["marks"])(request(1))
        assert int(kept["policy_version"]) == 7
        dropped = PolicyClientModule(server, out_keys=["marks"], policy_version_key=None)(request(1))
        assert "policy_version" not in dropped
    with InferenceServer(policy(1.0), ThreadingTransport(), policy_version_key=None) as server:
        assert "policy_version" not in PolicyClientModule(server, out_keys=["marks"])(request(1))


def test_what_is_no_client_is_refused_as_a_policy() -> None:
    for bad in (3, "auto", linear(), ThreadingTransport().async_client()):
        with pytest.raises(TypeError, match="must be a blocking InferenceClient, a transport or a server"):
            PolicyClientModule(bad)
    transport = MPTransport()
    assert isinstance(PolicyClientModule(transport).client, InferenceClient)


def test_a_batch_beyond_the_bound_offers_little_more_than_there_is_room_for() -> None:
    with InferenceServer(linear(), ThreadingTransport(), max_pending=4) as server:
        remote = PolicyClientModule(server, in_keys=["observation"], out_keys=["action"])
        remote(TensorDict({"observation": torch.randn(200, 3)}, batch_size=[200]))
        assert server.stats().rejected <= 201
