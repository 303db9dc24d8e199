"""Batches on their way to the device and back. The only file with device code.

On CUDA, requests are stacked straight into pinned memory and travel on a stream of the model thread's
own; one event per batch tells that the replies are there. Nothing synchronises the whole device, but the capture of a
CUDA graph.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from aioinfer.buckets import BatchLayout, PaddedRunner, find_bucket, take_rows
from aioinfer.errors import ModelError, describe
from aioinfer.interaction_type import InteractionType, interaction_type
from aioinfer.modes import long_lived
from aioinfer.tensors import Allocate, build, check_output, entries, is_nested

__all__ = ["CudaPlacement", "GraphPlacement", "HostPlacement", "Model", "Placement", "place", "settle"]

# Passes before a capture, in which libraries make what they must not make while it lasts.
_PASSES_BEFORE_CAPTURE = 3
# Graphs whose capture has failed: torch's allocators may still ask them which streams belong to it.
_failed_captures: list[Any] = []
# Held by the one server of this process that captures.
_capture_lock = threading.Lock()

_log = logging.getLogger("aioinfer")

Model = Callable[[TensorDictBase], TensorDictBase]
Check = Callable[[Any], TensorDictBase]
Split = Callable[[TensorDictBase], Sequence[TensorDictBase]]
Keys = frozenset[str] | None


class Placement(Protocol):
    """Where the model runs. Model thread only."""

    def open(self, model: Model) -> None:
        """Make what the device needs, and move the model there."""
        ...

    def build(self, make: Callable[[Allocate | None], TensorDictBase]) -> TensorDictBase:
        """Make a batch so that it travels fast, after what made its requests.

        Args:
            make: copies the requests into memory that it is told how to allocate.
        """
        ...

    def run(
        self, model: Model, batch: TensorDictBase, check: Check, split: Split, keys: Keys
    ) -> Sequence[TensorDictBase]:
        """Run the model over a batch where it lives, and bring one reply per row back.

        Args:
            model: what to run.
            batch: ``[B, ...]``, where its requests were.
            check: returns the model's output if it is a proper one, else raises.
            split: makes the replies of an output.
            keys: the entries of an output that replies have; ``None``: all.
        """
        ...

    def update(self, write: Callable[[], None], *, tensors_only: bool = True) -> None:
        """Let ``write`` change the model's weights, after the pass before and ahead of the next one.

        Args:
            write: changes them.
            tensors_only: whether it changes nothing but the values of tensors.
        """
        ...


def place(
    device: torch.device | str | int | None,
    output_device: torch.device | str | int | None,
    graph_sizes: Sequence[int] | None = None,
) -> Placement:
    """Choose the placement for ``InferenceServer(device=..., output_device=..., cuda_graphs=...)``.

    Args:
        device: where the model runs.
        output_device: where replies go.
        graph_sizes: the batch sizes for which CUDA graphs are captured, in ascending order; ``None``: none are.

    Raises:
        ValueError: there are ``graph_sizes``, and ``device`` is no CUDA device.
    """
    there = None if device is None else torch.device(device)
    back = None if output_device is None else torch.device(output_device)
    if there is not None and there.type == "cuda":
        return CudaPlacement(there, back) if graph_sizes is None else GraphPlacement(there, back, graph_sizes)
    if graph_sizes is not None:
        raise ValueError(f'cuda_graphs=True needs a CUDA device, such as device="cuda"; got device={device!r}')
    return HostPlacement(there, back)


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

    def build(self, make: Callable[[Allocate | None], TensorDictBase]) -> TensorDictBase:
        return make(None)

    def run(
        self, model: Model, batch: TensorDictBase, check: Check, split: Split, keys: Keys
    ) -> Sequence[TensorDictBase]:
        target = self._output_device
        if self._device is not None:
            target = target or _origin(batch)
            batch = batch.to(self._device)
        output = check(model(batch))
        return split(output if target is None else select(output, keys).to(target))

    def update(self, write: Callable[[], None], *, tensors_only: bool = True) -> None:
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
        self._event: Any = None  # records the end of one batch, or update, after the other

    def open(self, model: Model) -> None:
        if self._device == torch.device("cuda"):  # with its number, as the devices of tensors have it
            self._device = torch.device("cuda", self._cuda.current_device())
        move_model(model, self._device)
        self._stream = self._cuda.Stream(self._device)
        self._event = self._cuda.Event()
        # What wrote the parameters may still run on the stream that was current until now.
        self._stream.wait_stream(self._cuda.current_stream(self._device))

    def build(self, make: Callable[[Allocate | None], TensorDictBase]) -> TensorDictBase:
        with self._cuda.stream(self._stream):
            # Requests that live on the device were written on the callers' stream, by default the default one.
            self._stream.wait_stream(self._cuda.default_stream(self._device))
            return make(self.allocate_pinned)

    def allocate_pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate memory from which copies to the device need not be waited for."""
        # torch keeps freed pinned blocks, and reuses one only after the copies that read it have ended.
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def run(
        self, model: Model, batch: TensorDictBase, check: Check, split: Split, keys: Keys
    ) -> Sequence[TensorDictBase]:
        target = self._output_device or _origin(batch) or torch.device("cpu")
        with self._cuda.stream(self._stream):
            output = select(check(self._compute(model, batch)), keys)
            if target.type == "cuda":
                replies = split(move(output, target))
                self._synchronize()
                self._lend(replies, target)
                return replies
            output = move(output, target)
            self._synchronize()
            return split(output)  # copied out of the pinned block, which goes back to its pool

    def _compute(self, model: Model, batch: TensorDictBase) -> TensorDictBase:
        return model(move(batch, self._device))

    def update(self, write: Callable[[], None], *, tensors_only: bool = True) -> None:
        with self._cuda.stream(self._stream):
            write()
            self._synchronize()  # the lender of the new weights may write to them again from now on

    def _synchronize(self) -> None:
        self._event.record(self._stream)
        self._event.synchronize()

    def _lend(self, replies: Sequence[TensorDictBase], device: torch.device) -> None:
        """Keep the allocator from reusing the replies' memory while their callers' stream works on it."""
        consumer = self._cuda.default_stream(device)
        for reply in replies:
            for leaf in reply.values(True, True):
                if isinstance(leaf, Tensor):
                    leaf.record_stream(consumer)


