"""Device code without a device: the host's on ``meta``, and that for CUDA over a fake of ``torch.cuda``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import InteractionType, TensorDictModule
from torch import nn
from torch.overrides import TorchFunctionMode

from aioinfer import InferenceServer, ThreadingTransport, devices
from aioinfer.devices import CudaPlacement, GraphPlacement, HostPlacement, place
from aioinfer.interaction_type import interaction_type, use_mode
from aioinfer.tensors import check_output, rows, stack
from aioinfer.testing import double, request
from aioinfer.weight_sync import MultiProcessWeightSyncScheme
from tests.limits import HANG


def test_nothing_moves_without_a_device() -> None:
    placement = HostPlacement(None, None)
    batch = placement.build(partial(stack, [request(1), request(2)]))
    seen: list[TensorDictBase] = []
    placement.run(lambda td: seen.append(td) or double(td), batch, lambda out: check_output(out, 2), rows, None)  # type: ignore[func-returns-value]
    assert seen[0] is batch


def test_the_model_and_the_batches_move_to_the_device_and_replies_to_the_output_device() -> None:
    model = TensorDictModule(nn.Linear(3, 2), in_keys=["observation"], out_keys=["action"])
    with InferenceServer(model, ThreadingTransport(), device="meta", output_device="meta") as server:
        reply = server.client()(request(1), HANG)
    assert next(model.parameters()).is_meta
    assert reply["action"].is_meta
    assert reply["action"].shape == (2,)


def test_replies_go_back_to_where_their_requests_were() -> None:
    seen: list[torch.device] = []

    def model(td: TensorDictBase) -> TensorDictBase:
        seen.append(td["observation"].device)
        return TensorDict({"action": torch.ones(td.batch_size)}, batch_size=td.batch_size)

    with InferenceServer(model, ThreadingTransport(), device="meta") as server:
        reply = server.client()(request(1), HANG)
    assert seen == [torch.device("meta")]
    assert reply["action"].device == torch.device("cpu")


def test_only_what_replies_have_travels_back(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[list[str]] = []

    def move(td: TensorDictBase, device: torch.device) -> TensorDictBase:
        moved.append(sorted(td.keys()))
        return td

    monkeypatch.setattr(devices, "move", move)
    placement = CudaPlacement(torch.device("cuda"), None, cuda)
    placement.open(double)
    batch = placement.build(partial(stack, [request(1), request(2)]))
    for keys in ({"action"}, {"action", "unknown"}):
        placement.run(
            lambda td: td.update(double(td)),
            batch.copy(),
            lambda output: check_output(output, 2),
            rows,
            frozenset(keys),
        )
    assert moved == [["observation"], ["action"], ["observation"], ["action", "observation"]]


def test_the_placement_follows_from_the_device() -> None:
    assert isinstance(place("cuda:1", None), CudaPlacement)
    assert isinstance(place("cpu", None), HostPlacement)
    assert isinstance(place(None, "cpu"), HostPlacement)


class Recording(TorchFunctionMode):
    """Keeps the functions of tensors that are called inside it, to call them again on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.item:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            self.calls.append((func, args, kwargs, result))
        return result

    def run(self) -> None:
        for func, args, kwargs, made in self.calls:
            made.copy_(func(*args, **kwargs))

    def forget_values(self) -> None:
        """A capture computes nothing: what it has returned has no values until the first replay."""
        if self.calls:
            self.calls[-1][3].fill_(-1)


