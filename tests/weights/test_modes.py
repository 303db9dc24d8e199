"""Torch modes of the program: nothing that lasts is made under those that happen to be set at the first call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.weight_sync.loader import WeightLoader
from aioinfer.weight_sync.weights import extract_weights
from tests.limits import HANG
from tests.weights.test_weights import rich, same, scramble, travelled
from tests.weights.workers import Scheme, following, linear, scheme, value_of

__all__ = ["scheme"]


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")  # stands for a GPU: what is made there by mistake can't be used
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


Mode = Callable[[], AbstractContextManager[Any]]
MODES: list[Mode] = [torch.inference_mode, default_device, default_dtype]


class Remembering(nn.Linear):
    """Has a tensor in its extra state."""

    def __init__(self, value: float) -> None:
        super().__init__(2, 2, bias=False, device="cpu", dtype=torch.float32)
        nn.init.constant_(self.weight, value)
        self.sum = torch.full((2,), value, device="cpu", dtype=torch.float32)

    def get_extra_state(self) -> Any:
        return self.sum

    def set_extra_state(self, state: Any) -> None:
        self.sum = state


def use(module: nn.Module) -> None:
    """What a program may do with its weights: write to them, and learn."""
    if isinstance(module, Remembering):
        module.sum += 1
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.add_(1).sub_(1)
        torch.autograd.backward((parameter * 2).sum())
        assert parameter.grad is not None
        parameter.grad = None


@pytest.mark.parametrize("mode", MODES)
def test_a_trainer_connects_or_sends_first_under_any_mode(scheme: Scheme, mode: Mode) -> None:
    sources = [Remembering(value) for value in range(6)]
    target = Remembering(-1)
    scheme.init_on_sender(model=sources[0])
    with following(scheme, 0, target):
        with mode():
            scheme.connect(timeout=HANG)
            scheme.send(sources[1])
        for value in range(2, 6):
            scheme.send(sources[value])
            assert value_of(target) == value
            assert target.sum.tolist() == [value, value]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_model", [True, False])
def test_a_worker_receives_first_under_any_mode(scheme: Scheme, mode: Mode, with_model: bool) -> None:
    target = Remembering(-1)
    scheme.init_on_sender(model=Remembering(0))
    scheme.connect()
    own = scheme.for_worker(0)
    own.init_on_receiver(model_id="policy", model=target if with_model else None)
    with mode():
        own.connect()
        scheme.send_async(Remembering(1))
        weights = own.receive(HANG)
    for value in range(1, 4):
        assert weights is not None
        assert isinstance(weights, TensorDict)
        assert weights["weight"].tolist() == [[value, value]] * 2
        assert weights["weight"].dtype == torch.float32
        weights["weight"].data.add_(0)
        use(target)
        scheme.send_async(Remembering(value + 1))
        weights = own.receive(HANG)
    own.shutdown()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("swap", [False, True])
def test_a_server_is_updated_under_any_mode(scheme: Scheme, mode: Mode, swap: bool) -> None:
    served = Remembering(-1)
    scheme.init_on_sender(model=Remembering(0))
    with InferenceServer(
        served,
        ThreadingTransport(),
        weight_sync=scheme.for_worker(0),
        swap_weights=swap,
    ) as server:
        with mode():
            scheme.connect(timeout=HANG)
            server.update_weights(Remembering(1))
        for value in (2, 4, 6):
            server.update_weights(Remembering(value))
            assert value_of(served) == value
            with server.paused():
                use(served)
            scheme.send(Remembering(value + 1))
            assert value_of(served) == value + 1
    use(served)


@pytest.mark.parametrize("mode", MODES)
def test_memory_that_a_model_is_given_can_be_written_to_under_any_mode(mode: Mode) -> None:
    source, target = rich(), rich()
    target.register_buffer("mask", torch.zeros(1, dtype=torch.bool).expand(2))
    model = WeightLoader(target)
    for swap in (True, False, True):
        scramble(source)
        weights = travelled(extract_weights(source, "tensordict"))
        with mode():
            model.load(model.stage(weights, []) if swap else weights, swap=swap)
        assert same(source, target)
        scramble(target)
        use(linear(0))
