"""Device code without a device: the host's on ``meta``, and that for CUDA over a fake of ``torch.cuda``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, ThreadingTransport, devices
from aioinfer.devices import CudaPlacement, HostPlacement, place
from aioinfer.tensors import check_output, rows, stack
from aioinfer.testing import double, request
from aioinfer.weight_sync import MultiProcessWeightSyncScheme


def test_nothing_moves_without_a_device() -> None:
    placement = HostPlacement(None, None)
    batch = placement.build(partial(stack, [request(1), request(2)]))
    seen: list[TensorDictBase] = []
    placement.run(lambda td: seen.append(td) or double(td), batch, lambda out: check_output(out, 2), rows)  # type: ignore[func-returns-value]
    assert seen[0] is batch


def test_the_model_and_the_batches_move_to_the_device_and_replies_to_the_output_device() -> None:
    model = TensorDictModule(nn.Linear(3, 2), in_keys=["observation"], out_keys=["action"])
    with InferenceServer(model, ThreadingTransport(), device="meta", output_device="meta") as server:
        reply = server.client()(request(1), 20)
    assert next(model.parameters()).is_meta
    assert reply["action"].is_meta
    assert reply["action"].shape == (2,)


def test_replies_go_back_to_where_their_requests_were() -> None:
    seen: list[torch.device] = []

    def model(td: TensorDictBase) -> TensorDictBase:
        seen.append(td["observation"].device)
        return TensorDict({"action": torch.ones(td.batch_size)}, batch_size=td.batch_size)

    with InferenceServer(model, ThreadingTransport(), device="meta") as server:
        reply = server.client()(request(1), 20)
    assert seen == [torch.device("meta")]
    assert reply["action"].device == torch.device("cpu")


def test_the_placement_follows_from_the_device() -> None:
    assert isinstance(place("cuda:1", None), CudaPlacement)
    assert isinstance(place("cpu", None), HostPlacement)
    assert isinstance(place(None, "cpu"), HostPlacement)


class FakeCuda:
    """Writes down, in order, what it is asked for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        fake = self

        class Stream:
            def __init__(self, device: object = None, name: str = "own") -> None:
                self.name = name

            def wait_stream(self, other: Stream) -> None:
                fake.log.append(f"{self.name} waits for {other.name}")

        class Event:
            def record(self, stream: Stream) -> None:
                fake.log.append(f"event on {stream.name}")

            def synchronize(self) -> None:
                fake.log.append("event done")

        self.Stream, self.Event = Stream, Event

    def current_stream(self, device: object) -> Any:
        return self.Stream(name="current")

    def default_stream(self, device: object) -> Any:
        return self.Stream(name="default")

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.log.append(f"enter {stream.name}")
        yield
        self.log.append("leave")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()

    def move(td: TensorDictBase, device: torch.device) -> TensorDictBase:
        fake.log.append(f"copy to {device}")
        return td.clone()

    def pinned(self: CudaPlacement, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        fake.log.append(f"pin {list(shape)}")
        return torch.empty(shape, dtype=dtype)

    monkeypatch.setattr(devices, "move", move)
    monkeypatch.setattr(devices, "move_model", lambda model, device: fake.log.append(f"model to {device}"))
    monkeypatch.setattr(CudaPlacement, "allocate_pinned", pinned)
    return fake


def test_a_cuda_batch_is_staged_in_pinned_memory_and_waits_for_one_event(cuda: FakeCuda) -> None:
    placement = CudaPlacement(torch.device("cuda"), None, cuda)
    placement.open(double)
    batch = placement.build(partial(stack, [request(1), request(2)]))
    replies = placement.run(double, batch, lambda output: check_output(output, 2), rows)
    assert [reply["action"][0].item() for reply in replies] == [2, 4]
    assert cuda.log == [
        "model to cuda",
        "own waits for current",
        "enter own",
        "own waits for default",
        "pin [2, 3]",
        "leave",
        "enter own",
        "copy to cuda",
        "copy to cpu",
        "event on own",
        "event done",
        "leave",
    ]


def test_replies_that_stay_on_the_device_are_lent_to_the_callers_stream(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent: list[str] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: lent.append(stream.name))
    placement = CudaPlacement(torch.device("cuda"), torch.device("cuda"), cuda)
    placement.open(double)
    batch = placement.build(partial(stack, [request(1), request(2)]))
    placement.run(double, batch, lambda output: check_output(output, 2), rows)
    assert cuda.log.count("event done") == 1
    assert lent == ["default", "default"]


def test_weights_are_written_on_the_models_stream_and_given_back_when_that_is_done(cuda: FakeCuda) -> None:
    placement = CudaPlacement(torch.device("cuda"), None, cuda)
    placement.open(double)
    cuda.log.clear()
    placement.update(lambda: cuda.log.append("write"))
    assert cuda.log == ["enter own", "write", "event on own", "event done", "leave"]


def test_a_copy_of_weights_is_there_before_another_thread_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []

    class Stream:
        def synchronize(self) -> None:
            waited.append("current stream")

    class Somewhere:
        device = torch.device("cuda:0")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    tensors: Any = [Somewhere(), torch.ones(1), Somewhere()]
    devices.settle(tensors)
    assert waited == ["current stream"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("trainer", ["cpu", "cuda"])
def test_weights_get_to_a_server_on_cuda(swap: bool, trainer: str) -> None:
    scheme = MultiProcessWeightSyncScheme(num_workers=1)
    source = nn.Linear(3, 2).to(trainer)
    model = TensorDictModule(nn.Linear(3, 2), in_keys=["observation"], out_keys=["action"])
    with InferenceServer(model, ThreadingTransport(), device="cuda", weight_sync=scheme, swap_weights=swap) as server:
        scheme.init_on_sender(model=TensorDictModule(source, in_keys=["observation"], out_keys=["action"]))
        scheme.connect()
        for value in range(50):
            nn.init.constant_(source.weight, value)
            if value % 2:
                scheme.send()
            else:
                server.update_weights({"module." + name: tensor for name, tensor in source.state_dict().items()})
            reply = server.client()(request(1), 20)
            expected = source(request(1)["observation"].to(trainer)).cpu()
            torch.testing.assert_close(reply["action"], expected.detach())
    scheme.shutdown()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_server_on_cuda_answers_where_it_was_asked(where: str) -> None:
    linear = nn.Linear(3, 2)
    expected = copy.deepcopy(linear)
    model = TensorDictModule(linear, in_keys=["observation"], out_keys=["action"])
    with InferenceServer(model, ThreadingTransport(), device="cuda") as server:
        client = server.client()
        for value in range(50):
            reply = client(request(value).to(where), 20)
            assert reply["action"].device.type == where
            torch.testing.assert_close(reply["action"].cpu(), expected(request(value)["observation"]))
