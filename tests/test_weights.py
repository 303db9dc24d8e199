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

from aioinfer import WeightSyncError
from aioinfer.weight_sync.publications import Reader, Shelf
from aioinfer.weight_sync.queues import Descriptor, DescriptorQueue
from aioinfer.weight_sync.snapshots import Layout, LayoutCache, snapshot
from aioinfer.weight_sync.targets import ModelTarget
from aioinfer.weight_sync.weights import Strategy, Weights, given_back, read
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
    left, right = read(one, strategy), read(other, strategy)
    equal = all(torch.equal(tensor, right.tensors[name]) for name, tensor in left.tensors.items())
    return equal and left.tensors.keys() == right.tensors.keys() and left.extra_states == right.extra_states


def travelled(weights: Weights) -> Weights:
    """What arrives of published weights."""
    publication, stored = Shelf().publish(weights, None)
    queue = DescriptorQueue()
    queue.put(publication)
    arrived = Reader().read(queue.get(timeout=5))
    queue.close()
    del stored
    return arrived


# -- reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_everything_that_a_module_has_is_read(strategy: Strategy) -> None:
    weights = read(rich(), strategy)
    expected = dict(rich().state_dict())
    assert weights.extra_states == {"3._extra_state": expected.pop("3._extra_state")}
    assert weights.tensors.keys() == expected.keys() | ({"passing"} if strategy == "tensordict" else set())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_read_can_be_given_back_and_read_again(strategy: Strategy) -> None:
    weights = read(rich(), strategy)
    again = read(given_back(weights, strategy), strategy)
    assert again.tensors.keys() == weights.tensors.keys()
    assert again.extra_states == weights.extra_states


def test_a_tensordict_of_a_module_is_read_as_the_module() -> None:
    module = rich()
    assert (
        read(TensorDict.from_module(module), "tensordict").tensors.keys() == read(module, "tensordict").tensors.keys()
    )


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
        read(source, "tensordict")


# -- travelling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_everything_travels_and_fits(strategy: Strategy) -> None:
    source, target = rich(), rich()
    scramble(source)
    source[3] = Counter(8)
    ModelTarget(target).load(travelled(read(source, strategy)))
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
    weights = read(rich(), "tensordict").tensors
    copies = snapshot(weights)
    assert copies["0.weight"] is copies["2.weight"]
    assert copies["0.weight"].data_ptr() != weights["0.weight"].data_ptr()
    arrived = travelled(read(rich(), "state_dict")).tensors
    assert arrived["0.weight"].data_ptr() == arrived["2.weight"].data_ptr()


def test_a_layout_is_kept_while_the_tensors_have_it() -> None:
    cache, module = LayoutCache(), rich()
    layout = cache.of(read(module, "tensordict").tensors)
    scramble(module)
    assert cache.of(read(module, "tensordict").tensors) is layout
    module[2].weight = nn.Parameter(torch.ones(3, 3))  # no longer tied
    assert cache.of(read(module, "tensordict").tensors).nbytes > layout.nbytes
    assert Layout.unpickle(layout.pickled) == layout


def test_memory_is_used_again_when_nobody_reads_it() -> None:
    shelf, weights = Shelf(), Weights({"weight": torch.ones(10)}, {})
    first, stored = shelf.publish(weights, None)
    stored.readers += 1
    second, _ = shelf.publish(weights, None)
    assert second.segment_id != first.segment_id
    stored.readers -= 1
    third, _ = shelf.publish(weights, None)
    assert third.segment_id == first.segment_id
    larger, _ = shelf.publish(Weights({"weight": torch.ones(10**6)}, {}), None)
    assert larger.segment_id not in {first.segment_id, second.segment_id}


# -- loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [False, True])
def test_tied_parameters_stay_tied_and_parameters_stay_the_same_objects(swap: bool) -> None:
    source, target = rich(), rich()
    scramble(source)
    before = dict(target.named_parameters(remove_duplicate=False))
    model = ModelTarget(target)
    weights = travelled(read(source, "tensordict"))
    model.load(model.spare(weights) if swap else weights, swap=swap)
    assert dict(target.named_parameters(remove_duplicate=False)) == before
    assert target[2].weight is target[0].weight
    assert same(source, target)


def test_weights_are_copied_in_place_unless_they_are_swapped() -> None:
    target = nn.Linear(3, 3)
    model, address = ModelTarget(target), target.weight.data_ptr()
    model.load(read(nn.Linear(3, 3), "tensordict"))
    assert target.weight.data_ptr() == address
    new = read(nn.Linear(3, 3), "tensordict").detached()
    model.load(new, swap=True)
    assert target.weight.data_ptr() == new.tensors["weight"].data_ptr() != address
    model.copy_borrowed()
    assert target.weight.data_ptr() != new.tensors["weight"].data_ptr()
    assert torch.equal(target.weight, new.tensors["weight"])


