"""Those with whom our collector is compared, through their public APIs alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import torch

from aioinfer.bench.collecting import environments
from aioinfer.bench.collecting.policies import make_bare_policy, make_cartpole_policy, make_policy
from aioinfer.bench.collecting.rates import frame_rate
from aioinfer.bench.peer_process import PeerProcess, Pipe
from aioinfer.bench.workloads import Collection, Job, System

CORES = 2
"""The processes that step and compute actions for the ceiling."""

_SERIAL_ENVS = 16
_SYNC_ENVS = 64
_ASYNC_ENVS = 32
_TORCHRL_FRAMES = 256  # in a batch of torchrl's asynchronous collector; it makes about a thousand in a second

# How many environments, and where they are. The policy is served by a thread; but for "4 processes", which ask a
# process for their actions without any help of the collector's process.
_TORCHRL_WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "4 threads": (4, {"env_backend": "threading"}),
    "16 threads": (16, {"env_backend": "threading"}),
    "64 threads": (64, {"env_backend": "threading"}),
    "4 processes": (4, {"env_backend": "multiprocessing", "transport": "auto"}),
    "64 in 2 processes": (64, {"env_backend": "multiprocessing", "transport": "driver", "envs_per_worker": 32}),
}


def measure_rate(job: Job, collection: Collection) -> float:
    """Steps per second of a peer."""
    system = System(job.system)
    # torchrl's collectors have threads, which write to tensors that were made here: not to those of an inference mode.
    is_loop = system not in (System.TORCHRL, System.TORCHRL_SERIAL)
    with closing(_FRAMES[system](job, collection)) as frames, torch.inference_mode(is_loop):
        return frame_rate(frames, job.warm_up, job.seconds)


def _torchrl_frames(job: Job, _: Collection) -> Generator[int, None, None]:
    from torchrl.collectors import AsyncBatchedCollector

    num_envs, options = _TORCHRL_WAYS[job.way]
    collector = AsyncBatchedCollector(
        [environments.make_torchrl_cartpole] * num_envs,
        policy_factory=make_cartpole_policy,
        frames_per_batch=_TORCHRL_FRAMES,
        **options,
    )
    try:
        for batch in collector:
            yield batch.numel()
    finally:
        collector.shutdown()


def _torchrl_serial_frames(_: Job, collection: Collection) -> Generator[int, None, None]:
    from torchrl.collectors import Collector
    from torchrl.envs import SerialEnv

    collector = Collector(
        SerialEnv(_SERIAL_ENVS, environments.make_torchrl_cartpole),
        make_policy(collection.environment),
        frames_per_batch=collection.frames_per_batch,
        total_frames=-1,
    )
    try:
        for batch in collector:
            yield batch.numel()
    finally:
        collector.shutdown()


def _sync_vector_frames(_: Job, collection: Collection) -> Generator[int, None, None]:
    from gymnasium.vector import SyncVectorEnv

    return _vector_frames(SyncVectorEnv([environments.factory(collection.environment)] * _SYNC_ENVS), collection)


def _async_vector_frames(_: Job, collection: Collection) -> Generator[int, None, None]:
    from gymnasium.vector import AsyncVectorEnv

    return _vector_frames(AsyncVectorEnv([environments.factory(collection.environment)] * _ASYNC_ENVS), collection)


def _vector_frames(vector: Any, collection: Collection) -> Generator[int, None, None]:
    policy = make_bare_policy(collection.environment)
    ended = np.zeros(vector.num_envs, dtype=bool)  # the next step of these only resets
    with closing(vector):
        observations, _ = vector.reset(seed=0)
        while True:
            actions = policy(torch.from_numpy(observations))[0].numpy()
            observations, _, terminated, truncated, _ = vector.step(actions)
            resets = np.count_nonzero(ended)
            ended = terminated | truncated
            yield vector.num_envs - int(resets)


def _envpool_frames(_: Job, collection: Collection) -> Generator[int, None, None]:
    policy = make_bare_policy(collection.environment)
    pool = environments.make_envpool_cartpole(collection.num_envs)
    pool.async_reset()
    while True:
        observations, _, _, _, info = pool.recv()
        actions = policy(torch.from_numpy(observations))[0].numpy()
        pool.send(actions, info["env_id"])
        yield int(np.count_nonzero(info["elapsed_step"]))  # 0 where an environment has only reset


_FRAMES: dict[System, Callable[[Job, Collection], Generator[int, None, None]]] = {
    System.TORCHRL: _torchrl_frames,
    System.TORCHRL_SERIAL: _torchrl_serial_frames,
    System.SYNC_VECTOR: _sync_vector_frames,
    System.ASYNC_VECTOR: _async_vector_frames,
    System.ENVPOOL: _envpool_frames,
}


# -- what two cores would reach ----------------------------------------------------------------------------------


def measure_ceiling(job: Job, collection: Collection) -> float:
    """Steps per second if ``CORES`` processes did nothing but to step environments and to compute their actions.

    That many processes only step, at the same time; then they only compute actions, for all environments at once. From
    the two times for a step follows the rate of a process that does both.
    """
    with ExitStack() as stack:
        processes = [stack.enter_context(PeerProcess(time_steps, job, collection, fork=True)) for _ in range(CORES)]
        times = 0.0
        for what in ("environment", "policy"):
            for process in processes:
                process.send(what)
            times += statistics.fmean(process.answer() for process in processes)
        for process in processes:
            process.send("end")
    return CORES / times


def time_steps(pipe: Pipe, job: Job, collection: Collection) -> None:
    """Answer how many seconds a step takes in an environment, or in the policy: a process of the ceiling."""
    environment = environments.factory(collection.environment)()
    environment.action_space.seed(job.seed)
    environment.reset(seed=job.seed)
    observation = environment.observation_space.sample()
    observations = torch.from_numpy(observation).expand(collection.num_envs, *observation.shape).clone()
    policy = make_bare_policy(collection.environment)

    def step() -> int:
        *_, terminated, truncated, _ = environment.step(environment.action_space.sample())
        if terminated or truncated:
            environment.reset()
        return 1

    def compute() -> int:
        policy(observations)
        return collection.num_envs

    pipe.send("ready")
    with torch.inference_mode():
        while (what := pipe.recv()) != "end":
            call = step if what == "environment" else compute
            pipe.send(1 / frame_rate(iter(call, None), job.warm_up, job.seconds / 2))
