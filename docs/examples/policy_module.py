"""A server's policy inside a TensorDictSequential, deterministic or exploring as the caller says."""

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
    set_interaction_type,
)
from torch import Tensor, nn
from torch.distributions import Normal

from aioinfer import InferenceServer, PolicyClientModule, ThreadingTransport


def spread(mean: Tensor) -> tuple[Tensor, Tensor]:
    return mean, torch.full_like(mean, 0.5)


def make_actor() -> ProbabilisticTensorDictSequential:
    """A Gaussian policy: its mean when deterministic, a sample when exploring."""
    return ProbabilisticTensorDictSequential(
        TensorDictModule(nn.Linear(4, 2), in_keys=["normalised"], out_keys=["mean"]),
        TensorDictModule(spread, in_keys=["mean"], out_keys=["loc", "scale"]),
        ProbabilisticTensorDictModule(in_keys=["loc", "scale"], out_keys=["action"], distribution_class=Normal),
    )


def main() -> None:
    transport = ThreadingTransport()
    with InferenceServer(make_actor(), transport):
        policy = TensorDictSequential(
            TensorDictModule(lambda observation: observation / 10, in_keys=["observation"], out_keys=["normalised"]),
            PolicyClientModule(transport, in_keys=["normalised"], out_keys=["action"]),
        )
        step = TensorDict({"observation": torch.randn(3, 4)}, batch_size=[3])  # three environments in one TensorDict

        def act(mode: InteractionType) -> TensorDictBase:
            with set_interaction_type(mode):
                acted: TensorDictBase = policy(step.copy())
                return acted

        first, second = act(InteractionType.DETERMINISTIC), act(InteractionType.DETERMINISTIC)
        print("deterministic, twice the same:", torch.allclose(first["action"], second["action"]))
        first, second = act(InteractionType.RANDOM), act(InteractionType.RANDOM)
        print("exploring, twice the same:    ", torch.allclose(first["action"], second["action"]))


if __name__ == "__main__":
    main()
