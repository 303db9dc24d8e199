"""One environment raises, one hangs. Each is made again; one that fails too often is retired; the others go on."""

import time
from functools import partial
from itertools import islice
from typing import Any

import gymnasium
import torch
from tensordict.nn import TensorDictModule

from aioinfer import CollectorError
from aioinfer.collectors import AsyncBatchedCollector, Restarts


class Trouble(gymnasium.Wrapper[Any, Any, Any, Any]):
    """A CartPole that fails after so many steps."""

    def __init__(self, raises_at: int = 0, hangs_at: int = 0) -> None:
        super().__init__(gymnasium.make("CartPole-v1"))
        self.raises_at, self.hangs_at, self.steps = raises_at, hangs_at, 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        if self.steps == self.raises_at:
            raise OSError("the camera is gone")
        if self.steps == self.hangs_at:
            time.sleep(3600)
        return super().step(action)


def collect(num_workers: int, min_envs: int) -> None:
    print(f"\n{num_workers} workers, at least {min_envs} environments")
    collector = AsyncBatchedCollector(
        [partial(Trouble, raises_at=100), partial(Trouble, hangs_at=150), *[Trouble] * 6],
        policy=TensorDictModule(lambda observation: (observation[:, 2] > 0).long(), ["observation"], ["action"]),
        frames_per_batch=512,
        num_workers=num_workers,
        step_timeout=0.5,  # seconds: far more than a step takes
        restarts=Restarts(lifetime=1, per_minute=10),
        min_envs=min_envs,
    )
    try:
        with collector:
            for batch in islice(collector, 8):
                for fragment in batch:
                    if (steps := int(fragment["collector", "mask"].sum())) < len(fragment):
                        print(f"a fragment of environment {fragment['collector', 'env'][0]} ends after {steps} steps")
    except CollectorError as error:
        print(f"the end: {error.causes}")
    stats = collector.stats()
    print(f"{stats.frames} frames, restarts {dict(stats.restarts)}, retired {list(stats.retired)}")
    print(f"{stats.timeouts} timeouts, {stats.abandoned_threads} threads left behind")


if __name__ == "__main__":
    torch.set_num_threads(1)
    collect(num_workers=0, min_envs=6)
    collect(num_workers=2, min_envs=6)
    collect(num_workers=0, min_envs=8)
