"""Weights by themselves: how they are read, copied, checked, and loaded, without anything that travels."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn

from aioinfer.ipc.queue import Descriptor, DescriptorQueue
from aioinfer.testing.inspection import put_bytes
from aioinfer.weight_sync.loader import WeightLoader
from aioinfer.weight_sync.snapshot import Layout, SnapshotPool, SnapshotReader, clone_tensors
from aioinfer.weight_sync.weights import Strategy, Weights, extract_weights, to_strategy
from tests.weight_models import Counter

STRATEGIES: tuple[Strategy, ...] = ("tensordict", "state_dict")


def rich() -> nn.Sequential:
    """Parameters, tied ones, buffers of several kinds, an empty tensor, and extra state."""
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False), Counter(7))
    module[2].weight = module[0].weight
    module.register_buffer("mask", torch.tensor([True, False]))
    module.register_buffer("halves", torch.ones(2, 2, dtype=torch.bfloat16))
    module.register_buffer("empty", torch.empty(0, 4))
    module.register_buffer("passing", torch.ones(1), persistent=False)
    return module


def scramble(module: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(torch.rand(tensor.shape) > 0.5)


def same(one: nn.Module, other: nn.Module, strategy: Strategy = "tensordict") -> bool:
    left, right = extract_weights(one, strategy), extract_weights(other, strategy)
    equal = all(torch.equal(tensor, right.tensors[name]) for name, tensor in left.tensors.items())
    return equal and left.tensors.keys() == right.tensors.keys() and left.extra_states == right.extra_states


def travelled(weights: Weights) -> Weights:
    """What arrives of published weights."""
    ref, buffer = SnapshotPool().take(weights, None)
    queue = DescriptorQueue()
    queue.put(ref)
    arrived = SnapshotReader().read(queue.get_nowait())
    queue.close()
    del buffer
    return arrived


# -- reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_everything_that_a_module_has_is_read(strategy: Strategy) -> None:
    weights = extract_weights(rich(), strategy)
    expected = dict(rich().state_dict())
    assert weights.extra_states == {"3._extra_state": expected.pop("3._extra_state")}
    assert weights.tensors.keys() == expected.keys() | ({"passing"} if strategy == "tensordict" else set())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_read_can_be_given_back_and_read_again(strategy: Strategy) -> None:
    weights = extract_weights(rich(), strategy)
    again = extract_weights(to_strategy(weights, strategy), strategy)
    assert again.tensors.keys() == weights.tensors.keys()
    assert again.extra_states == weights.extra_states


def test_a_tensordict_of_a_module_is_read_as_the_module() -> None:
    module = rich()
    td = TensorDict.from_module(module)
    assert extract_weights(td, "tensordict").tensors.keys() == extract_weights(module, "tensordict").tensors.keys()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "a module, a TensorDict or a state dict"),
        ({"weight": 3}, '"weight" is of type int'),
        ({"weight": torch.eye(2).to_sparse()}, '"weight" is of layout torch.sparse_coo'),
    ],
)
def test_what_is_no_weights_is_refused(source: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        extract_weights(source, "tensordict")


# -- travelling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_everything_travels_and_fits(strategy: Strategy) -> None:
    source, target = rich(), rich()
    scramble(source)
    source[3] = Counter(8)
    WeightLoader(target).load(travelled(extract_weights(source, strategy)))
    assert same(source, target, strategy)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.int8, torch.complex64]),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        max_size=8,
    )
)
def test_tensors_of_any_dtype_and_shape_travel(kinds: list[tuple[torch.dtype, list[int]]]) -> None:
    tensors = {str(index): (torch.rand(shape) * 3).to(dtype) for index, (dtype, shape) in enumerate(kinds)}
    arrived = travelled(Weights(tensors, {})).tensors
    assert arrived.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert arrived[name].dtype == tensor.dtype
        assert torch.equal(arrived[name], tensor)


def test_tensors_that_are_not_contiguous_travel() -> None:
    tensor = torch.arange(12.0).reshape(3, 4).t()[::2]
    assert torch.equal(travelled(Weights({"weight": tensor}, {})).tensors["weight"], tensor)


def test_tied_tensors_share_memory_in_a_snapshot() -> None:
    weights = extract_weights(rich(), "tensordict").tensors
    copies = clone_tensors(weights)
    assert copies["0.weight"] is copies["2.weight"]
    assert copies["0.weight"].data_ptr() != weights["0.weight"].data_ptr()
    arrived = travelled(extract_weights(rich(), "state_dict")).tensors
    assert arrived["0.weight"].data_ptr() == arrived["2.weight"].data_ptr()


def test_a_layout_is_kept_while_the_tensors_have_it() -> None:
    pool, module = SnapshotPool(), rich()
    layout = pool.layout_of(extract_weights(module, "tensordict").tensors)
    scramble(module)
    assert pool.layout_of(extract_weights(module, "tensordict").tensors) is layout
    module[2].weight = nn.Parameter(torch.ones(3, 3))  # no longer tied
    assert pool.layout_of(extract_weights(module, "tensordict").tensors).nbytes > layout.nbytes
    assert Layout.unpickle(layout.pickled) == layout


def test_memory_is_used_again_when_nobody_reads_it() -> None:
    pool, weights = SnapshotPool(), Weights({"weight": torch.ones(10)}, {})
    first, buffer = pool.take(weights, None)
    buffer.refcount += 1
    second, _ = pool.take(weights, None)
    assert second.segment_id != first.segment_id
    buffer.refcount -= 1
    third, _ = pool.take(weights, None)
    assert third.segment_id == first.segment_id
    larger, _ = pool.take(Weights({"weight": torch.ones(10**6)}, {}), None)
    assert larger.segment_id not in {first.segment_id, second.segment_id}


# -- queues ------------------------------------------------------------------------------------------------


def test_a_queue_refuses_what_is_too_long() -> None:
    queue = DescriptorQueue()
    with pytest.raises(ValueError, match="may have 2048 bytes"):
        queue.put(b"x" * 3000)
    queue.close()


def test_what_cannot_be_unpickled_is_an_error_that_says_so() -> None:
    queue = DescriptorQueue()
    put_bytes(queue, b"rubbish")
    with pytest.raises(ValueError, match="can't be unpickled"):
        queue.get_nowait()
    queue.close()


def test_a_queue_carries_descriptors_and_gives_back_what_nobody_has_got() -> None:
    queue, other = DescriptorQueue(), DescriptorQueue()
    queue.put(("here", Descriptor(other.fileno())))
    word, descriptor = queue.get_nowait()
    assert word == "here"
    assert descriptor != other.fileno()
    assert os.fstat(descriptor).st_ino == os.fstat(other.fileno()).st_ino
    os.close(descriptor)
    queue.close()
    other.close()
