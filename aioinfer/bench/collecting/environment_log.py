"""What environments do and when, in a file that they and the measurement map into memory."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from aioinfer.bench.collecting import environments

_HANG_TIME = 3600.0
_COLUMNS = ("pid", "made_from", "made_until", "makings", "first_step", "steps", "told_to_hang", "hung")


class EnvironmentLog:
    """One row for each environment. Every process may read it; a row is written by the process of its environment.

    Times are those of ``time.monotonic``, which all processes share.

    Attributes:
        pid: float64 ``[num_envs]``, as all of them: the process.
        made_from: when the environment was begun to be made for the last time.
        made_until: when it was made.
        makings: how often it was made.
        first_step: when it began its first step since then; 0 if it has not.
        steps: how many steps it has begun, however often it was made.
        told_to_hang: whether its next step is to hang; written by the measurement.
        hung: when that step began; 0 if it has not.

    Args:
        num_envs: number of rows.
        path: of a file of that size; ``None`` makes one that is deleted by :meth:`close`.
    """

    pid: np.ndarray[Any, Any]
    made_from: np.ndarray[Any, Any]
    made_until: np.ndarray[Any, Any]
    makings: np.ndarray[Any, Any]
    first_step: np.ndarray[Any, Any]
    steps: np.ndarray[Any, Any]
    told_to_hang: np.ndarray[Any, Any]
    hung: np.ndarray[Any, Any]

    def __init__(self, num_envs: int, path: str | None = None) -> None:
        self._owned: str | None = None
        if path is None:
            file, path = tempfile.mkstemp(prefix="aioinfer-bench-")
            os.ftruncate(file, 8 * len(_COLUMNS) * num_envs)
            os.close(file)
            self._owned = path
        self.path = path
        self.num_envs = num_envs
        table = np.memmap(path, np.float64, "r+", shape=(len(_COLUMNS), num_envs))
        for column, values in zip(_COLUMNS, table, strict=True):
            setattr(self, column, values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete the file, if this object has made it."""
        if self._owned is not None:
            with suppress(FileNotFoundError):
                Path(self._owned).unlink()

    def factories(self) -> list[LoggedFactory]:
        """What makes each environment."""
        return [LoggedFactory(self.path, self.num_envs, number) for number in range(self.num_envs)]


@dataclass(frozen=True, slots=True)
class LoggedFactory:
    """Makes a CartPole that logs what it does."""

    path: str
    num_envs: int
    number: int

    def __call__(self) -> Any:
        """Make it."""
        began = time.monotonic()
        log = EnvironmentLog(self.num_envs, self.path)
        environment = LoggedEnvironment(environments.make_cartpole(), log, self.number)
        log.first_step[self.number] = 0
        log.pid[self.number] = os.getpid()
        log.made_from[self.number] = began
        log.made_until[self.number] = time.monotonic()
        log.makings[self.number] += 1
        return environment


class LoggedEnvironment:
    """An environment of Gymnasium that logs its steps, and hangs in one if it is told to."""

    def __init__(self, environment: Any, log: EnvironmentLog, number: int) -> None:
        self._environment = environment
        self._log = log
        self._number = number
        self._new = True
        self.observation_space = environment.observation_space
        self.action_space = environment.action_space
        self.metadata = environment.metadata

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin an episode."""
        return self._environment.reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        """Step, or hang."""
        log, number = self._log, self._number
        log.steps[number] += 1
        if self._new:
            self._new = False
            log.first_step[number] = time.monotonic()
        if log.told_to_hang[number]:
            log.told_to_hang[number] = 0
            log.hung[number] = time.monotonic()
            time.sleep(_HANG_TIME)
        return self._environment.step(action)

    def close(self) -> None:
        """Close the environment."""
        self._environment.close()
