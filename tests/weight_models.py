"""Models and processes for the tests of weight synchronisation. Processes that are spawned import them from here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from aioinfer.testing import eventually
from aioinfer.testing.inspection import sender_of
from aioinfer.weight_sync import MultiProcessWeightSyncScheme, SharedMemWeightSyncScheme, WeightSyncScheme

SCHEMES: tuple[type[MultiProcessWeightSyncScheme] | type[SharedMemWeightSyncScheme], ...] = (
    MultiProcessWeightSyncScheme,
    SharedMemWeightSyncScheme,
)


class Marked(nn.Module):
    """All parameters and buffers have one value, the mark; the forward pass reads each, with a pause in between."""

    def __init__(self, mark: float = 0.0, *, seconds: float = 0.0, size: int = 500) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.empty(size)) for _ in range(5)])
        self.register_buffer("statistics", torch.empty(3))
        self.register_buffer("count", torch.empty((), dtype=torch.int64))
        self.seconds = seconds
        self.mark(mark)

    @torch.no_grad()
    def mark(self, value: float) -> None:
        for tensor in (*self.parameters(), *self.buffers()):
            tensor.fill_(value)

    def forward(self, observation: Tensor) -> Tensor:
        marks: list[Tensor] = []
        for part in self.parts:
            marks += [part[0].clone(), part[-1].clone()]
            time.sleep(self.seconds / len(self.parts))
        marks += [self.get_buffer("statistics")[0].clone(), self.get_buffer("count").float()]
        return torch.stack(marks).expand(observation.shape[0], -1)


def policy(mark: float = 0.0, **options: Any) -> TensorDictModule:
    return TensorDictModule(Marked(mark, **options), in_keys=["observation"], out_keys=["marks"])


def mark(module: nn.Module, value: float) -> None:
    for part in module.modules():
        if isinstance(part, Marked):
            part.mark(value)


def mark_of(reply: TensorDictBase) -> float:
    """The one mark that a reply was computed with; fails if there were several."""
    marks = reply["marks"]
    assert bool((marks == marks[0]).all()), f"torn: {marks.tolist()}"
    return float(marks[0])


class Counter(nn.Module):
    """A module with state that is no tensor."""

    def __init__(self, weight: float = 0.0, count: object = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), float(weight)))
        self.count = weight if count is None else count

    def get_extra_state(self) -> Any:
        return {"count": self.count}

    def set_extra_state(self, state: Any) -> None:
        if state["count"] == "rubbish":
            raise ValueError("rubbish")
        self.count = state["count"]


# -- processes ---------------------------------------------------------------------------------------------


def run_worker(scheme: WeightSyncScheme, worker_idx: int, orders: Connection[Any, Any]) -> None:
    """A worker that does as it is told: ``receive``, ``mark``, ``shutdown``, ``exit``."""
    torch.set_num_threads(1)
    module = policy(-1.0)
    scheme.init_on_receiver(model_id="policy", worker_idx=worker_idx, model=module)
    orders.send("ready")
    scheme.connect()
    answers: dict[str, Callable[[], Any]] = {
        "receive": lambda: scheme.receive(20) is not None,
        "mark": lambda: float(next(module.parameters()).detach()[0]),
        "shutdown": scheme.shutdown,
        "pid": os.getpid,
    }
    orders.send("connected")
    while (order := orders.recv()) != "exit":
        orders.send(answers[order]())


def follow_always(scheme: WeightSyncScheme, worker_idx: int, orders: Connection[Any, Any]) -> None:
    """A worker that applies what comes until it is told to end."""
    torch.set_num_threads(1)
    module = policy(-1.0)
    scheme.init_on_receiver(model_id="policy", worker_idx=worker_idx, model=module)
    try:
        scheme.connect(timeout=0.0)
    except TimeoutError:  # it has offered a connection: from now on the trainer notices when it dies
        orders.send("ready")
        try:
            scheme.connect()
        except TimeoutError:
            return
    else:
        orders.send("ready")
    orders.send("connected")
    while not orders.poll():
        scheme.receive(0.01)
    orders.recv()
    orders.send(float(next(module.parameters()).detach()[0]))


def train(scheme: WeightSyncScheme, orders: Connection[Any, Any]) -> None:
    """A trainer that publishes marks from 1 on until it is told to end, and spoils its own parameters in between."""
    torch.set_num_threads(1)
    orders.recv()
    module = policy(0.0)
    scheme.init_on_sender(model_id="policy", model=module)
    scheme.connect()
    mark(module, -1.0)
    orders.send("connected")
    number = 0
    while not orders.poll():
        number += 1
        mark(module, float(number))
        scheme.send(version=number)
        mark(module, -1.0)
        time.sleep(0.001)
    orders.recv()
    orders.send(number)


def large(value: float) -> nn.Linear:
    module = nn.Linear(8192, 4096, bias=False)
    nn.init.constant_(module.weight, value)
    return module


def follow_large(scheme: WeightSyncScheme, worker_idx: int, orders: Connection[Any, Any]) -> None:
    """A worker that applies what comes to :func:`large`, until it is killed."""
    torch.set_num_threads(1)
    module = large(-1.0)
    scheme.init_on_receiver(model_id="policy", worker_idx=worker_idx, model=module)
    orders.send("ready")
    scheme.connect()
    while True:
        scheme.receive(1.0)
        assert float(module.weight.detach()[0, 0]) == worker_idx + 1.0


def measure_peak(scheme: MultiProcessWeightSyncScheme, orders: Connection[Any, Any]) -> None:
    """A trainer that sends each worker its own weights, and says how many copies of them its memory held at most."""
    torch.set_num_threads(1)
    model = large(1.0)
    scheme.init_on_sender(model=model, device_map_fn=lambda index, weights: weights + index, num_workers=4)
    eventually(lambda: len(sender_of(scheme).connected(range(4))) == 4)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _kilobytes("VmRSS")
    scheme.connect()
    for _ in range(3):
        scheme.send()
    nbytes = model.weight.numel() * model.weight.element_size()
    orders.send((_kilobytes("VmHWM") - before) * 1024 / nbytes)
    orders.recv()


def _kilobytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field)))
