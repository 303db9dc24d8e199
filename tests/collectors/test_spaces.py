from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from hypothesis import given
from hypothesis import strategies as st

from aioinfer.collectors.spaces import (
    ArraySpec,
    Column,
    action_columns,
    array_specs,
    batched_action_writer,
    env_layout,
    info_columns,
    info_specs,
    observation_columns,
    row_action_writer,
    single_action_writer,
)

PLAIN = st.sampled_from(
    [
        spaces.Box(-1, 1, (), np.float32),
        spaces.Box(-1, 1, (3,), np.float64),
        spaces.Box(0, 255, (16, 24, 3), np.uint8),
        spaces.Box(-2, 2, (0,), np.float32),
        spaces.Discrete(3),
        spaces.Discrete(4, start=-2),
        spaces.MultiDiscrete([3, 4]),
        spaces.MultiDiscrete(np.array([[3, 4], [5, 6]]), start=np.array([[1, 2], [3, 4]])),
        spaces.MultiBinary(3),
        spaces.MultiBinary((2, 2)),
        spaces.Text(5),
    ]
)
SPACES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from(["b", "a", "c"]), inner, min_size=1).map(spaces.Dict),
        st.lists(inner, min_size=1, max_size=3).map(spaces.Tuple),
    ),
    max_leaves=5,
)


@given(space=SPACES, size=st.integers(1, 3))
def test_what_is_gathered_is_written_back_as_it_was(space: Any, size: int) -> None:
    values = [space.sample() for _ in range(size)]
    columns = action_columns(space)
    assert tuple(column.spec for column in columns) == array_specs(space, ("action",))
    together = [column.empty(size) for column in columns]
    apart = [column.empty(size) for column in columns]
    rows = np.arange(size)
    for column, leaf, other in zip(columns, together, apart, strict=True):
        assert column.gather(values, leaf, rows if size == 2 else None)
        for row, value in enumerate(values):
            column.put(value, other, row)
        assert leaf.dtype == column.spec.dtype
        assert leaf.shape == (size, *column.spec.shape)
        assert np.array_equal(leaf, other)
    back = row_action_writer(space)(together)
    assert all(space.contains(value) for value in back)
    assert all(map(equal, back, values))
    for row, value in enumerate(values):
        single = single_action_writer(space)([leaf[row] for leaf in together])
        assert space.contains(single)
        assert equal(single, value)
    batched = batched_action_writer(space)(together)
    assert batch_space(space, size).contains(batched)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(np.array_equal(one, other))


def test_layouts_name_each_leaf() -> None:
    observation = spaces.Dict({"z": spaces.Tuple([spaces.Discrete(2), spaces.Text(3)]), "a": spaces.Box(0, 1, (2, 2))})
    layout = env_layout(observation, spaces.Discrete(3), ["lives"])
    assert layout.observation == (
        ArraySpec(("observation", "a"), (2, 2), np.dtype(np.float32)),
        ArraySpec(("observation", "z", "0"), (), np.dtype(np.int64)),
        ArraySpec(("observation", "z", "1"), (), np.dtype(object)),
    )
    assert layout.action == (ArraySpec(("action",), (), np.dtype(np.int64)),)
    assert layout.info == (ArraySpec(("info", "lives"), (), np.dtype(np.float64)),)
    assert pickle.loads(pickle.dumps(layout)) == layout


@pytest.mark.parametrize(
    "refused",
    [
        spaces.Sequence(spaces.Discrete(2)),
        spaces.Graph(spaces.Box(0, 1, (2,)), None),
        spaces.OneOf([spaces.Discrete(2), spaces.Discrete(3)]),
        "no space",
    ],
)
def test_spaces_without_a_fixed_layout_are_refused_by_name_and_path(refused: Any) -> None:
    parts = spaces.Tuple([spaces.Discrete(2), spaces.Discrete(2)])
    parts.spaces = (spaces.Discrete(2), refused)
    inside = spaces.Dict({"parts": parts})
    with pytest.raises(TypeError) as raised:
        array_specs(inside, ("observation",))
    assert 'observation["parts"]["1"] has no fixed layout' in str(raised.value)
    assert repr(refused) in str(raised.value)


def test_dictionaries_without_entries_or_with_other_keys_are_refused() -> None:
    with pytest.raises(TypeError, match="the space of observation has no entries"):
        array_specs(spaces.Dict({}), ("observation",))
    numbered: dict[Any, Any] = {3: spaces.Discrete(2)}
    with pytest.raises(TypeError, match="the space of action has the key 3; keys must be strings"):
        array_specs(spaces.Dict(numbered), ("action",))


@pytest.mark.parametrize("many", [1, 400])
def test_values_of_another_shape_are_told_from_those_that_can_be_cast(many: int) -> None:
    (column,) = observation_columns(spaces.Box(-1, 1, (many, 2), np.float32))
    out = column.empty(2)
    right = np.ones((many, 2))
    assert column.gather([right, right.tolist()], out, None) is (many == 1)
    column.put(right.tolist(), out, 0)
    assert (out[0] == 1).all()
    assert not column.gather([right, right[:, :1]], out, None)
    assert not column.gather([right[:, :1], right[:, :1]], out, None)
    with pytest.raises(ValueError, match=r"observation has shape \[\d+, 1\], its space has \[\d+, 2\]"):
        column.put(right[:, :1], out, 0)
    assert not column.gather([right, np.array("text")], out, None)


def test_integers_are_cast_where_no_value_changes() -> None:
    (column,) = observation_columns(spaces.Box(0, 255, (2,), np.uint8))
    out = column.empty(1)
    column.put([3, 255], out, 0)
    assert out.tolist() == [[3, 255]]
    with pytest.raises(ValueError, match="observation has dtype int64, its space has uint8"):
        column.put([3, 256], out, 0)
    with pytest.raises(ValueError, match="observation has dtype float64, its space has uint8"):
        column.put([0.5, 1.0], out, 0)


def test_missing_entries_are_named() -> None:
    (column,) = observation_columns(spaces.Dict({"camera": spaces.Discrete(2)}))
    with pytest.raises(ValueError, match=r'observation\["camera"\] is missing'):
        column.put({}, column.empty(1), 0)
    (column,) = observation_columns(spaces.Text(3))
    with pytest.raises(ValueError, match="observation is 5, its space has texts"):
        column.put(5, column.empty(1), 0)


def test_infos_are_nan_or_zero_where_they_are_missing() -> None:
    specs = info_specs({"speed": np.float32, "place": ((2,), np.float64), "lives": np.int32})
    outs = [Column(spec).empty(1) for spec in specs]
    for column, out in zip(info_columns(specs), outs, strict=True):
        column.put({"speed": None}, out, 0)
    assert np.isnan(outs[0]).all()
    assert np.isnan(outs[1]).all()
    assert outs[2].tolist() == [0]
    with pytest.raises(TypeError, match="got the string 'lives'"):
        info_specs("lives")


def test_actions_share_no_memory_with_the_leaves() -> None:
    leaf = np.zeros((2, 3), np.float32)
    space = spaces.Box(-1, 1, (3,), np.float32)
    actions = [*row_action_writer(space)([leaf]), single_action_writer(space)([leaf[0]])]
    leaf[:] = 1
    assert not np.array(actions).any()
