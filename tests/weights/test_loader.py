"""Weights that are loaded into a model: all of them or none, in place or swapped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from aioinfer import WeightSyncError
from aioinfer.weight_sync.loader import StagingBuffers, WeightLoader
from aioinfer.weight_sync.weights import Strategy, Weights, extract_weights
from tests.weight_models import Counter
from tests.weights.test_weights import STRATEGIES, rich, same, scramble, travelled

# -- loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [False, True])
def test_tied_parameters_stay_tied_and_parameters_stay_the_same_objects(swap: bool) -> None:
    source, target = rich(), rich()
    scramble(source)
    before = dict(target.named_parameters(remove_duplicate=False))
    model = WeightLoader(target)
    weights = travelled(extract_weights(source, "tensordict"))
    model.load(model.stage(weights, []) if swap else weights, swap=swap)
    assert dict(target.named_parameters(remove_duplicate=False)) == before
    assert target[2].weight is target[0].weight
    assert same(source, target)


def test_weights_are_copied_in_place_unless_they_are_swapped() -> None:
    target = nn.Linear(3, 3)
    model, address = WeightLoader(target), target.weight.data_ptr()
    model.load(extract_weights(nn.Linear(3, 3), "tensordict"))
    assert target.weight.data_ptr() == address
    new = extract_weights(nn.Linear(3, 3), "tensordict").detached()
    model.load(new, swap=True)
    assert target.weight.data_ptr() == new.tensors["weight"].data_ptr() != address
    model.copy_aliased()
    assert target.weight.data_ptr() != new.tensors["weight"].data_ptr()
    assert torch.equal(target.weight, new.tensors["weight"])


def test_a_staging_buffer_is_not_the_one_in_use() -> None:
    target = nn.Linear(3, 3)
    model, buffers = WeightLoader(target), StagingBuffers()
    for _ in range(5):
        source = nn.Linear(3, 3)
        staged = model.stage(extract_weights(source, "tensordict"), buffers)
        assert staged.tensors["weight"].data_ptr() != target.weight.data_ptr()
        model.load(staged, swap=True)
        assert torch.equal(target.weight, source.weight)


def test_a_staging_buffer_is_not_the_one_in_use_after_a_refusal_either() -> None:
    layer = nn.Linear(3, 3)
    target = nn.Sequential(Counter(0), layer)
    model, buffers = WeightLoader(target), StagingBuffers()
    for count in (1, 2, "rubbish", "rubbish", 3, "rubbish", 4):
        source = nn.Sequential(Counter(0, count), nn.Linear(3, 3))
        address = layer.weight.data_ptr()
        staged = model.stage(extract_weights(source, "tensordict"), buffers)
        assert staged.tensors["1.weight"].data_ptr() != address
        if count == "rubbish":
            with pytest.raises(WeightSyncError, match="rubbish"):
                model.load(staged, swap=True)
            assert layer.weight.data_ptr() == address
        else:
            model.load(staged, swap=True)
            assert same(source, target)


def test_aliased_memory_is_never_written_to() -> None:
    aliased = extract_weights(nn.Linear(3, 3), "tensordict").detached()
    copy = {name: tensor.clone() for name, tensor in aliased.tensors.items()}
    target = nn.Linear(3, 3)
    model = WeightLoader(target)
    assert model.can_alias(aliased)
    model.load(aliased, swap=True)
    double = extract_weights(nn.Linear(3, 3).double(), "tensordict").detached()
    assert not model.can_alias(double)
    model.load(double, swap=True, cast=True)
    assert torch.equal(target.weight, double.tensors["weight"].float())
    assert all(torch.equal(tensor, copy[name]) for name, tensor in aliased.tensors.items())


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
        WeightLoader(target).load(extract_weights(filled, "state_dict"), swap=swap)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_another_dtype_is_converted_only_where_asked() -> None:
    target = nn.Linear(3, 3)
    double = {name: tensor.double() for name, tensor in LINEAR.items()}
    with pytest.raises(WeightSyncError, match="dtype"):
        WeightLoader(target).load(extract_weights(double, "state_dict"))
    model = WeightLoader(target, cast=True)
    model.load(extract_weights(double, "state_dict"))
    assert torch.equal(target.weight, LINEAR["weight"])
    model.load(model.stage(extract_weights(double, "state_dict"), []), swap=True)
    assert target.weight.dtype == torch.float32


def test_unlike_weights_for_tied_parameters_are_refused() -> None:
    module = rich()
    weights = {name: value.clone() for name, value in extract_weights(module, "tensordict").tensors.items()}
    WeightLoader(module).load(Weights(weights, {}))  # equal, though no longer tied
    weights["2.weight"] += 1
    with pytest.raises(WeightSyncError, match=r'"2.weight" and "0.weight" differ, but are one tensor'):
        WeightLoader(module).load(Weights(weights, {}))


def test_extra_states_are_set_all_or_none() -> None:
    model = nn.Sequential(Counter(1), Counter(2))
    good = nn.Sequential(Counter(3), Counter(4))
    bad = nn.Sequential(Counter(5), Counter(6, "rubbish"))
    WeightLoader(model).load(extract_weights(good, "state_dict"))
    with pytest.raises(WeightSyncError, match=r'the model refused "1\._extra_state": ValueError: rubbish'):
        WeightLoader(model).load(extract_weights(bad, "state_dict"))
    assert same(model, good)


def test_buffers_that_are_not_persistent_may_be_left_out() -> None:
    source, target = rich(), rich()
    scramble(source)
    WeightLoader(target).load(extract_weights(source.state_dict(), "tensordict"))
    assert same(source, target, "state_dict")
    assert torch.equal(target.get_buffer("passing"), torch.ones(1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it first compiles
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_compiled_module_has_the_names_of_what_was_compiled(strategy: Strategy) -> None:
    source, target = rich(), rich()
    scramble(source)
    inner: Any = torch.compile(target, backend="eager")
    compiled: Any = torch.compile(nn.Sequential(inner), backend="eager")
    WeightLoader(compiled).load(extract_weights(nn.Sequential(source), strategy))
    assert same(source, target, strategy)
    incomplete = nn.Sequential(source).state_dict()
    del incomplete["0.1.bias"]
    with pytest.raises(WeightSyncError, match=r'"0\.1\.bias" is missing'):
        WeightLoader(compiled).load(extract_weights(incomplete, strategy))
    counter: Any = torch.compile(Counter(1), backend="eager")
    WeightLoader(counter).load(extract_weights(Counter(2), strategy))
    assert counter.count == 2


def test_a_tensordict_can_be_the_target() -> None:
    td = TensorDict({"layer": {"weight": torch.zeros(3, 3), "bias": torch.zeros(3)}})
    WeightLoader(td).load(extract_weights({f"layer.{name}": tensor for name, tensor in LINEAR.items()}, "state_dict"))
    assert torch.equal(td["layer", "weight"], LINEAR["weight"])
