"""Whole episodes of fragments, whatever the fragments' and the episodes' lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from aioinfer.collectors.episodes import EpisodeAssembler
from aioinfer.collectors.fragments import FragmentLayout, FragmentRing
from aioinfer.collectors.spaces import ArraySpec

STEPS = 4
INT, BOOL = np.dtype(np.int64), np.dtype(np.bool_)
LAYOUT = FragmentLayout(
    (
        ArraySpec(("observation", "position"), (2,), np.dtype(np.float32)),
        ArraySpec(("observation", "text"), (), np.dtype(object)),
        ArraySpec(("policy_version",), (), INT),
        ArraySpec(("next", "terminated"), (1,), BOOL),
        ArraySpec(("next", "truncated"), (1,), BOOL),
        ArraySpec(("collector", "episode"), (), INT),
        ArraySpec(("collector", "step"), (), INT),
        ArraySpec(("collector", "random"), (), BOOL),
    ),
    STEPS,
)


@dataclass
class Env:
    """Writes fragments of episodes whose lengths are given; what it writes says which step of which episode it is."""

    number: int
    lengths: list[int]
    episode: int = 0
    step: int = 0

    def write(self, ring: FragmentRing, row: int, steps: int = STEPS, version: int = 0, random: bool = False) -> None:
        ring.assign(row, self.number)
        columns = ring.columns
        for at in range(steps):
            ends = self.step + 1 == self.lengths[self.episode]
            columns["observation", "position"][row, at] = (self.episode, self.step)
            columns["observation", "text"][row, at] = f"{self.number}:{self.episode}:{self.step}"
            columns["policy_version",][row, at] = version
            columns["next", "terminated"][row, at] = ends and self.episode % 2 == 0
            columns["next", "truncated"][row, at] = ends and self.episode % 2 == 1
            columns["collector", "episode"][row, at] = self.episode
            columns["collector", "step"][row, at] = self.step
            columns["collector", "random"][row, at] = random
            self.step += 1
            if ends:
                self.episode, self.step = self.episode + 1, 0
        ring.lengths[row] = steps


def steps_of(batch: TensorDict) -> list[tuple[int, int, int]]:
    """Environment, episode and step of each row."""
    collector = batch["collector"]
    return list(zip(*(collector[name].tolist() for name in ("env", "episode", "step")), strict=True))


def whole(env: int, episode: int, length: int) -> list[tuple[int, int, int]]:
    return [(env, episode, step) for step in range(length)]


def add(some: EpisodeAssembler, env: Env, steps: int = STEPS, version: int = 0, random: bool = False) -> None:
    ring = FragmentRing(LAYOUT, 1, shared=False)
    env.write(ring, 0, steps, version, random)
    some.add(ring.batch([0], [steps]), [steps])
    for column in ring.columns.values():  # the row is another's from now on
        column[:] = column.dtype.type()


@given(
    lengths=st.lists(st.lists(st.integers(1, 11), min_size=1, max_size=5), min_size=1, max_size=3),
    frames=st.integers(1, 20),
    choices=st.lists(st.integers(0, 2), max_size=30),
)
def test_episodes_are_whole_whatever_the_fragments(lengths: list[list[int]], frames: int, choices: list[int]) -> None:
    some = EpisodeAssembler(frames)
    envs = [Env(number, [*each, 10**9]) for number, each in enumerate(lengths)]
    delivered = []
    for choice in choices:
        add(some, envs[choice % len(envs)])
        while (batch := some.take()) is not None:
            assert batch.batch_size == (len(batch),)
            assert len(batch) >= frames
            ends = batch["next", "done"][:, 0]
            assert ends[-1]
            assert batch["collector", "step"][0] == 0
            assert torch.equal(batch["collector", "step"][1:] == 0, ends[:-1])
            assert batch["collector", "mask"].all()
            assert batch["observation", "position"].tolist() == [[e, s] for _, e, s in steps_of(batch)]
            assert batch["observation"].get("text").tolist() == [f"{n}:{e}:{s}" for n, e, s in steps_of(batch)]
            delivered += steps_of(batch)
    ended = 0
    for env in envs:
        steps = [step for step in delivered if step[0] == env.number]
        of_all = [step for episode in range(env.episode) for step in whole(env.number, episode, env.lengths[episode])]
        assert steps == of_all[: len(steps)]
        ended += len(of_all)
    assert ended - len(delivered) < frames
    assert some.frames == len(delivered)
    assert some.dropped_frames == 0


def test_an_episode_of_which_a_fragment_is_missing_is_dropped() -> None:
    some = EpisodeAssembler(1)
    env, ring = Env(3, [10, 3, 2, 9]), FragmentRing(LAYOUT, 1, shared=False)
    add(some, env)
    env.write(ring, 0)  # and nobody reads it
    add(some, env)  # the last two steps of the first episode, two of the next
    add(some, env)
    batch = some.take()
    assert batch is not None
    assert steps_of(batch) == whole(3, 1, 3)
    assert some.dropped_frames == 6


def test_an_episode_without_an_end_is_dropped_as_the_next_begins() -> None:
    some = EpisodeAssembler(1)
    env = Env(0, [10, 3])
    add(some, env, steps=2)
    env.episode, env.step = 1, 0
    add(some, env, steps=3)
    batch = some.take()
    assert batch is not None
    assert steps_of(batch) == whole(0, 1, 3)
    assert some.dropped_frames == 2


def test_the_last_batch_ends_with_the_episode_in_which_the_frames_are_reached() -> None:
    some = EpisodeAssembler(6, total_frames=7)
    add(some, Env(0, [3, 1, 9]))
    assert some.take() is None
    add(some, Env(1, [2, 2, 9]))
    batch = some.take()
    assert batch is not None
    assert steps_of(batch) == [*whole(0, 0, 3), *whole(0, 1, 1), *whole(1, 0, 2)]
    assert not some.finished
    batch = some.take()
    assert batch is not None
    assert steps_of(batch) == whole(1, 1, 2)
    assert some.finished
    assert some.frames == 8
    add(some, Env(2, [4, 9]))
    assert some.take() is None


def test_episodes_of_older_weights_than_allowed_are_dropped_but_random_steps_are_of_none() -> None:
    some = EpisodeAssembler(1, max_policy_lag=1)
    add(some, Env(0, [4, 9]), version=3)
    add(some, Env(1, [4, 9]), version=0, random=True)
    add(some, Env(2, [4, 9]), version=4)
    batches = [some.take(5) for _ in range(3)]
    assert [steps_of(batch) if batch is not None else None for batch in batches] == [
        whole(1, 0, 4),
        whole(2, 0, 4),
        None,
    ]
    assert some.dropped_by_lag == 1