class GraphPlacement(CudaPlacement):
    """Replays a CUDA graph for each batch instead of launching the kernels of the model one by one.

    There is a graph for each bucket and exploration mode, captured when the first batch of them comes: for the mode in
    force by default that is the warm-up, which begins with the largest bucket, so that the others find room in its
    memory. All read the same static inputs; requests are copied into these straight from pinned memory, and padded
    there. All graphs run on one stream, one after the other, so they may share the memory of one pool.

    A model that can't be captured in some mode is run without graphs in that mode, with padded batches. A batch of
    another layout than the first one, as a ``collate_fn`` may make it, is run so too.

    Args:
        device: the CUDA device.
        output_device: as for :class:`CudaPlacement`.
        sizes: of the buckets, in ascending order.
        cuda: as for :class:`CudaPlacement`.
    """

    def __init__(
        self, device: torch.device, output_device: torch.device | None, sizes: Sequence[int], cuda: Any = torch.cuda
    ) -> None:
        super().__init__(device, output_device, cuda)
        self._sizes = sizes

    def open(self, model: Model) -> None:
        super().open(model)
        self._module = model if isinstance(model, nn.Module) else None
        self._refused: set[InteractionType | None] = set()
        self._layout: BatchLayout | None = None
        self._inputs: TensorDict | None = None
        self._padded: PaddedRunner | None = None
        self._drop_graphs()

    def _drop_graphs(self) -> None:
        self._graphs: dict[tuple[InteractionType | None, int], _Graph] = {}
        self._pool = self._cuda.graph_pool_handle()
        self._addresses = self._find_addresses()

    def _find_addresses(self) -> list[int]:
        """Where the weights lie, which graphs know."""
        if self._module is None:
            return []
        return [tensor.data_ptr() for tensor in chain(self._module.parameters(), self._module.buffers())]

    def allocate_static(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate memory of the device that graphs read from."""
        return torch.empty(shape, dtype=dtype, device=self._device)

    def update(self, write: Callable[[], None], *, tensors_only: bool = True) -> None:
        super().update(write)
        if not tensors_only or self._addresses != self._find_addresses():  # what was captured may not be so any more
            self._drop_graphs()

    def _compute(self, model: Model, batch: TensorDictBase) -> TensorDictBase:
        mode, count = interaction_type(), batch.batch_size[0]
        size = find_bucket(self._sizes, count)
        if mode not in self._refused and (inputs := self._write(batch, count, size)) is not None:
            graph = self._graphs.get((mode, size))
            if graph is None and (graph := self._capture(model, inputs, mode, size)) is not None:
                self._write(batch, count, size)  # the model may have written to its inputs
            if graph is not None:
                return take_rows(graph.replay(), count)
        if self._padded is None:
            self._padded = PaddedRunner(model, self._sizes)
        return self._padded(move(batch, self._device))

    def _write(self, batch: TensorDictBase, count: int, size: int) -> TensorDictBase | None:
        """Copy a batch to the static inputs and pad it there; return them, or ``None`` if it does not fit."""
        if self._layout is None or self._inputs is None:
            self._layout = BatchLayout(batch, self._device)
            largest = self._sizes[-1]
            with long_lived():
                self._inputs = self._layout.arrange(
                    batch, largest, lambda leaf: self.allocate_static((largest, *leaf.shape[1:]), leaf.dtype)
                )
        inputs = take_rows(self._inputs, size)
        return inputs if write_rows(inputs, self._layout.arrange(batch, count), count) else None

    def _capture(self, model: Model, inputs: TensorDictBase, mode: InteractionType | None, size: int) -> _Graph | None:
        for _ in range(_PASSES_BEFORE_CAPTURE):
            check_output(model(take_rows(inputs, size)), size)
        graph = self._cuda.CUDAGraph()
        try:
            # Other threads may use CUDA meanwhile, but a capture begins with a synchronisation that ends another one.
            options = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
            with _capture_lock, self._cuda.graph(graph, **options):
                outputs = model(take_rows(inputs, size))
            check_captured(outputs, inputs)
        except Exception as error:
            self._abandon(graph)
            self._refused.add(mode)
            for key in [key for key in self._graphs if key[0] is mode]:
                del self._graphs[key]
            _log.warning(
                "the model can't be captured in a CUDA graph, and is run without graphs%s: %s",
                "" if mode is None else f" in exploration mode {mode}",
                describe(error.__context__ or error),  # the end of a capture that has failed raises, too
            )
            return None
        made = self._graphs[mode, size] = _Graph(graph, outputs)
        return made

    def _abandon(self, graph: Any) -> None:
        """Undo a capture that has failed.

        Where its end raises too, torch (2.13) leaves the allocator recording to the pool. While it does, the pool takes
        no other capture, and no memory that a second stream has used is used again.
        """
        graph.reset()
        _failed_captures.append(graph)
        with suppress(AttributeError, RuntimeError):  # it does not record any more
            self._cuda.memory._cuda_endAllocateToPool(self._device.index, self._pool)
            self._cuda.memory._cuda_releasePool(self._device.index, self._pool)
        self._pool = self._cuda.graph_pool_handle()


class _Graph:
    """A captured pass: what it reads and writes stays where it is.

    Args:
        graph: that was captured.
        outputs: what the model returned meanwhile, ``[size, ...]``; has values after a replay.
    """

    def __init__(self, graph: Any, outputs: TensorDictBase) -> None:
        self._graph = graph
        self._outputs = outputs

    def replay(self) -> TensorDictBase:
        """Compute the outputs from the static inputs, in memory that the next replay writes to."""
        self._graph.replay()
        return self._outputs


def write_rows(inputs: TensorDictBase, batch: TensorDictBase, count: int) -> bool:
    """Copy a batch ``[count, ...]`` to inputs ``[size, ...]``, and its first row to those left; or return ``False``."""
    targets, sources = entries(inputs), entries(batch)
    for name, target in targets.items():
        source = sources[name]
        if is_nested(target):
            if not write_rows(target, source, count):
                return False
            continue
        if source.shape[1:] != target.shape[1:] or source.dtype != target.dtype:
            return False
        target[:count].copy_(source, non_blocking=True)
        if count < target.shape[0]:
            target[count:].copy_(target[:1])
    return True


def check_captured(output: Any, inputs: TensorDictBase) -> None:
    """Raise :class:`ModelError` if a replay would not write all of an output, since some of it is not on the device."""
    check_output(output, inputs.batch_size[0])
    devices = {leaf.device for leaf in inputs.values(True, True)}
    for key, leaf in output.items(True, True):
        if not isinstance(leaf, Tensor) or leaf.device not in devices:
            raise ModelError(f"{key!r} of its output is not a tensor on the device")


def settle(tensors: Iterable[Tensor]) -> None:
    """Wait until what this thread has written to ``tensors`` is there for every other thread and stream."""
    for device in {tensor.device for tensor in tensors}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def select(output: TensorDictBase, keys: Keys) -> TensorDictBase:
    """The entries that replies have, so that no others travel; all if one is lacking, so that a message can say so."""
    if keys is None or type(output) is not TensorDict or not keys.issubset(found := entries(output)):
        return output
    return build({name: value for name, value in found.items() if name in keys}, output.batch_size, output.device)


def move(td: TensorDictBase, device: torch.device) -> TensorDictBase:
    """Copy a TensorDict to another device, without waiting where it is pinned."""
    moved = td.apply(lambda leaf: leaf.to(device, non_blocking=True), device=device)
    assert moved is not None  # it is only with filter_empty
    return moved
