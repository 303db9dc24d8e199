"""Which environment writes which row of the ring next, and which fragments are the next batch.

In ``"fair"`` order fragments are numbered in rounds: each round has one fragment of each environment that is there as
the round opens, in the order of the environments. Batches consist of fragments in that order, so they don't depend on
which environment is faster. In ``"first"`` order batches consist of fragments as they are completed.

A round opens when an environment asks for its next fragment and has no place yet, if all of this holds:

- the slowest environment is at most ``max_batches_ahead`` rounds behind the new one;
- the ring has a free row for each environment that is there;
- with ``in_lockstep``: the reader waits for a batch, and the fragments that are open are fewer than a batch has.

There is no deadlock. Let ``B`` rows be lent to the reader, and no batch be complete. All fragments of rounds before the
slowest environment's are complete, so fewer than ``B`` of them are in the ring. From its round on there are at most
``max_batches_ahead + 1`` rounds, or in lockstep one more than those that are less than a batch. The ring has rows for
all of these, so the slowest environment can always write its next fragment, until a batch is complete.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal

__all__ = ["FragmentScheduler", "Order", "Overflow"]

Order = Literal["fair", "first"]
Overflow = Literal["wait", "drop_oldest"]

_COUNTERS = ("frames", "dropped_batches", "dropped_by_overflow", "dropped_by_lag")


class _Fragment:
    """One that is planned, being written, or unread."""

    __slots__ = ("env", "granted", "length", "oldest_version", "pending", "round", "row")

    def __init__(self, env: int, row: int, round_number: int) -> None:
        self.env = env
        self.row = row
        self.round = round_number
        self.granted = False
        self.pending = True  # its environment is there and has not finished it
        self.length = -1  # until it is finished
        self.oldest_version: int | None = None


class FragmentScheduler:
    """Rows of the ring for environments that ask, and batches for the reader.

    It has no lock, no thread and no clock: one thread at a time may call it. All environments are there at first. After
    each call of another method more may be granted: also after a :meth:`take` that returned nothing, but has dropped.

    Args:
        num_envs: how many environments there are, numbered from 0.
        batch_rows: fragments of a batch, ``B``.
        fragment_length: steps of a complete fragment, ``T``.
        order: of the fragments in batches.
        max_batches_ahead: how many complete batches may be unread, and in ``"fair"`` order how many fragments an
            environment may be in front of the slowest.
        overflow: what happens at that many unread batches: environments wait, or the oldest batch is dropped as soon
            as one more is complete.
        total_frames: how many steps are delivered; ``None`` or a negative number for no end.
        max_policy_lag: a fragment is dropped where the oldest policy version of its steps is further behind the
            current one as it is delivered; ``None`` to drop none.
        in_lockstep: environments step only for a batch that the reader asked for, and a batch waits for all fragments
            that were begun. Only in ``"fair"`` order.
        episodes: the reader copies fragments at once to join them to episodes. So it gets all that are complete, not
            batches, and does without ``total_frames`` and ``max_policy_lag``, which are the matter of episodes.

    Attributes:
        num_rows: rows that the ring needs.
        frames: steps delivered.
        dropped_batches: dropped for ``overflow``.
        dropped_by_overflow: the fragments of those.
        dropped_by_lag: fragments dropped for ``max_policy_lag``.

    Raises:
        ValueError: ``in_lockstep`` in another order than ``"fair"``.
    """

    def __init__(
        self,
        *,
        num_envs: int,
        batch_rows: int,
        fragment_length: int,
        order: Order = "fair",
        max_batches_ahead: int = 2,
        overflow: Overflow = "wait",
        total_frames: int | None = None,
        max_policy_lag: int | None = None,
        in_lockstep: bool = False,
        episodes: bool = False,
    ) -> None:
        if in_lockstep and order != "fair":
            raise ValueError(f'in_lockstep needs order "fair", got "{order}"')
        self._batch_rows = batch_rows
        self._fragment_length = fragment_length
        self._fair = order == "fair"
        self._ahead = max_batches_ahead
        self._drops_oldest = overflow == "drop_oldest" and not in_lockstep
        self._waits = overflow == "wait" and not in_lockstep
        endless = episodes or total_frames is None or total_frames < 0
        self._total_frames = None if endless else total_frames
        self._max_policy_lag = None if episodes else max_policy_lag
        self._in_lockstep = in_lockstep
        self._episodes = episodes
        # One batch is lent, one is not complete yet. The ring has whole batches, so its end lies between two of them.
        ahead = 0 if in_lockstep else max_batches_ahead * max(batch_rows, num_envs)
        rows = 2 * batch_rows - 1 + ahead + num_envs
        self.num_rows = -(-rows // batch_rows) * batch_rows

        self.frames = 0
        self.dropped_batches = 0
        self.dropped_by_overflow = 0
        self.dropped_by_lag = 0

        self._is_there = [True] * num_envs
        self._num_there = num_envs
        self._asks = [False] * num_envs
        self._due: list[int] = []  # environments that asked, and have a place
        self._waiting: list[int] = []  # those that asked and have none
        self._planned: list[deque[_Fragment]] = [deque() for _ in range(num_envs)]  # places of each, to be granted
        self._written: list[_Fragment | None] = [None] * self.num_rows  # by row: granted or planned, and not finished
        self._open: deque[_Fragment] = deque()  # in fair order, from the first that is not finished on
        self._pending: list[int] = []  # fragments of each round, from the slowest environment's round on
        self._first_round = 0  # the number of that round
        self._complete: deque[_Fragment] = deque()  # unread, in the order of delivery
        self._complete_frames = 0
        self._lent: set[int] = set()
        self._free = bytearray(b"\1") * self.num_rows
        self._num_free = self.num_rows
        self._next_row = 0
        self._requested = False

    @property
    def drops_by_lag(self) -> bool:
        """Whether :meth:`finish` needs the versions of fragments."""
        return self._max_policy_lag is not None

    @property
    def finished(self) -> bool:
        """Whether all of ``total_frames`` are delivered."""
        return self._total_frames is not None and self.frames >= self._total_frames

    # ---------------------------------------------------------------- environments

    def ask(self, env: int) -> None:
        """Ask for a row for the next fragment of ``env``. It may still write its latest one."""
        if self._asks[env] or not self._is_there[env]:
            return
        self._asks[env] = True
        (self._due if self._planned[env] else self._waiting).append(env)

    def grants(self) -> list[tuple[int, int]]:
        """Grant rows to those who asked, each once.

        Returns:
            Environments and their rows. Whoever gets one calls :meth:`finish` for it in any case.
        """
        if not self._due and not self._waiting:
            return []
        if self.finished or self._is_full():
            return []
        if not self._fair:
            return self._grant_first()
        if self._waiting and self._may_open_round():
            self._open_round()
            self._due += self._waiting  # each has a place in that round
            self._waiting.clear()
        granted = []
        for env in self._due:
            fragment = self._planned[env].popleft()
            fragment.granted = True
            self._asks[env] = False
            granted.append((env, fragment.row))
        self._due.clear()
        return granted

    def finish(self, env: int, row: int, length: int, oldest_version: int | None) -> None:
        """Take note that the fragment of ``env`` in ``row`` gets no more steps.

        Args:
            env: the environment.
            row: where the fragment is.
            length: its steps: of a complete one ``T``, of one that was cut fewer. An empty one never reaches a batch.
            oldest_version: of the policy, among its steps; ``None`` if all actions were random, or unless
                ``drops_by_lag``.

        Raises:
            ValueError: ``env`` has no such row.
        """
        fragment = self._written[row]
        if fragment is None or fragment.env != env or not fragment.granted:
            raise ValueError(f"environment {env} has not been granted row {row}, or has finished it")
        if not 0 <= length <= self._fragment_length:
            raise ValueError(f"a fragment has 0 to {self._fragment_length} steps, got {length}")
        fragment.oldest_version = oldest_version
        self._settle(fragment, length)

    def leave(self, env: int) -> None:
        """Don't wait for ``env``, which is being restarted or retired. Rows that it was granted are to be finished."""
        if not self._is_there[env]:
            return
        self._is_there[env] = False
        self._num_there -= 1
        if self._asks[env]:
            self._asks[env] = False
            (self._due if env in self._due else self._waiting).remove(env)
        for fragment in self._written:
            if fragment is not None and fragment.env == env:
                self._stop_waiting(fragment)
        planned = self._planned[env]
        while planned:
            self._settle(planned.popleft(), 0)

    def join(self, env: int) -> None:
        """Take note that ``env`` is back. Its next fragment is of the next round that opens."""
        if not self._is_there[env]:
            self._is_there[env] = True
            self._num_there += 1

    # ---------------------------------------------------------------- reader

    def request(self) -> None:
        """Ask for the next batch. Only in lockstep it makes a difference: environments step only then."""
        self._requested = True

    @property
    def has_batch(self) -> bool:
        """Whether the next batch is complete, unless some of its fragments are too old."""
        if not self._complete or (self._in_lockstep and self._open):
            return False
        left = self._frames_left()
        is_last = left is not None and self._complete_frames >= left
        return self._episodes or is_last or len(self._complete) >= self._batch_rows

    def take(self, current_version: int) -> list[tuple[int, int, int]] | None:
        """Take the next batch, if it is complete.

        Args:
            current_version: of the policy, by which the lag is judged.

        Returns:
            Row, environment and length of each fragment. The rows are lent until :meth:`release`. The last batch has
            fewer rows, and its last length is shorter, where ``total_frames`` ends.
        """
        if self.finished or not self.has_batch:
            return None
        if self._max_policy_lag is not None:
            self._drop_older_than(current_version - self._max_policy_lag)
        if not self.has_batch:
            return None
        left = self._frames_left()
        taken = []
        for _ in range(len(self._complete) if self._episodes else min(len(self._complete), self._batch_rows)):
            if left == 0:
                break
            fragment = self._pop_complete()
            length = fragment.length
            if left is not None:
                length = min(length, left)
                left -= length
            self._lent.add(fragment.row)
            self.frames += length
            taken.append((fragment.row, fragment.env, length))
        self._requested = False
        return taken

    def release(self, rows: Sequence[int]) -> None:
        """Give rows back that :meth:`take` has lent.

        Raises:
            ValueError: one of them is not lent.
        """
        for row in rows:
            if row not in self._lent:
                raise ValueError(f"row {row} is not lent to the reader")
            self._lent.remove(row)
            self._give_back(row)

    def state_dict(self) -> dict[str, int]:
        """What is to be kept for a collector that goes on later: the counters. Unread fragments are not kept."""
        return {name: getattr(self, name) for name in _COUNTERS}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from such a state.

        Raises:
            ValueError: it is not one of a scheduler.
        """
        if state.keys() != set(_COUNTERS):
            raise ValueError(f"the state of a scheduler has {list(_COUNTERS)}, got {list(state)}")
        for name in _COUNTERS:
            setattr(self, name, state[name])

    # ---------------------------------------------------------------- rows and rounds

    def _frames_left(self) -> int | None:
        return None if self._total_frames is None else self._total_frames - self.frames

    def _is_full(self) -> bool:
        """Whether the reader has enough to read for environments to wait."""
        if not self._waits:
            return False
        left = self._frames_left()
        if left is not None and self._complete_frames >= left:
            return True
        return len(self._complete) >= self._ahead * self._batch_rows

    def _may_open_round(self) -> bool:
        if len(self._pending) > self._ahead or self._num_free < self._num_there:
            return False
        if not self._in_lockstep:
            return True
        return self._requested and len(self._open) + len(self._complete) < self._batch_rows

    def _open_round(self) -> None:
        number = self._first_round + len(self._pending)
        envs = [env for env, is_there in enumerate(self._is_there) if is_there]
        for env in envs:
            fragment = _Fragment(env, self._allot(), number)
            self._written[fragment.row] = fragment
            self._planned[env].append(fragment)
            self._open.append(fragment)
        self._pending.append(len(envs))

    def _grant_first(self) -> list[tuple[int, int]]:
        granted = []
        for env in self._waiting[: self._num_free]:
            fragment = _Fragment(env, self._allot(), 0)
            fragment.granted = True
            self._written[fragment.row] = fragment
            self._asks[env] = False
            granted.append((env, fragment.row))
        del self._waiting[: len(granted)]
        return granted

    def _allot(self) -> int:
        """Take the next free row, in the order of the ring."""
        row = self._free.find(1, self._next_row)
        if row < 0:
            row = self._free.find(1)
        self._free[row] = 0
        self._num_free -= 1
        self._next_row = (row + 1) % self.num_rows
        return row

    def _give_back(self, row: int) -> None:
        self._free[row] = 1
        self._num_free += 1

    def _settle(self, fragment: _Fragment, length: int) -> None:
        """Move a fragment that gets no more steps to those that are complete, when it is its turn."""
        fragment.length = length
        self._written[fragment.row] = None
        if length == 0:
            self._give_back(fragment.row)
        if not self._fair:
            self._add_complete(fragment)
            return
        self._stop_waiting(fragment)
        while self._open and self._open[0].length >= 0:
            self._add_complete(self._open.popleft())

    def _stop_waiting(self, fragment: _Fragment) -> None:
        """Don't count ``fragment`` as one that the round has to wait for."""
        if not self._fair or not fragment.pending:
            return
        fragment.pending = False
        self._pending[fragment.round - self._first_round] -= 1
        while self._pending and not self._pending[0]:
            del self._pending[0]
            self._first_round += 1

    def _add_complete(self, fragment: _Fragment) -> None:
        if fragment.length == 0:
            return
        self._complete.append(fragment)
        self._complete_frames += fragment.length
        if self._drops_oldest and len(self._complete) >= (self._ahead + 1) * self._batch_rows:
            for _ in range(self._batch_rows):
                self._give_back(self._pop_complete().row)
            self.dropped_batches += 1
            self.dropped_by_overflow += self._batch_rows

    def _pop_complete(self) -> _Fragment:
        fragment = self._complete.popleft()
        self._complete_frames -= fragment.length
        return fragment

    def _drop_older_than(self, version: int) -> None:
        """Drop what is too old to be in the next batch."""
        kept: list[_Fragment] = []
        while self._complete and len(kept) < self._batch_rows:
            fragment = self._pop_complete()
            if fragment.oldest_version is not None and fragment.oldest_version < version:
                self._give_back(fragment.row)
                self.dropped_by_lag += 1
            else:
                kept.append(fragment)
        self._complete.extendleft(reversed(kept))
        self._complete_frames += sum(fragment.length for fragment in kept)
