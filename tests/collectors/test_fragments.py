"""Rows of fragments, in memory that processes share, and batches as views of them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aioinfer.collectors.fragments import FragmentLayout, FragmentRing, leaves, with_next_observation
from aioinfer.collectors.spaces import ArraySpec

FLOAT, INT, BOOL = np.dtype(np.float32), np.dtype(np.int64), np.dtype(np.bool_)
STEPS = 4
LEAVES = (
    ArraySpec(("observation", "camera"), (2, 3), np.dtype(np.uint8)),
    ArraySpec(("observation", "speed"), (), np.dtype(np.float64)),
    ArraySpec(("action",), (), INT),
    ArraySpec(("next", "reward"), (1,), FLOAT),
    ArraySpec(("next", "terminated"), (1,), BOOL),
    ArraySpec(("next", "truncated"), (1,), BOOL),
    ArraySpec(("collector", "step"), (), INT),
)


def ring(num_rows: int = 6, *more: ArraySpec, **options: Any) -> FragmentRing:
    return FragmentRing(FragmentLayout((*LEAVES, *more), STEPS), num_rows, **options)


def write(ring: FragmentRing, row: int, env: int) -> None:
    """Fill a row with numbers that say where each comes from."""
    ring.assign(row, env)
    for path, column in ring.columns.items():
        if path[-1] in ("terminated", "truncated"):
            column[row] = np.random.default_rng(row).random(column[row].shape) < 0.5
        else:
            column[row] = np.arange(column[row].size).reshape(column[row].shape) + 10 * env
    ring.lengths[row] = STEPS


def test_a_batch_has_the_steps_of_each_row_and_what_follows_from_them() -> None:
    some = ring()
    for row in range(6):
        write(some, row, env=10 + row)
    batch = some.batch([1, 2, 3], [STEPS] * 3)
    assert batch.batch_size == torch.Size([3, STEPS])
    for path, column in some.columns.items():
        assert torch.equal(batch[path], torch.from_numpy(column[1:4])), path
        assert batch[path].dtype == torch.from_numpy(column).dtype
    assert batch["next", "done"].tolist() == (batch["next", "terminated"] | batch["next", "truncated"]).tolist()
    for name in ("done", "terminated", "truncated"):
        assert batch[name].shape == (3, STEPS, 1)
        assert not batch[name].any()
    assert batch["collector", "env"].tolist() == [[env] * STEPS for env in (11, 12, 13)]
    assert batch["collector", "mask"].all()
    assert batch["collector"].batch_size == batch["observation"].batch_size == batch["next"].batch_size == (3, STEPS)


def test_consecutive_rows_are_views_and_others_copies() -> None:
    some = ring()
    for row in range(6):
        write(some, row, env=row)
    view, copy = some.batch([2, 3], [STEPS] * 2), some.batch([3, 2], [STEPS] * 2)
    some.columns["action",][2:4] = -1
    assert view["action"].unique().tolist() == [-1]
    assert copy["action"].tolist() == [[30, 31, 32, 33], [20, 21, 22, 23]]
    assert copy["collector", "env"][:, 0].tolist() == [3, 2]


@pytest.mark.parametrize("rows", [[0, 1], [1, 0]])
def test_what_lies_behind_a_cut_is_zero_and_masked(rows: list[int]) -> None:
    some = ring()
    write(some, 0, env=5)
    write(some, 1, env=7)
    batch = some.batch(rows, [3 if row == 0 else STEPS for row in rows])
    cut, complete = batch[rows.index(0)], batch[rows.index(1)]
    assert cut["collector", "mask"].tolist() == [True, True, True, False]
    assert complete["collector", "mask"].all()
    for path in some.columns:
        assert not cut[path][3:].any(), path
    assert cut["action"].tolist() == [50, 51, 52, 0]
    assert complete["action"].tolist() == [70, 71, 72, 73]


def test_a_row_that_is_assigned_begins_without_steps() -> None:
    some = ring()
    write(some, 3, env=1)
    some.assign(3, env=2)
    assert some.lengths[3] == 0
    assert some.envs[3] == 2


def test_another_process_sees_the_same_rows() -> None:
    mine = ring()
    assert mine.memory is not None
    theirs = ring(descriptor=os.dup(mine.memory.fd))
    write(theirs, 4, env=9)
    assert mine.lengths.tolist() == [0, 0, 0, 0, STEPS, 0]
    batch = mine.batch([4], [STEPS])
    assert batch["action"].tolist() == [[90, 91, 92, 93]]
    assert batch["collector", "env"].tolist() == [[9] * STEPS]


@pytest.mark.parametrize("shared", [True, False])
def test_columns_are_aligned_contiguous_and_zero_at_first(shared: bool) -> None:
    some = ring(5, shared=shared)
    assert (some.memory is not None) == shared
    for path, column in some.columns.items():
        assert column.ctypes.data % 64 == 0, path
        assert column.flags.c_contiguous
        assert column.shape[:2] == (5, STEPS)
        assert not column.any()


def test_text_becomes_non_tensor_data_of_the_shape_of_the_batch() -> None:
    text = ArraySpec(("observation", "text"), (), np.dtype(object))
    some = ring(2, text, shared=False)
    some.columns["observation", "text"][:] = [["a", "b", "c", "d"], ["e", "f", "g", "h"]]
    for rows in ([0, 1], [1, 0]):
        batch = some.batch(rows, [STEPS, 2])
        assert batch[1, 1]["observation", "text"] == ("f" if rows == [0, 1] else "b")
        assert batch[0]["observation"].batch_size == (STEPS,)
        assert list(batch[:, 0]["observation"].get("text").tolist()) == (["a", "e"] if rows == [0, 1] else ["e", "a"])


def test_text_is_not_shared() -> None:
    with pytest.raises(ValueError, match=r"'observation', 'text'.*num_workers=0"):
        ring(2, ArraySpec(("observation", "text"), (), np.dtype(object)))


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ((*LEAVES, ArraySpec(("next", "done"), (1,), BOOL)), "computed"),
        ((*LEAVES, ArraySpec(("action", "hand"), (), INT)), "can't contain"),
        ((*LEAVES, LEAVES[0]), "different paths"),
        ((*LEAVES, ArraySpec(("collector", "final", "x"), (), INT)), "computed"),
        (LEAVES[:4], "needs"),
    ],
)
def test_a_layout_that_makes_no_batch_is_refused(specs: tuple[ArraySpec, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FragmentLayout(specs, STEPS)


@pytest.mark.parametrize(("observations", "places"), [(("action", "hand"), 1), (("action",), 0)])
def test_places_for_observations_in_which_episodes_end_are_checked(observations: tuple[str, ...], places: int) -> None:
    with pytest.raises(ValueError, match=r"observations must be among|final_places must be at least 1"):
        FragmentLayout(LEAVES, STEPS, (observations,), places)


def test_a_batch_that_is_made_under_inference_mode_can_be_learned_from() -> None:
    some = ring(2, ArraySpec(("value",), (), FLOAT))
    with torch.inference_mode():
        batch = some.batch([0, 1], [STEPS] * 2)
    weight = torch.ones((), requires_grad=True)
    (batch["value"] * weight).sum().backward()
    assert weight.grad is not None


OBSERVATIONS = (ArraySpec(("camera",), (2,), np.dtype(np.uint8)), ArraySpec(("text",), (), np.dtype(object)))
ENDS = (ArraySpec(("next", "terminated"), (1,), BOOL), ArraySpec(("next", "truncated"), (1,), BOOL))
DENSE = FragmentLayout(
    (*OBSERVATIONS, *(ArraySpec(("next", *spec.path), spec.shape, spec.dtype) for spec in OBSERVATIONS), *ENDS), STEPS
)
SPARSE = FragmentLayout((*OBSERVATIONS, *ENDS), STEPS, tuple(spec.path for spec in OBSERVATIONS), 2)


class TwoRings:
    """An environment whose steps are written to a ring with next observations, and to one without."""

    def __init__(self) -> None:
        self.rings = [FragmentRing(layout, 3, shared=False) for layout in (DENSE, SPARSE)]
        self.count = 0

    def observe(self) -> list[Any]:
        self.count += 1
        return [np.full(2, self.count, np.uint8), str(self.count)]

    def write(self, row: int, ends: list[bool]) -> int:
        """Write a fragment of steps that end an episode, or don't; returns its length."""
        dense, sparse = self.rings
        for ring in self.rings:
            ring.assign(row, 0)
        observation = self.observe()
        for step, end in enumerate(ends):
            following = self.observe()
            has_place = True
            for spec, now, then in zip(OBSERVATIONS, observation, following, strict=True):
                dense.columns[spec.path][row, step] = now
                dense.columns["next", *spec.path][row, step] = then
                sparse.columns[spec.path][row, step] = now
                if not end:
                    sparse.columns[spec.path][row, step + 1] = then
            if end:
                has_place = sparse.keep_final(row, step, following)
            for ring in self.rings:
                ring.columns["next", "terminated"][row, step] = end
                ring.lengths[row] += 1
            if not has_place:
                break
            observation = self.observe() if end else following
        return int(sparse.lengths[row])