class FakeCuda:
    """Writes down, in order, what it is asked for; its graphs run what was captured again."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.error: Exception | None = None
        self.pools = 0
        self.recording: list[str] = []  # the pools to which the allocator records
        self.memory = SimpleNamespace(
            _cuda_endAllocateToPool=lambda device, pool: self.end_recording(pool),
            _cuda_releasePool=lambda device, pool: self.log.append(f"release {pool}"),
        )
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

        class CUDAGraph:
            def __init__(self) -> None:
                self.recording = Recording()

            def replay(self) -> None:
                fake.log.append("replay")
                if fake.error is not None:
                    raise fake.error
                self.recording.run()

            def reset(self) -> None:
                fake.log.append("reset")

        self.Stream, self.Event, self.CUDAGraph = Stream, Event, CUDAGraph

    @contextmanager
    def graph(self, graph: Any, *, pool: str, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.log.append(f"capture on {stream.name} in {pool}, {capture_error_mode}")
        if pool in self.recording:
            raise RuntimeError("already recording")
        self.recording.append(pool)
        try:
            with graph.recording:
                yield
            graph.recording.forget_values()
            self.end_recording(pool)
        except RuntimeError:
            raise RuntimeError("the capture was invalidated")  # noqa: B904 - as torch does it
        finally:
            self.log.append("captured")

    def end_recording(self, pool: str) -> None:
        if pool not in self.recording:
            raise RuntimeError("not currently recording")
        self.recording.remove(pool)

    def graph_pool_handle(self) -> str:
        self.pools += 1
        return "pool" if self.pools == 1 else f"pool {self.pools}"

    def current_device(self) -> int:
        return 0

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
    replies = placement.run(double, batch, lambda output: check_output(output, 2), rows, None)
    assert [reply["action"][0].item() for reply in replies] == [2, 4]
    assert cuda.log == [
        "model to cuda:0",
        "own waits for current",
        "enter own",
        "own waits for default",
        "pin [2, 3]",
        "leave",
        "enter own",
        "copy to cuda:0",
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
    placement.run(double, batch, lambda output: check_output(output, 2), rows, None)
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


def test_a_batch_that_collate_fn_makes_waits_for_its_requests(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def collate(tds: list[TensorDictBase]) -> TensorDictBase:
        cuda.log.append("collate")
        return stack(tds)

    placement = CudaPlacement(torch.device("cpu"), None, cuda)
    monkeypatch.setattr(devices, "CudaPlacement", lambda *_: placement)
    with InferenceServer(double, ThreadingTransport(), device="cuda", collate_fn=collate) as server:
        cuda.log.clear()
        assert server.client()(request(3), HANG)["action"][0] == 6
    assert cuda.log[:4] == ["enter own", "own waits for default", "collate", "leave"]


# -- CUDA graphs -------------------------------------------------------------------------------------------


def test_graphs_need_a_cuda_device() -> None:
    assert isinstance(place("cuda", None, (1, 2)), GraphPlacement)
    for device in (None, "cpu"):
        with pytest.raises(ValueError, match=f"cuda_graphs=True needs a CUDA device.*got device={device!r}"):
            place(device, None, (1, 2))


class Graphs:
    """A placement whose device is the host, over the fake."""

    def __init__(self, cuda: FakeCuda, model: Any, sizes: tuple[int, ...] = (2, 4)) -> None:
        self.cuda, self.model = cuda, model
        self.placement = GraphPlacement(torch.device("cpu"), None, sizes, cuda)
        self.placement.open(model)

    @torch.no_grad()
    def run(self, *values: float) -> list[float]:
        """The actions for observations of these values; the log has what this took."""
        self.cuda.log.clear()
        batch = self.placement.build(partial(stack, [request(value) for value in values]))
        count = len(values)
        replies = self.placement.run(self.model, batch, lambda output: check_output(output, count), rows, None)
        return [reply["action"][0].item() for reply in replies]


def linear(weight: float) -> TensorDictModule:
    layer = nn.Linear(3, 1, bias=False)
    nn.init.constant_(layer.weight, weight)
    return TensorDictModule(layer, in_keys=["observation"], out_keys=["action"])


def test_a_batch_is_padded_in_the_inputs_of_a_graph_that_is_captured_once(cuda: FakeCuda) -> None:
    graphs = Graphs(cuda, linear(1.0))
    assert graphs.run(1, 2, 3, 4) == [3, 6, 9, 12]
    assert graphs.run(1, 2) == [3, 6]
    assert cuda.log.count("capture on own in pool, thread_local") == 1
    for values in ([5, 6, 7], [8], [1, 1, 1, 2], [9, 8]):
        assert graphs.run(*values) == [3 * value for value in values]
        assert cuda.log == [
            "enter own",
            "own waits for default",
            f"pin {[len(values), 3]}",
            "leave",
            "enter own",
            "replay",
            "copy to cpu",
            "event on own",
            "event done",
            "leave",
        ]


def test_a_graph_reads_the_rows_of_its_batch_alone_also_where_the_model_writes_to_them(cuda: FakeCuda) -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        observation = td["observation"].mul_(2)
        return TensorDict({"action": observation - observation.max()}, batch_size=td.batch_size)

    graphs = Graphs(cuda, model)
    assert graphs.run(1, 2, 3, 99) == [-196, -194, -192, 0]
    assert graphs.run(3, 1, 2) == [0, -4, -2]


def test_graphs_see_weights_that_are_written_in_place_and_are_captured_anew_where_more_has_changed(
    cuda: FakeCuda,
) -> None:
    model = linear(1.0)
    graphs = Graphs(cuda, model)
    graphs.run(1, 2)
    (weight,) = model.parameters()

    def write() -> None:
        nn.init.constant_(weight, 2.0)

    graphs.placement.update(write)
    assert graphs.run(1, 2) == [6, 12]
    assert "captured" not in cuda.log
    graphs.placement.update(lambda: None, tensors_only=False)  # but what Python reads of the model, say
    assert graphs.run(1, 2) == [6, 12]
    assert "captured" in cuda.log
    graphs.placement.update(lambda: setattr(weight, "data", torch.full((1, 3), 3.0)))
    assert graphs.run(1, 2) == [9, 18]
    assert "captured" in cuda.log


def test_each_exploration_mode_has_graphs_of_its_own(cuda: FakeCuda) -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        noise = torch.rand_like(td["observation"]) if interaction_type() is InteractionType.RANDOM else 0
        return TensorDict({"action": td["observation"] + noise}, batch_size=td.batch_size)

    graphs = Graphs(cuda, model)
    assert graphs.run(1, 2) == [1, 2]
    drawn: list[float] = []
    for capture in (True, False, False):
        with use_mode(InteractionType.RANDOM):
            drawn += graphs.run(1, 2)
        assert ("captured" in cuda.log) is capture
    assert len(set(drawn)) == 6  # the generator moves on between replays
    assert graphs.run(1, 2) == [1, 2]
    assert "captured" not in cuda.log


@pytest.mark.parametrize("kind", ["it synchronises", "it returns what is not on the device"])
def test_a_model_that_cannot_be_captured_is_run_without_graphs_in_that_mode(
    cuda: FakeCuda, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        action = td["observation"] * 2
        if interaction_type() is InteractionType.RANDOM:
            if kind == "it synchronises":
                action = action + 0 * action[0, 0].item()
            else:
                return TensorDict({"action": action, "seen": torch.ones(len(td), device="meta")}, td.batch_size)
        return TensorDict({"action": action}, batch_size=td.batch_size)

    graphs = Graphs(cuda, model)
    for values in ([1, 2, 3], [4, 5]):
        assert graphs.run(*values) == [2 * value for value in values]
        with use_mode(InteractionType.RANDOM):
            assert graphs.run(*values) == [2 * value for value in values]
        assert "replay" not in cuda.log
    assert not cuda.recording
    assert graphs.run(1, 2) == [2, 4]
    assert cuda.log.count("replay") == 1
    reason = "not permitted when stream is capturing" if kind == "it synchronises" else "'seen' of its output"
    (said,) = [record.getMessage() for record in caplog.records if record.name == "aioinfer"]
    assert "run without graphs in exploration mode random" in said
    assert reason in said


def test_an_error_of_a_replay_is_that_of_its_batch_and_one_of_the_model_comes_before_its_capture(
    cuda: FakeCuda,
) -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        if not captures:
            raise ArithmeticError("not yet")
        return double(td)

    captures = False
    graphs = Graphs(cuda, model)
    with pytest.raises(ArithmeticError):
        graphs.run(1, 2)
    assert "reset" not in cuda.log
    captures = True
    assert graphs.run(1, 2) == [2, 4]
    cuda.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        graphs.run(1, 2)
    cuda.error = None
    assert graphs.run(3, 4) == [6, 8]


def test_a_server_captures_all_buckets_before_it_serves(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def placement(device: torch.device, output_device: torch.device | None, sizes: Sequence[int]) -> GraphPlacement:
        return GraphPlacement(torch.device("cpu"), output_device, sizes, cuda)

    monkeypatch.setattr(devices, "GraphPlacement", placement)
    server = InferenceServer(
        linear(1.0),
        ThreadingTransport(),
        max_batch_size=6,
        device="cuda",
        cuda_graphs=True,
        request_spec=request(0),
    )
    with server:
        assert cuda.log.count("captured") == 4
        assert [entry for entry in cuda.log if entry.startswith("pin")] == 2 * [
            "pin [6, 3]",
            "pin [4, 3]",
            "pin [2, 3]",
            "pin [1, 3]",
        ]
        cuda.log.clear()
        for weight in (1.0, 2.0):
            server.update_weights(linear(weight))
            for count in range(1, 7):
                with server.paused():
                    futures = [server.client().submit(request(value)) for value in range(count)]
                actions = [future.result(HANG)["action"].item() for future in futures]
                assert actions == [3 * weight * value for value in range(count)]
        assert cuda.log.count("replay") == 12
        assert "captured" not in cuda.log


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_on_cuda_do_what_the_model_does(compiled: bool) -> None:
    network = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    model = TensorDictModule(network, in_keys=["observation"], out_keys=["action"])
    other = copy.deepcopy(model)
    server = InferenceServer(
        model,
        ThreadingTransport(),
        max_batch_size=8,
        device="cuda",
        compile=compiled,
        cuda_graphs=True,
        request_spec=request(0),
    )
    with server:
        for _ in range(3):
            for parameter in other.parameters():
                nn.init.normal_(parameter)
            server.update_weights(other)
            for count in range(1, 9):
                with server.paused():
                    futures = [server.client().submit(request(value)) for value in range(count)]
                for value, future in enumerate(futures):
                    expected = other.module(request(value)["observation"]).detach()
                    torch.testing.assert_close(future.result(HANG)["action"], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("synchronises", [False, True])
def test_graphs_on_cuda_draw_new_numbers_and_a_model_that_synchronises_is_run_without(
    synchronises: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        noise = torch.rand_like(td["observation"])
        if synchronises:
            noise = noise * (noise.sum() > -1).item()
        return TensorDict({"action": noise}, batch_size=td.batch_size, device=td.device)

    with InferenceServer(
        model, ThreadingTransport(), max_batch_size=2, device="cuda", cuda_graphs=True, request_spec=request(0)
    ) as server:
        drawn = {server.client()(request(0), HANG)["action"][0].item() for _ in range(20)}
    assert len(drawn) == 20
    assert any("run without graphs" in record.getMessage() for record in caplog.records) is synchronises


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
            reply = server.client()(request(1), HANG)
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
            reply = client(request(value).to(where), HANG)
            assert reply["action"].device.type == where
            torch.testing.assert_close(reply["action"].cpu(), expected(request(value)["observation"]))
