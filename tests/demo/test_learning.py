"""How the demo learns, and keeps its curve."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.demo.learning_curve import GOAL, WINDOW, LearningCurve, save_plot
from aioinfer.demo.metrics import MetricsReader
from aioinfer.demo.policy import Actor, make_policy
from aioinfer.demo.ppo import PPO, estimate_advantages


def _advantages(rewards: Sequence[float], values: Sequence[float], **events: Sequence[bool]) -> list[float]:
    """Of one fragment, with a discount and a trace decay of a half."""
    nothing = torch.zeros(1, len(rewards), dtype=torch.bool)
    flags = {name: torch.tensor([steps]) for name, steps in events.items()}
    found = estimate_advantages(
        torch.tensor([rewards]),
        torch.tensor([values[:-1]]),
        torch.tensor([values[1:]]),
        terminated=flags.get("terminated", nothing),
        done=flags.get("done", flags.get("terminated", nothing)),
        mask=flags.get("mask", ~nothing),
        discount=0.5,
        trace_decay=0.5,
    )
    return [round(advantage, 6) for advantage in found[0].tolist()]


def _batch(actions: Tensor, log_probs: Tensor, rewards: Tensor, mask: Tensor | None = None) -> TensorDict:
    """Episodes of one step each, in fragments ``[B, T]``."""
    shape = actions.shape
    flags = torch.ones(*shape, 1, dtype=torch.bool)
    observation = torch.zeros(*shape, 4)
    following = {"observation": observation, "reward": rewards.unsqueeze(-1), "terminated": flags, "done": flags}
    collector = {"mask": flags.squeeze(-1) if mask is None else mask}
    return TensorDict(
        {
            "observation": observation,
            "action": actions,
            "log_prob": log_probs,
            "next": following,
            "collector": collector,
        },
        batch_size=shape,
    )


# -- learning ------------------------------------------------------------------------------------------


def test_advantages_are_those_worked_out_by_hand() -> None:
    values = [0.5, 0.4, 0.3, 9.0]

    # Errors 0.7, 0.75 and 0.7, the last of which is 5.2 if what follows is worth 9; a later one counts a quarter.
    assert _advantages([1, 1, 1], values, terminated=[False, False, True]) == [0.93125, 0.925, 0.7]
    assert _advantages([1, 1, 1], values) == [1.2125, 2.05, 5.2]


def test_an_episode_that_was_truncated_counts_what_would_have_followed_and_nothing_of_the_next_one() -> None:
    first, second, third = _advantages([1, 1, 1], [0.5, 0.4, 0.3, 9.0], done=[True, False, False])

    assert first == 0.7
    assert (second, third) == (2.05, 5.2)


def test_what_is_behind_the_end_of_a_fragment_counts_nowhere() -> None:
    found = _advantages([1, 1, 0], [0.5, 0.4, 0.3, 9.0], mask=[True, True, False])

    assert found == [0.8875, 0.75, 0.0]


def test_ppo_learns_which_of_two_actions_is_rewarded() -> None:
    torch.manual_seed(0)
    actor = Actor()
    learner, policy = PPO(actor), make_policy(actor)
    for _ in range(8):
        with torch.no_grad():
            played = policy(TensorDict({"observation": torch.zeros(64, 4)}, [64])).reshape(8, 8)
        learner.update(_batch(played["action"], played["log_prob"], played["action"].float()))

    assert actor.log_probs(torch.zeros(4)).exp()[1] > 0.9


def test_ppo_leaves_actions_alone_whose_probability_has_moved_beyond_the_clip_since_they_were_chosen() -> None:
    actor = Actor()
    before = actor.log_probs(torch.zeros(4)).tolist()
    was_rare_and_was_sure = _batch(torch.tensor([[0, 1]]), torch.tensor([[-5.0, 0.0]]), torch.tensor([[1.0, 0.0]]))

    PPO(actor).update(was_rare_and_was_sure)

    assert actor.log_probs(torch.zeros(4)).tolist() == before


def test_ppo_does_not_learn_from_what_is_behind_the_end_of_a_fragment() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    actions, log_probs = torch.tensor([[0, 1, 0], [1, 0, 1]]), torch.full((2, 3), -0.7)
    rewards, others = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 9.0], [1.0, 0.0, 1.0]])
    actors = Actor(), Actor()
    actors[1].load_state_dict(actors[0].state_dict())

    for actor, seen in zip(actors, (rewards, others), strict=True):
        torch.manual_seed(1)
        PPO(actor).update(_batch(actions, log_probs, seen, mask))

    assert all(map(torch.equal, actors[0].state_dict().values(), actors[1].state_dict().values()))


# -- the learning curve --------------------------------------------------------------------------------


def test_a_batch_tells_of_the_episodes_that_ended_in_it() -> None:
    curve = LearningCurve()
    done = torch.tensor([[False, True, False], [True, False, False]])
    curve.add_batch(
        TensorDict(
            {
                "next": {"done": done.unsqueeze(-1)},
                "collector": {
                    "step": torch.tensor([[68, 69, 0], [4, 0, 0]]),
                    "mask": torch.tensor([[True, True, True], [True, True, False]]),
                },
                "policy_version": torch.tensor([[3, 4, 4], [4, 5, 0]]),
            },
            batch_size=[2, 3],
        )
    )

    assert curve.frames == 5
    assert [episode[1:] for episode in curve.episodes] == [(70.0, 70.0), (5.0, 37.5)]
    assert [version for _, version in curve.versions] == [5]


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
    reader, now = MetricsReader(LearningCurve(), server=server), time.monotonic()
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