@given(
    fragments=st.lists(
        st.tuples(st.integers(0, 2), st.lists(st.booleans(), min_size=1, max_size=STEPS), st.integers(0, 2)),
        max_size=8,
    ),
    rows=st.permutations([0, 1, 2]),
)
def test_next_observations_are_known_where_they_are_not_stored(
    fragments: list[tuple[int, list[bool], int]], rows: list[int]
) -> None:
    world = TwoRings()
    lengths = [world.write(row, [False] * STEPS) for row in range(3)]
    for row, ends, unread in fragments:
        lengths[row] = max(1, world.write(row, ends) - unread)
    dense, sparse = (ring.batch(rows, [lengths[row] for row in rows]) for ring in world.rings)
    assert sparse.batch_size == (3,)
    assert sparse["camera"].shape == (3, STEPS + 1, 2)
    assert sparse["collector", "final", "camera"].shape == (3, 2, 2)
    unused = sparse["collector", "final_step"] == -1
    assert not sparse["collector", "final", "camera"][unused].any()
    for index, row in enumerate(rows):
        is_known = not dense["next", "done"][index, lengths[row] - 1]
        assert not sparse["camera"][index, lengths[row] + is_known :].any()
    expected, found = leaves(dense), leaves(with_next_observation(sparse))
    assert expected.keys() == found.keys()
    for path, values in expected.items():
        assert values.tolist() == found[path].tolist(), path


def test_a_fragment_ends_where_no_place_is_left_for_the_end_of_another_episode() -> None:
    world = TwoRings()
    assert world.write(0, [True, False, False, True]) == STEPS
    assert world.write(0, [True, False, True, False]) == 3
    assert world.write(0, [False, False, True, False]) == STEPS
