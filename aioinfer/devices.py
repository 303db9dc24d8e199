"""Batches on their way to the device and back. The only file with device code.

On CUDA, requests are stacked straight into pinned memory and travel on a stream of the model thread's
own; one event per batch tells that the replies are there. Nothing synchronises the whole device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from aioinfer.tensors import Allocate

__all__ = ["CudaPlacement", "HostPlacement", "Model", "Placement", "place", "settle"]

Model = Callable[[TensorDictBase], TensorDictBase]
Check = Callable[[Any], TensorDictBase]
Split = Callable[[TensorDictBase], Sequence[TensorDictBase]]


class Placement(Protocol):
    """Where the model runs. Model thread only."""

    def open(self, model: Model) -> None:
        """Make what the device needs, and move the model there."""
        ...

    def build(self, make: Callable[[Allocate | None], TensorDict]) -> TensorDict:
        """Make a batch so that it travels fast.

        Args:
            make: copies the requests into memory that it is told how to allocate.
        """
        ...

    def run(self, model: Model, batch: TensorDictBase, check: Check, split: Split) -> Sequence[TensorDictBase]:
        """Run the model over a batch where it lives, and bring one reply per row back.

        Args:
            model: what to run.
            batch: ``[B, ...]``, where its requests were.
            check: returns the model's output if it is a proper one, else raises.
            split: makes the replies of an output.
        """
        ...

    def update(self, write: Callable[[], None]) -> None:
        """Let ``write`` change the model's weights, after the pass before and ahead of the next one."""
        ...


def place(device: torch.device | str | int | None, output_device: torch.device | str | int | None) -> Placement:
    """Choose the placement for ``InferenceServer(device=..., output_device=...)``."""
    there = None if device is None else torch.device(device)
    back = None if output_device is None else torch.device(output_device)
    return CudaPlacement(there, back) if there is not None and there.type == "cuda" else HostPlacement(there, back)


def _origin(batch: TensorDictBase) -> torch.device | None:
    """The device of a batch: its own, or that of its first leaf."""
    if batch.device is not None:
        return batch.device
    return next((leaf.device for leaf in batch.values(True, True) if isinstance(leaf, Tensor)), None)


def move_model(model: Model, device: torch.device) -> None:
    """Move the parameters and buffers of a model, if it is a module."""
    if isinstance(model, nn.Module):
        model.to(device)


class HostPlacement:
    """Plain moves: nothing at all without ``device``."""

    def __init__(self, device: torch.device | None, output_device: torch.device | None) -> None:
        self._device = device
        self._output_device = output_device

    def open(self, model: Model) -> None:
        if self._device is not None:
            move_model(model, self._device)

    def build(self, make: Callable[[Allocate | None], TensorDict]) -> TensorDict:
        return make(None)

    def run(self, model: Model, batch: TensorDictBase, check: Check, split: Split) -> Sequence[TensorDictBase]:
        target = self._output_device
        if self._device is not None:
            target = target or _origin(batch)
            batch = batch.to(self._device)
        output = check(model(batch))
        return split(output if target is None else output.to(target))

    def update(self, write: Callable[[], None]) -> None:
        write()


class CudaPlacement:
    """Pinned staging, non-blocking copies on an own stream, one event per batch.

    Args:
        device: the CUDA device.
        output_device: where replies go; ``None`` sends them back to where their requests were.
        cuda: ``torch.cuda``, or what stands in for it.
    """

    def __init__(self, device: torch.device, output_device: torch.device | None, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._output_device = output_device
        self._cuda = cuda
        self._stream: Any = None

    def open(self, model: Model) -> None:
        move_model(model, self._device)
        self._stream = self._cuda.Stream(self._device)
        # What wrote the parameters may still run on the stream that was current until now.
        self._stream.wait_stream(self._cuda.current_stream(self._device))

    def build(self, make: Callable[[Allocate | None], TensorDict]) -> TensorDict:
        with self._cuda.stream(self._stream):
            # Requests that live on the device were written on the callers' stream, by default the default one.
            self._stream.wait_stream(self._cuda.default_stream(self._device))
            return make(self.allocate_pinned)

    def allocate_pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate memory from which copies to the device need not be waited for."""
        # torch keeps freed pinned blocks, and reuses one only after the copies that read it have ended.
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def run(self, model: Model, batch: TensorDictBase, check: Check, split: Split) -> Sequence[TensorDictBase]:
        target = self._output_device or _origin(batch) or torch.device("cpu")
        with self._cuda.stream(self._stream):
            output = check(model(move(batch, self._device)))
            if target.type == "cuda":
                replies = split(move(output, target))
                self._synchronize()
                self._lend(replies, target)
                return replies
            output = move(output, target)
            self._synchronize()
            return split(output)  # copied out of the pinned block, which goes back to its pool

    def update(self, write: Callable[[], None]) -> None:
        with self._cuda.stream(self._stream):
            write()
            self._synchronize()  # the lender of the new weights may write to them again from now on

    def _synchronize(self) -> None:
        event = self._cuda.Event()
        event.record(self._stream)
        event.synchronize()

    def _lend(self, replies: Sequence[TensorDictBase], device: torch.device) -> None:
        """Keep the allocator from reusing the replies' memory while their callers' stream works on it."""
        consumer = self._cuda.default_stream(device)
        for reply in replies:
            for leaf in reply.values(True, True):
                if isinstance(leaf, Tensor):
                    leaf.record_stream(consumer)


def settle(tensors: Iterable[Tensor]) -> None:
    """Wait until what this thread has written to ``tensors`` is there for every other thread and stream."""
    for device in {tensor.device for tensor in tensors}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def move(td: TensorDictBase, device: torch.device) -> TensorDictBase:
    """Copy a TensorDict to another device, without waiting where it is pinned."""
    moved = td.apply(lambda leaf: leaf.to(device, non_blocking=True), device=device)
    assert moved is not None  # it is only with filter_empty
    return moved
