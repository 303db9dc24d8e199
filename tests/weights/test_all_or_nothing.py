"""Whatever an update raises, and wherever, the model keeps what it has, and its version."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from aioinfer import InferenceServer, ThreadingTransport, WeightSyncError
from aioinfer.testing import eventually
from aioinfer.weight_sync import loader
from aioinfer.weight_sync.loader import WeightLoader
from aioinfer.weight_sync.weights import Weights, check_version, extract_weights
from tests.frames import is_within
from tests.limits import HANG
from tests.weight_models import Counter
from tests.weights.test_weights import same
from tests.weights.workers import Scheme, following, linear, scheme, value_of

__all__ = ["scheme"]


class Normalizing(nn.Module):
    """A layer that normalizes: each pass replaces its statistics, in inference mode."""

    def __init__(self, mark: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), float(mark)))
        self.mean: Tensor
        self.register_buffer("mean", torch.full((2,), float(mark)))
        self.register_buffer("wide", torch.full((1,), float(mark)).expand(4))
        self.last = nn.Parameter(torch.full((2,), float(mark)))

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean * 1.0
        parts = [self.weight, self.mean, self.get_buffer("wide"), self.last]
        return torch.cat(parts).expand(x.shape[0], -1).clone()


class Picky(nn.Module):
    """Refuses some extra states, after it has taken part of them; what it says of itself is its own, living state."""

    def __init__(self, mark: float = 0.0, refuses: type[BaseException] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), float(mark)))
        self.state: dict[str, Any] = {"mark": mark}
        self.refuses = refuses

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state["mark"] = state["mark"]
        if self.refuses is not None and state["mark"] == 1:
            raise self.refuses("no")


def state_of(module: nn.Module) -> list[Any]:
    weights = extract_weights(module, "tensordict")
    return [[tensor.tolist() for tensor in weights.tensors.values()], repr(weights.extra_states)]


# -- what can't be written in place ------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("by_scheme", [False, True])
def test_a_model_that_replaces_its_buffers_in_inference_mode_is_updated_as_a_whole(
    scheme: Scheme, swap: bool, by_scheme: bool
) -> None:
    served = TensorDictModule(Normalizing(), in_keys=["x"], out_keys=["y"])
    scheme.init_on_sender(model=TensorDictModule(Normalizing(1), in_keys=["x"], out_keys=["y"]))
    with InferenceServer(served, ThreadingTransport(), weight_sync=scheme.for_worker(0), swap_weights=swap) as server:
        ask = partial(server.client(), TensorDict({"x": torch.zeros(1)}), HANG)
        scheme.connect(timeout=HANG)
        for version in range(2, 6):
            assert ask()["y"].unique().tolist() == [version - 1]
            source = TensorDictModule(Normalizing(version), in_keys=["x"], out_keys=["y"])
            if by_scheme:
                scheme.send(source, version=version)
            else:
                server.update_weights(source, version=version)
            reply = ask()
            assert (reply["y"].unique().tolist(), int(reply["policy_version"])) == ([version], version)
        assert server.stats().refused_updates == 0


def test_a_model_that_was_made_in_inference_mode_is_updated_in_either_way() -> None:
    with torch.inference_mode():
        module = nn.Linear(3, 3)
    target = WeightLoader(module)
    for swap in (False, True, False):
        source = nn.Linear(3, 3)
        weights = extract_weights(source, "tensordict").detached()
        target.load(target.stage(weights, []) if swap else weights, swap=swap)
        assert torch.equal(module.weight, source.weight)


def test_what_was_expanded_in_inference_mode_is_refused_by_name() -> None:
    module = nn.Linear(3, 3)
    with torch.inference_mode():
        module.register_buffer("wide", torch.zeros(1).expand(3))
    before = state_of(module)
    weights = {"weight": torch.ones(3, 3), "bias": torch.ones(3), "wide": torch.ones(3)}
    with pytest.raises(WeightSyncError, match='"wide" can\'t be written'):
        WeightLoader(module).load(Weights(weights, {}))
    assert state_of(module) == before


def test_elements_that_share_memory_get_memory_of_their_own() -> None:
    module = nn.Linear(3, 3, bias=False)
    module.register_buffer("window", torch.zeros(4).as_strided((3, 2), (1, 1)))
    new = {"weight": torch.ones(3, 3), "window": torch.arange(6.0).reshape(3, 2)}
    WeightLoader(module).load(Weights(new, {}))
    assert torch.equal(module.get_buffer("window"), new["window"])


# -- what fails half-way -----------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("error", [ValueError, MemoryError, SystemExit, KeyboardInterrupt])
def test_an_extra_state_that_is_refused_leaves_all_as_it_was(error: type[BaseException], swap: bool) -> None:
    module = nn.Sequential(Picky(0), nn.Linear(2, 2), Picky(0, refuses=error))
    source = nn.Sequential(Picky(1), nn.Linear(2, 2), Picky(1))
    target, before = WeightLoader(module), state_of(module)
    with pytest.raises(WeightSyncError if issubclass(error, Exception) else error):
        target.load(extract_weights(source, "tensordict").detached(), swap=swap)
    assert state_of(module) == before
    assert target.loaded is None


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("step", ["convert", "prepare", "is_aliasable", "partial"])
def test_an_error_anywhere_on_the_way_leaves_all_as_it_was(
    step: str, swap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def module(mark: float) -> nn.Module:
        return nn.Sequential(Picky(mark), Normalizing(mark), Normalizing(mark), Picky(mark))

    right = getattr(loader, step)
    for calls in range(40):
        left = calls

        def failing(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise torch.OutOfMemoryError("no memory")
            return right(*arguments, **options)

        model = module(0)
        target, before = WeightLoader(model), state_of(model)
        monkeypatch.setattr(loader, step, failing)
        try:
            target.load(extract_weights(module(1), "tensordict").detached(), swap=swap)
        except torch.OutOfMemoryError:
            assert state_of(model) == before
        else:
            assert same(model, module(1))
            break
        finally:
            monkeypatch.setattr(loader, step, right)
    assert calls > 0 or (step, swap) in {("is_aliasable", False)}
    assert calls < 39


@pytest.mark.usefixtures("finalizers_may_be_interrupted")
def test_a_load_that_a_signal_interrupts_is_whole_or_none() -> None:
    def module(mark: float) -> nn.Module:
        return nn.Sequential(*[Picky(mark) for _ in range(5)], *[Normalizing(mark) for _ in range(5)])

    def interrupt(_: int, frame: FrameType | None) -> None:
        if is_within(frame, load.__code__):  # and not behind it, where one more may come before the timer is stopped
            raise InterruptedError

    def load(weights: Weights, swap: bool) -> None:
        target.load(weights, swap=swap)
        while True:  # until the signal comes
            pass

    model, end = module(0), time.monotonic() + 5
    target, applied, number, pace = WeightLoader(model), 0, 0, 1e-5
    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        while (time.monotonic() < end and number < 1500) or not 0 < applied < number:
            number += 1
            pace *= 2 if number % 100 == 0 and not applied else 1  # on a machine where a load takes long
            weights = extract_weights(module(number + 1), "tensordict").detached()
            before = state_of(model)
            with suppress(InterruptedError, WeightSyncError):  # the latter out of set_extra_state
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + (number % 100) * pace, 1.0)
                load(weights, number % 2 == 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if target.loaded is weights:
                assert same(model, module(number + 1))
                applied += 1
            else:
                assert state_of(model) == before
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert 0 < applied < number


# -- the model changes -------------------------------------------------------------------------------------


def test_spare_copies_follow_a_model_whose_layers_are_replaced(scheme: Scheme) -> None:
    def make() -> TensorDictModule:
        layers = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1))
        return TensorDictModule(layers, in_keys=["x"], out_keys=["y"])

    changes: list[Callable[[Any], object]] = [
        lambda model: model.module.__setitem__(1, nn.Linear(4, 3)),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.module.append(nn.Linear(3, 3, dtype=torch.bfloat16)),
        lambda model: setattr(model.module[2], "bias", nn.Parameter(model.module[1].bias.detach().clone())),
        lambda model: setattr(model.module[2], "bias", model.module[1].bias),
        lambda model: model.module.__delitem__(2),
    ]
    source, served = make(), make()
    scheme.init_on_sender(model=source)
    own = scheme.for_worker(0)
    own.shares_memory = False  # type: ignore[misc]
    with InferenceServer(served, ThreadingTransport(), weight_sync=own, swap_weights=True) as server:
        scheme.connect(timeout=HANG)
        for change in [lambda model: None, *changes]:
            with server.paused():
                change(source)
                change(served)
            for _ in range(3):
                with torch.no_grad():
                    for parameter in source.parameters():
                        parameter.add_(1)
                scheme.send()
                assert same(served, source)


def test_tensors_that_a_module_makes_anew_in_set_extra_state_are_loaded_too() -> None:
    class Growing(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.full((size,), float(size)))

        def get_extra_state(self) -> int:
            return len(self.table)

        def set_extra_state(self, state: int) -> None:
            self.table = nn.Parameter(torch.zeros(state))

    model, source = Growing(3), Growing(3)
    WeightLoader(model).load(extract_weights(source, "tensordict"))
    assert torch.equal(model.table, source.table)


@pytest.mark.parametrize("nested", [False, True])
def test_a_lazily_stacked_model_is_refused_with_the_way_out(scheme: Scheme, nested: bool) -> None:
    lazy = lazy_stack([TensorDict({"w": torch.zeros(3)}) for _ in range(2)])
    model: Any = TensorDict({"inner": lazy}) if nested else lazy
    scheme.init_on_sender(weights=model)
    with pytest.raises(TypeError, match=r"contiguous\(\)"):
        scheme.for_worker(0).init_on_receiver(model_id="policy", model=model)
    dense = model.contiguous()
    scheme.connect()
    own = scheme.for_worker(0)
    own.init_on_receiver(model_id="policy", model=dense)
    own.connect()
    scheme.send_async(dense.apply(lambda tensor: tensor + 1))
    assert own.receive(HANG) is not None
    assert all(bool((tensor == 1).all()) for tensor in dense.values(True, True))
    own.shutdown()


# -- what is no weights ------------------------------------------------------------------------------------


# What an entry may be, and what the message says.
ODD: dict[str, tuple[Callable[[], Any], str]] = {
    "lazy": (lambda: nn.LazyLinear(3).weight, "not initialized.*run the model once"),
    "meta": (lambda: torch.empty(2, device="meta"), "meta device"),
    "sparse": (lambda: torch.eye(2).to_sparse(), "to_dense"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "to_padded_tensor"),
    "conjugate": (lambda: torch.ones(2, dtype=torch.complex64).conj(), "resolve_conj"),
    "negative": (lambda: torch.ones(2, dtype=torch.complex64).conj().imag, "resolve_neg"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 3, torch.quint8), "dequantize"),
    "number": (lambda: 3, "of type int"),
}


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("kind", ODD)
def test_what_cannot_be_copied_is_refused_before_anything_else_happens(scheme: Scheme, kind: str) -> None:
    make, message = ODD[kind]
    scheme.init_on_sender(model=linear(1))
    scheme.connect()
    own, target = scheme.for_worker(0), linear(0)
    own.init_on_receiver(model_id="policy", model=target)
    own.connect()
    scheme.send_async(linear(2))
    with pytest.raises(TypeError, match=f'"weight".*{message}'):
        scheme.send({"weight": make()})
    with (
        InferenceServer(TensorDictModule(linear(0), in_keys=["o"], out_keys=["a"]), ThreadingTransport()) as server,
        pytest.raises(TypeError, match=f'"weight".*{message}'),
    ):
        server.update_weights({"weight": make()})
    assert server.stats().refused_updates == 1
    assert own.receive(HANG) is not None  # what came before is still there
    assert value_of(target) == 2
    scheme.wait_async()
    own.shutdown()


def test_a_model_that_cannot_take_weights_yet_refuses_them_by_name_and_takes_them_later() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    target = WeightLoader(model)
    weights = extract_weights(nn.Sequential(nn.Linear(2, 3)), "tensordict")
    with pytest.raises(WeightSyncError, match=r"the model can't take weights.*\"0\.\w+\" is not initialized"):
        target.load(weights)
    model(torch.ones(1, 2))
    target.load(weights)
    assert torch.equal(next(model.parameters()), weights.tensors["0.weight"])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({1: torch.ones(1)}, "strings, got 1"),
        (TensorDict({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}), r'two are called "a\.b"'),
    ],
)
def test_names_are_strings_and_there_is_one_of_each(weights: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        extract_weights(weights, "state_dict")


# -- versions ----------------------------------------------------------------------------------------------


def test_versions_that_are_used_up_are_refused_by_name_and_nothing_is_applied(scheme: Scheme) -> None:
    served = TensorDictModule(linear(0), in_keys=["x"], out_keys=["y"])
    last = 2**63 - 1
    scheme.init_on_sender(model=TensorDictModule(linear(1), in_keys=["x"], out_keys=["y"]))
    with InferenceServer(served, ThreadingTransport(), weight_sync=scheme.for_worker(0)) as server:
        scheme.connect(version=last, timeout=HANG)
        other = TensorDictModule(linear(2), in_keys=["x"], out_keys=["y"])
        with pytest.raises(WeightSyncError, match=f"no version after {last}"):
            server.update_weights(other)
        with pytest.raises(WeightSyncError, match=f"worker 0 refused: there is no version after {last}"):
            scheme.send(other)
        reply = server.client()(TensorDict({"x": torch.ones(2)}), HANG)
        assert (reply["y"].tolist(), int(reply["policy_version"])) == ([2, 2], last)
        scheme.send(other, version=3)
        assert server.policy_version == 3


def test_a_boolean_is_no_version() -> None:
    with pytest.raises(TypeError, match="version must be an integer, got True"):
        check_version(True)


def test_every_refused_update_is_counted_whatever_is_wrong_with_it() -> None:
    class Leaving(Counter):
        def set_extra_state(self, state: Any) -> None:
            raise SystemExit(1)

    served = TensorDictModule(Leaving(0), in_keys=["x"], out_keys=["y"])
    with InferenceServer(served, ThreadingTransport()) as server:
        for weights, error in ((3, TypeError), ({"weight": 3}, TypeError), ({}, WeightSyncError), (served, SystemExit)):
            with pytest.raises(error):
                server.update_weights(weights)  # type: ignore[arg-type]
        eventually(lambda: server.stats().refused_updates == 4)
        assert server.stats().weight_updates == server.policy_version == 0


def test_a_worker_in_a_thread_that_refuses_serves_what_it_has(scheme: Scheme) -> None:
    target = nn.Sequential(Picky(0, refuses=RuntimeError))
    before = state_of(target)
    scheme.init_on_sender(model=nn.Sequential(Picky(0)))
    with following(scheme, 0, target):
        scheme.connect(timeout=HANG)
        with pytest.raises(WeightSyncError, match="RuntimeError: no"):
            scheme.send(nn.Sequential(Picky(1)))
        assert state_of(target) == before
