"""The seed of every environment: independent of the others, and of how many workers there are."""

from __future__ import annotations

import numpy as np

__all__ = ["env_seed", "make_entropy"]


def make_entropy(seed: int | None) -> int:
    """The entropy that all seeds come from: ``seed``, or random."""
    entropy = np.random.SeedSequence(seed).entropy
    assert isinstance(entropy, int)
    return entropy


def env_seed(entropy: int, env: int, incarnation: int) -> int:
    """The seed of an environment, from 0 to ``2**32 - 1``.

    The first one is that of ``SeedSequence(entropy).spawn(num_envs)[env]``. An environment that is made again has
    another one, so that it does not live through the same episodes.

    Args:
        entropy: of the collector.
        env: the number of the environment.
        incarnation: how often it was made before.
    """
    key = (env,) if incarnation == 0 else (env, incarnation)
    return int(np.random.SeedSequence(entropy, spawn_key=key).generate_state(1)[0])
