"""Whole episodes, joined of the fragments in which they were collected."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase

from aioinfer.collectors.fragments import TensorDictBuilder, leaves

__all__ = ["EpisodeAssembler"]

_Path: TypeAlias = tuple[str, ...]
# Steps of a fragment, which has an array for each leaf: the first, and the one behind the last.
_Piece: TypeAlias = tuple[list[NDArray[Any]], int, int]


@dataclass
class _Episode:
    """One, as far as it is known."""

    number: int
    steps: int = 0
    pieces: list[_Piece] = field(default_factory=list)


class EpisodeAssembler:
    """Copies fragments, and joins them to episodes. One thread at a time may call it.

    An episode of which a fragment is missing, because it was dropped, is dropped as a whole. Episodes that have not
    ended are kept in memory however long they are.

    Args:
        frames_per_batch: how many steps a batch has at least.
        total_frames: batches end when so many steps are delivered, or a few more: the last episode is whole too.
            ``None`` or a negative number for no end.
        max_policy_lag: an episode is dropped where the oldest policy version of its steps is further behind the
            current one as it is delivered; ``None`` to drop none.

    Attributes:
        frames: steps delivered.
        dropped_frames: steps of episodes of which a fragment is missing.
        dropped_by_lag: episodes dropped for ``max_policy_lag``.
    """

    def __init__(
        self, frames_per_batch: int, *, total_frames: int | None = None, max_policy_lag: int | None = None
    ) -> None:
        self._frames_per_batch = frames_per_batch
        self._total_frames = None if total_frames is None or total_frames < 0 else total_frames
        self._max_policy_lag = max_policy_lag
        self.frames = 0
        self.dropped_frames = 0
        self.dropped_by_lag = 0
        self._unfinished: dict[int, _Episode] = {}  # by environment
        self._complete: deque[_Episode] = deque()
        self._complete_frames = 0
        self._paths: list[_Path] = []
        self._builder: TensorDictBuilder | None = None

    @property
    def finished(self) -> bool:
        """Whether all of ``total_frames`` are delivered."""
        return self._total_frames is not None and self.frames >= self._total_frames

    def add(self, batch: TensorDictBase, lengths: Sequence[int]) -> None:
        """Copy fragments; their rows are free at once.

        Args:
            batch: ``[B, T]``, of a :class:`~aioinfer.collectors.fragments.FragmentRing`; fragments of one environment
                in the order in which it wrote them.
            lengths: how many steps of each are valid.
        """
        found = leaves(batch)
        if self._builder is None:
            self._paths = list(found)
            self._builder = TensorDictBuilder(self._paths)
        columns = [found[path] for path in self._paths]
        envs = found["collector", "env"][:, 0].tolist()
        ends = found["next", "done"][..., 0]
        numbers, steps = found["collector", "episode"], found["collector", "step"]
        for index, length in enumerate(lengths):
            fragment = [column[index, :length].copy() for column in columns]
            start = 0
            for end in np.flatnonzero(ends[index, :length]).tolist():
                at = (int(numbers[index, start]), int(steps[index, start]))
                self._add_piece(envs[index], at, (fragment, start, end + 1), ends=True)
                start = end + 1
            if start < length:
                at = (int(numbers[index, start]), int(steps[index, start]))
                self._add_piece(envs[index], at, (fragment, start, length), ends=False)

    def take(self, current_version: int = 0) -> TensorDict | None:
        """Take the next batch, if there are enough steps.

        Args:
            current_version: of the policy, by which the lag is judged.

        Returns:
            A TensorDict ``[N]`` of whole episodes, one after the other, in the order in which they ended.
        """
        if self.finished:
            return None
        if self._max_policy_lag is not None:
            self._drop_older_than(current_version - self._max_policy_lag)
        wanted = self._frames_per_batch
        if self._total_frames is not None:
            wanted = min(wanted, self._total_frames - self.frames)
        if self._builder is None or self._complete_frames < wanted:
            return None
        pieces: list[_Piece] = []
        count = 0
        while count < wanted:
            episode = self._complete.popleft()
            count += episode.steps
            for fragment, start, end in episode.pieces:
                if pieces and pieces[-1][0] is fragment and pieces[-1][2] == start:
                    start = pieces.pop()[1]
                pieces.append((fragment, start, end))
        self._complete_frames -= count
        self.frames += count
        columns = [
            np.concatenate([fragment[leaf][start:end] for fragment, start, end in pieces])
            for leaf in range(len(self._paths))
        ]
        return self._builder.build(columns, torch.Size((count,)))

    def _add_piece(self, env: int, at: tuple[int, int], piece: _Piece, *, ends: bool) -> None:
        """Add steps of one episode, of which ``at`` has the number, and how many steps were before."""
        number, step = at
        _, start, end = piece
        episode = self._unfinished.get(env)
        if episode is None or (episode.number, episode.steps) != at:
            if episode is not None:  # its end is missing
                self.dropped_frames += episode.steps
                del self._unfinished[env]
            if step != 0:  # its beginning is missing
                self.dropped_frames += end - start
                return
            episode = self._unfinished[env] = _Episode(number)
        episode.pieces.append(piece)
        episode.steps += end - start
        if ends:
            self._complete.append(self._unfinished.pop(env))
            self._complete_frames += episode.steps

    def _drop_older_than(self, version: int) -> None:
        kept = [episode for episode in self._complete if not self._is_older(episode, version)]
        self.dropped_by_lag += len(self._complete) - len(kept)
        self._complete = deque(kept)
        self._complete_frames = sum(episode.steps for episode in kept)

    def _is_older(self, episode: _Episode, version: int) -> bool:
        versions, random = self._paths.index(("policy_version",)), self._paths.index(("collector", "random"))
        return any(
            bool(((fragment[versions][start:end] < version) & ~fragment[random][start:end]).any())
            for fragment, start, end in episode.pieces
        )
