"""torchrl's buffers, samplers, advantages and losses take batches as they are."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer.collectors import AsyncBatchedCollector
from aioinfer.collectors.seeds import env_seed, make_entropy
from tests.collectors.test_any_episodes import advantages
from tests.collectors.worlds import World, make_policy, plain_steps

pytest.importorskip("torchrl")

from torchrl.data import LazyTensorStorage, ReplayBuffer, SliceSampler, TensorDictReplayBuffer
from torchrl.envs.utils import ExplorationType
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss, PPOLoss
from torchrl.objectives.value import GAE

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

GAMMA, DECAY = 0.96875, 0.875  # float32, which torchrl has them in, knows them exactly


def collect(count: int = 6, **options: Any) -> list[TensorDictBase]:
    settings: dict[str, Any] = {"policy": make_policy(), "seed": 3, "frames_per_batch": 64, "fragment_length": 8}
    with AsyncBatchedCollector(World, num_envs=5, **{**settings, **options}) as collector:
        return [batch.clone() for batch in itertools.islice(collector, count)]


@pytest.mark.parametrize("kind", [ReplayBuffer, TensorDictReplayBuffer])
def test_a_replay_buffer_is_filled(kind: Any) -> None:
    buffer = kind(storage=LazyTensorStorage(500), batch_size=32)
    with AsyncBatchedCollector(
        World,
        policy=make_policy(),
        num_envs=5,
        frames_per_batch=64,
        fragment_length=8,
        total_frames=150,
        replay_buffer=buffer,
    ) as collector:
        assert list(collector) == [None] * 3
    assert len(buffer) == 150
    sample = buffer.sample()
    torch.testing.assert_close(sample["score"], sample["observation"].sum(-1) * 1000)
    buffer.extend(collect(1)[0].reshape(-1))
    assert len(buffer) == 214


def test_slices_are_of_one_episode_and_in_order() -> None:
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(1000),
        sampler=SliceSampler(slice_len=3, traj_key=("collector", "episode"), strict_length=True),
        batch_size=60,
    )
    for batch in collect(10):
        buffer.extend(batch.reshape(-1))
    slices = buffer.sample().reshape(20, 3)
    assert (slices["collector", "episode"] == slices["collector", "episode"][:, :1]).all()
    assert (slices["collector", "step"].diff(dim=-1) == 1).all()
    assert torch.equal(slices["observation"][:, 1:], slices["next", "observation"][:, :-1])


def test_advantages_are_those_of_the_plain_loop() -> None:
    module = nn.Linear(3, 1, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[0.001, 0.3, -0.2]]))
    estimate = GAE(gamma=GAMMA, lmbda=DECAY, value_network=ValueOperator(module, in_keys=["observation"]))
    policy = make_policy()
    loops = [plain_steps(World, env_seed(make_entropy(3), env, 0), policy) for env in range(5)]

    def value(observation: Any) -> float:
        return float(module(torch.as_tensor(observation).double()))

    for batch in collect():
        found = estimate(batch.apply(lambda entry: entry.double() if entry.is_floating_point() else entry))
        for fragment in found.unbind(0):
            steps = list(itertools.islice(loops[int(fragment["collector", "env"][0])], 8))
            expected = torch.tensor(advantages(steps, value, GAMMA, DECAY), dtype=torch.float64)
            torch.testing.assert_close(fragment["advantage"][:, 0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss_class", [PPOLoss, ClipPPOLoss])
@pytest.mark.parametrize("in_lockstep", [False, True])
def test_losses_see_the_probabilities_by_which_actions_were_chosen(loss_class: Any, in_lockstep: bool) -> None:
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    actor = ProbabilisticActor(
        TensorDictModule(network, in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    critic = ValueOperator(nn.Linear(3, 1), in_keys=["observation"])
    (batch,) = collect(1, policy=actor, in_lockstep=in_lockstep, exploration_type=ExplorationType.RANDOM)
    assert len(set(batch["action"].flatten().tolist())) > 1
    loss = loss_class(actor, critic)
    GAE(gamma=0.99, lmbda=0.95, value_network=critic)(batch)
    for data in (batch, batch.reshape(-1)):
        values = loss(data)
        assert abs(float(values["kl_approx"])) < 1e-5
        sum(value for key, value in values.items() if key.startswith("loss_")).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