def test_a_spare_copy_is_not_the_one_in_use() -> None:
    target = nn.Linear(3, 3)
    model = ModelTarget(target)
    for _ in range(5):
        source = nn.Linear(3, 3)
        spare = model.spare(read(source, "tensordict"))
        assert spare.tensors["weight"].data_ptr() != target.weight.data_ptr()
        model.load(spare, swap=True)
        assert torch.equal(target.weight, source.weight)


LINEAR = {"weight": torch.ones(3, 3), "bias": torch.ones(3)}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"weight": torch.ones(3, 3)}, '"bias" is missing'),
        ({**LINEAR, "scale": torch.ones(3)}, 'the model has no "scale"'),
        ({**LINEAR, "bias": torch.ones(4)}, r'"bias" has shape \[4\], the model has \[3\]'),
        ({**LINEAR, "bias": torch.ones(3).long()}, '"bias" has dtype torch.int64, the model has torch.float32'),
        ({**LINEAR, "a": 0, "b": 0, "c": 0, "d": 0}, 'no "a".*no "b".*no "c", and 1 more'),
        ({**LINEAR, "_extra_state": 3}, 'the model has no "_extra_state"'),
        ({**LINEAR, "inner._extra_state": 3}, 'the model has no "inner._extra_state"'),
    ],
)
@pytest.mark.parametrize("swap", [False, True])
def test_weights_that_do_not_fit_are_refused_as_a_whole(weights: dict[str, Any], message: str, swap: bool) -> None:
    filled = {name: torch.zeros(1) if len(name) == 1 else value for name, value in weights.items()}
    target = nn.Linear(3, 3)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(WeightSyncError, match=message):
        ModelTarget(target).load(read(filled, "state_dict"), swap=swap)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_another_dtype_is_converted_only_where_asked() -> None:
    target = nn.Linear(3, 3)
    double = {name: tensor.double() for name, tensor in LINEAR.items()}
    with pytest.raises(WeightSyncError, match="dtype"):
        ModelTarget(target).load(read(double, "state_dict"))
    model = ModelTarget(target, cast=True)
    model.load(read(double, "state_dict"))
    assert torch.equal(target.weight, LINEAR["weight"])
    model.load(model.spare(read(double, "state_dict")), swap=True)
    assert target.weight.dtype == torch.float32


def test_unlike_weights_for_tied_parameters_are_refused() -> None:
    module = rich()
    weights = {name: value.clone() for name, value in read(module, "tensordict").tensors.items()}
    ModelTarget(module).load(Weights(weights, {}))  # equal, though no longer tied
    weights["2.weight"] += 1
    with pytest.raises(WeightSyncError, match=r'"2.weight" and "0.weight" differ, but are one tensor'):
        ModelTarget(module).load(Weights(weights, {}))


def test_extra_states_are_set_all_or_none() -> None:
    model = nn.Sequential(Counter(1), Counter(2))
    good = nn.Sequential(Counter(3), Counter(4))
    bad = nn.Sequential(Counter(5), Counter(6, "rubbish"))
    ModelTarget(model).load(read(good, "state_dict"))
    with pytest.raises(WeightSyncError, match=r'the model refused "1\._extra_state": ValueError: rubbish'):
        ModelTarget(model).load(read(bad, "state_dict"))
    assert same(model, good)


def test_buffers_that_are_not_persistent_may_be_left_out() -> None:
    source, target = rich(), rich()
    scramble(source)
    ModelTarget(target).load(read(source.state_dict(), "tensordict"))
    assert same(source, target, "state_dict")
    assert torch.equal(target.get_buffer("passing"), torch.ones(1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it first compiles
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_compiled_module_has_the_names_of_what_was_compiled(strategy: Strategy) -> None:
    source, target = rich(), rich()
    scramble(source)
    compiled: Any = torch.compile(nn.Sequential(target), backend="eager")
    ModelTarget(compiled).load(read(nn.Sequential(source), strategy))
    assert same(source, target, strategy)


def test_a_tensordict_can_be_the_target() -> None:
    td = TensorDict({"layer": {"weight": torch.zeros(3, 3), "bias": torch.zeros(3)}})
    ModelTarget(td).load(read({f"layer.{name}": tensor for name, tensor in LINEAR.items()}, "state_dict"))
    assert torch.equal(td["layer", "weight"], LINEAR["weight"])


# -- queues ------------------------------------------------------------------------------------------------


def test_a_queue_refuses_what_is_too_long() -> None:
    queue = DescriptorQueue()
    with pytest.raises(ValueError, match="may have 2048 bytes"):
        queue.put(b"x" * 3000)
    queue.close()


def test_what_cannot_be_unpickled_is_an_error_that_says_so() -> None:
    queue = DescriptorQueue()
    queue._writer.send(b"rubbish")
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
