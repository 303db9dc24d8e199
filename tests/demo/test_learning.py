"""How the demo learns, collects, and keeps its curve."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from aioinfer import AsyncInferenceClient, InferenceServer, ThreadingTransport
from aioinfer.demo.learning_curve import GOAL, WINDOW, LearningCurve, save_plot
from aioinfer.demo.metrics import MetricsReader
from aioinfer.demo.policy import Actor, make_policy
from aioinfer.demo.ppo import PPO, estimate_advantages
from aioinfer.demo.rollout_workers import Fragment, RolloutBuffer, RolloutWorker
from tests.demo.cartpole import ScriptedEnv


def _fragment(steps: int = 1, *, terminated: bool = False, actions: Any = None, reward: float = 1.0) -> Fragment:
    return Fragment(
        np.zeros((steps + 1, 4), np.float32),
        np.zeros(steps, np.int64) if actions is None else actions,
        np.full(steps, np.log(0.5), np.float32),
        np.full(steps, reward, np.float32),
        terminated,
    )


class _Kept(RolloutBuffer):
    """Keeps every fragment."""

    def __init__(self) -> None:
        self.fragments: list[Fragment] = []

    def add(self, fragment: Fragment) -> None:
        self.fragments.append(fragment)


# -- learning ------------------------------------------------------------------------------------------


def test_advantages_are_those_worked_out_by_hand() -> None:
    rewards, values = torch.ones(3), torch.tensor([0.5, 0.4, 0.3, 9.0])

    ended = estimate_advantages(rewards, values, terminated=True, discount=0.5, trace_decay=0.5)
    cut_off = estimate_advantages(rewards, values, terminated=False, discount=0.5, trace_decay=0.5)

    # Errors 0.7, 0.75 and 0.7, the last of which is 5.2 if what follows is worth 9; a later one counts a quarter.
    assert torch.allclose(ended, torch.tensor([0.93125, 0.925, 0.7]))
    assert torch.allclose(cut_off, torch.tensor([1.2125, 2.05, 5.2]))


def test_with_a_trace_that_does_not_decay_advantages_are_returns_less_values() -> None:
    values = torch.tensor([3.0, 1.0, 4.0, 1.5])

    found = estimate_advantages(torch.ones(3), values, terminated=False, discount=1.0, trace_decay=1.0)

    assert torch.allclose(found, torch.tensor([4.5, 3.5, 2.5]) - values[:-1])


def test_ppo_learns_which_of_two_actions_is_rewarded() -> None:
    torch.manual_seed(0)
    actor = Actor()
    learner, policy = PPO(actor), make_policy(actor)
    observations = torch.zeros(64, 4)
    for _ in range(8):
        with torch.no_grad():
            played = policy(TensorDict({"observation": observations}, [64]))
        learner.update(
            [
                Fragment(
                    np.zeros((2, 4), np.float32),
                    np.array([action]),
                    np.array([log_prob], np.float32),
                    np.array([action], np.float32),
                    True,
                )
                for action, log_prob in zip(played["action"].tolist(), played["log_prob"].tolist(), strict=True)
            ]
        )

    assert actor.log_probs(observations[0]).exp()[1] > 0.9


def test_ppo_leaves_actions_alone_whose_probability_has_moved_beyond_the_clip_since_they_were_chosen() -> None:
    actor = Actor()
    observations = np.zeros((2, 4), np.float32)
    was_rare = Fragment(observations, np.array([0]), np.full(1, -5.0, np.float32), np.ones(1, np.float32), True)
    was_sure = Fragment(observations, np.array([1]), np.zeros(1, np.float32), np.zeros(1, np.float32), True)
    before = actor.log_probs(torch.zeros(4)).tolist()

    PPO(actor).update([was_rare, was_sure])

    assert actor.log_probs(torch.zeros(4)).tolist() == before


# -- collecting ----------------------------------------------------------------------------------------


async def test_rollouts_keep_the_newest_fragments_that_make_up_a_batch() -> None:
    buffer = RolloutBuffer(steps=10)
    fragments = [_fragment(4) for _ in range(5)]
    for fragment in fragments:
        buffer.add(fragment)

    assert await buffer.take() == fragments[-3:]


async def test_a_batch_waits_until_it_is_full_and_a_cancelled_wait_loses_nothing() -> None:
    buffer = RolloutBuffer(steps=2)
    first, second = _fragment(), _fragment()
    buffer.add(first)
    cancelled = asyncio.create_task(buffer.take())
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    taken = asyncio.create_task(buffer.take())
    await asyncio.sleep(0)
    assert not taken.done()

    buffer.add(second)

    assert await taken == [first, second]


async def _play(env: ScriptedEnv, steps: int) -> tuple[list[Fragment], LearningCurve]:
    """What a worker hands over in so many steps, at the last of which its client fails."""
    replies = iter(range(steps))

    async def client(request: TensorDict) -> TensorDict:
        step = next(replies)
        return TensorDict(
            {
                "action": torch.tensor(1),
                "log_prob": -0.5 * request["observation"][0],
                "policy_version": torch.tensor(step),
            }
        )

    buffer, curve = _Kept(), LearningCurve()
    worker = RolloutWorker(cast(Any, env), 0, buffer=buffer, curve=curve)
    with pytest.raises(RuntimeError):  # what becomes of StopIteration in a coroutine
        await worker.run(cast(AsyncInferenceClient, client))
    assert worker.frames == steps
    return buffer.fragments, curve


async def test_an_episode_is_handed_over_in_fragments_that_continue_one_another() -> None:
    (first, second), curve = await _play(ScriptedEnv(lambda step: (step == 70, False)), 72)

    assert (len(first), len(second)) == (64, 6)
    assert (first.terminated, second.terminated) == (False, True)
    assert [*first.observations[:, 0], *second.observations[1:, 0]] == [*range(71)]
    assert [*first.log_probs, *second.log_probs] == [-0.5 * step for step in range(70)]
    assert {*first.actions, *second.actions, *first.rewards} == {1}
    assert [episode[1:] for episode in curve.episodes] == [(70.0, 70.0)]
    assert [version for _, version in curve.versions] == [63, 69]


async def test_an_episode_that_the_time_limit_cuts_off_has_not_terminated() -> None:
    (fragment,), curve = await _play(ScriptedEnv(lambda step: (False, step == 5)), 7)

    assert not fragment.terminated
    assert len(fragment.observations) == 6
    assert [episode[1] for episode in curve.episodes] == [5.0]


# -- the learning curve --------------------------------------------------------------------------------


def test_the_goal_is_an_average_over_as_many_episodes_as_the_window_has() -> None:
    curve = LearningCurve()
    for _ in range(WINDOW):
        curve.add_episode(GOAL - 1)
    assert curve.average == GOAL - 1
    assert not curve.learned

    for _ in range(WINDOW):
        assert not curve.learned
        curve.add_episode(GOAL)

    assert curve.learned


def test_one_good_episode_at_the_start_is_not_the_goal() -> None:
    curve = LearningCurve()
    for _ in range(WINDOW - 1):
        curve.add_episode(500.0)

    assert not curve.learned


def test_the_age_of_the_weights_in_use_counts_from_when_the_trainer_published_them() -> None:
    server = InferenceServer(make_policy(Actor()), ThreadingTransport(), policy_version=7)
    reader, now = MetricsReader([], LearningCurve(), server=server), time.monotonic()
    assert reader.recent().weights_age is None

    reader.publish(6, now)
    assert reader.recent().weights_age == 0.0  # the weights were faster than the note of them

    reader.publish(7, now - 30.0)
    reader.publish(8, now)
    assert (reader.recent().weights_age or 0.0) >= 30.0


@pytest.mark.parametrize("episodes", [0, 60])
def test_the_learning_curve_is_saved_as_a_picture(tmp_path: Path, episodes: int) -> None:
    curve = LearningCurve()
    for index in range(episodes):
        curve.add_episode(index)
        curve.see_version(index // 10)

    save_plot(curve, tmp_path / "curve.png", title="a run")

    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
