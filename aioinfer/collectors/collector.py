"""The collector: environments at their own pace, one policy, and batches of fragments."""

from __future__ import annotations

import asyncio
import atexit
import copy
import logging
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Literal, Self

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey

from aioinfer.client import ClientMaker
from aioinfer.collectors.coordinator import LOOK_AGAIN, Coordinator
from aioinfer.collectors.episodes import EpisodeAssembler
from aioinfer.collectors.fragments import FragmentLayout
from aioinfer.collectors.local_policy import PolicySource, make_source
from aioinfer.collectors.lockstep import TURN_KEY, LockstepPolicy, lockstep_weights
from aioinfer.collectors.policy_layout import (
    PolicyLayout,
    example_request,
    find_policy_layout,
    reads_is_init,
    run_once,
)
from aioinfer.collectors.progress import show_progress
from aioinfer.collectors.restarts import Restarts
from aioinfer.collectors.scheduler import FragmentScheduler
from aioinfer.collectors.seeds import make_entropy
from aioinfer.collectors.spaces import ArraySpec, EnvLayout, InfoKeys, info_specs
from aioinfer.collectors.stats import CollectorStats, StatsRecorder, shares_of_time
from aioinfer.errors import ServerNotRunningError
from aioinfer.futures import run_in_thread
from aioinfer.interaction_type import InteractionType, requests_carry
from aioinfer.server import InferenceServer
from aioinfer.tensors import show_key
from aioinfer.transports import ProcessSlotTransport, ThreadingTransport
from aioinfer.weight_sync.scheme import WeightSyncScheme

__all__ = ["AsyncBatchedCollector"]

StateKeys = Sequence[NestedKey] | Mapping[NestedKey, torch.Tensor]
EnvFactory = Callable[..., Any]

_log = logging.getLogger("aioinfer")

_VERSION_KEY = "policy_version"
# Groups of a worker that waits for a server.
_WAITING_GROUPS = 2
# Without next observations, a fragment has places for as many ends of episodes as it has so many steps, two at least.
_STEPS_PER_FINAL = 8


class AsyncBatchedCollector:
    """Steps environments with the actions of one policy, and yields batches of what they have experienced.

    Iterate over it with ``for`` or ``async for``. It starts with the first batch, or as a context manager, and ends
    with ``total_frames``, with :meth:`shutdown`, or with the context. A batch is a TensorDict ``[B, T]`` of ``B``
    fragments, each of which is ``T`` consecutive steps of one environment::

        observation, action, <outputs of the policy>, policy_version, is_init, done, terminated, truncated
        next: observation, reward, done, terminated, truncated, info
        collector: env, episode, step, random, mask

    ``next.observation`` is what the step returned, also where the episode ended. ``collector.mask`` is false behind the
    end of a fragment that was cut, since its environment failed, or ``total_frames`` were reached. A batch is a
    view of memory that is used again: it is valid until the next batch is asked for; ``batch.clone()`` keeps it.

    Args:
        create_env_fn: makes an environment; or a sequence of such functions, one for each environment; or of
            asynchronous environments. An environment is one of Gymnasium, vectorised or not; of torchrl; a parallel one
            of PettingZoo; or an object whose ``reset`` and ``step`` are coroutine functions.
        policy: what acts: a TensorDict module, or a function of a TensorDict, from observations ``[B]`` to actions
            ``[B]``. It is a copy that acts, so that weights are in use only once they are published:
            :meth:`update_policy_weights_`.
        policy_factory: makes the policy.
        server: a running server instead, which is left alone; with ``num_workers`` it needs a transport between
            processes. One of ``policy``, ``policy_factory`` and ``server`` is given.
        num_envs: how many environments the one function makes; 1 by default.
        frames_per_batch: ``B * T``.
        fragment_length: ``T``, which divides it.
        yield_completed_trajectories: yield whole episodes instead, one after the other in a TensorDict ``[N]``,
            ``N`` at least ``frames_per_batch``.
        total_frames: how many steps are yielded, exactly; -1: no end. With whole episodes it may be more.
        init_random_frames: how many steps are made with actions drawn from the action space, all environments
            together. Their ``policy_version`` is -1, and outputs of the policy are 0.
        num_workers: processes that step environments; with 0, threads of this process do, and tasks step
            asynchronous environments.
        groups_per_worker: a worker's environments are divided into so many groups: one steps while another
            waits for its actions. By default two, or one with ``local_inference``, where none waits. Environments
            that wait, rather than compute, need more.
        seed: of all environments, whatever the number of workers; ``None``: random.
        in_lockstep: environments step only while a batch is waited for, and random numbers of the policy depend on
            nothing but the seed: batches are the same from run to run, bit by bit. For policies, not for a ``server``.
        order: ``"fair"``: the same number of fragments of every environment; ``"first"``: fragments as they are
            complete, of which slow environments have fewer. Environments that can't wait for each other (of a
            vectorised environment that resets in a step of its own) are always in the second order.
        max_batches_ahead: how many unread batches there may be.
        overflow: what happens then: ``"wait"``: environments wait; ``"drop_oldest"``: the oldest batch is dropped.
        max_policy_lag: fragments with a step of a version further behind the current one are not delivered.
        step_timeout: seconds that a step may take; the environment is made again then. ``None``: any time.
        reset_timeout: the same for a reset, and for making an environment.
        restarts: how often an environment that failed is made again; ``None``: never.
        min_envs: how many environments must be left; else :class:`CollectorError` ends the iteration.
        info_keys: entries of ``info`` that are kept: names of numbers, or a mapping to dtype, or to shape and dtype.
        state_keys: entries that recurrent policies read, and write below ``"next"`` or under the same name: a mapping
            to what an episode begins with, ``[*shape]``; or names, for policies that take missing ones for zeros.
        next_observation: whether batches have ``next.observation``, which takes as much memory as ``observation``.
            Without it a batch has the batch size ``[B]``, ``observation`` is ``[B, T + 1, *shape]``, and what episodes
            ended with is beside it; :func:`with_next_observation` makes the usual batch of it, or of a part.
        postproc: called with each batch, which its result replaces.
        replay_buffer: gets the valid steps of each batch, ``[N]``, by its method ``extend``; ``None`` is yielded then.
        post_collect_hook: called with each batch, after ``postproc``.
        exploration_type: the exploration mode of the policy; ``None``: random.
        weight_sync: receives weights from a trainer; see :class:`InferenceServer`.
        weight_sync_model_id: the name under which they are published.
        device: where the policy runs.
        local_inference: each group of environments runs a copy of the policy itself, in its own thread, instead of
            asking a server that runs it for all of them. It can where the policy is an ``nn.Module`` on the CPU that
            can be copied, for workers pickled, and neither ``in_lockstep`` nor ``max_batch_size`` is asked for.
            ``None``: it does so where it can, the policy is small (at most 4 MiB of weights) and nothing about it is
            unusual, and several ``groups_per_worker`` are not asked for. Asynchronous environments share a copy that
            runs in their event loop, one pass for all that wait; where a pass takes 1 ms or more, for which the loop
            would be blocked, they ask the server in any case.
        max_batch_size: most rows in one forward pass of the server; by default, as many as there are environments, and
            at least 64.
        create_env_kwargs: arguments for ``create_env_fn``, or a sequence of them.
        progress: show a progress bar (needs rich).

    Raises:
        TypeError: an argument of the wrong type, or not one of ``policy``, ``policy_factory`` and ``server``.
        ValueError: an argument that makes no sense, or two that contradict each other.
    """

    def __init__(
        self,
        create_env_fn: EnvFactory | Sequence[Any],
        *,
        policy: Callable[..., Any] | None = None,
        policy_factory: Callable[[], Callable[..., Any]] | None = None,
        server: ClientMaker | None = None,
        num_envs: int | None = None,
        frames_per_batch: int = 2048,
        fragment_length: int = 64,
        yield_completed_trajectories: bool = False,
        total_frames: int = -1,
        init_random_frames: int | None = 0,
        num_workers: int = 0,
        groups_per_worker: int | None = None,
        local_inference: bool | None = None,
        seed: int | None = None,
        in_lockstep: bool = False,
        order: Literal["fair", "first"] = "fair",
        max_batches_ahead: int = 2,
        overflow: Literal["wait", "drop_oldest"] = "wait",
        max_policy_lag: int | None = None,
        step_timeout: float | None = None,
        reset_timeout: float | None = None,
        restarts: Restarts | None = Restarts(),  # noqa: B008 - it is frozen
        min_envs: int = 1,
        info_keys: InfoKeys = (),
        state_keys: StateKeys = (),
        next_observation: bool = True,
        postproc: Callable[[TensorDictBase], TensorDictBase] | None = None,
        replay_buffer: Any = None,
        post_collect_hook: Callable[[TensorDictBase], object] | None = None,
        exploration_type: InteractionType | str | None = None,
        weight_sync: WeightSyncScheme | None = None,
        weight_sync_model_id: str = "policy",
        device: torch.device | str | int | None = None,
        max_batch_size: int | None = None,
        create_env_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        progress: bool = False,
    ) -> None:
        if sum(given is not None for given in (policy, policy_factory, server)) != 1:
            raise TypeError("give one of policy, policy_factory and server")
        if server is not None and not isinstance(server, ClientMaker):
            raise TypeError(f"server must be a server of aioinfer, got {type(server).__qualname__}")
        if server is not None and num_workers and not hasattr(server, "address"):
            raise ValueError(
                "num_workers needs a server with a transport between processes: give it an MPTransport or a "
                "ProcessSlotTransport"
            )
        if server is not None and (in_lockstep or weight_sync is not None or device is not None):
            raise ValueError("in_lockstep, weight_sync and device are for a policy; the server has its own")
        if in_lockstep and weight_sync is not None:
            raise ValueError("with in_lockstep=True weights come from update_policy_weights_, between two batches")
        for name, number, least in (
            ("frames_per_batch", frames_per_batch, 1),
            ("fragment_length", fragment_length, 1),
            ("groups_per_worker", 1 if groups_per_worker is None else groups_per_worker, 1),
            ("num_workers", num_workers, 0),
            ("max_batches_ahead", max_batches_ahead, 1),
            ("min_envs", min_envs, 1),
            ("init_random_frames", init_random_frames or 0, 0),
            ("total_frames", total_frames, -1),
            ("num_envs", 1 if num_envs is None else num_envs, 1),
            ("max_batch_size", 1 if max_batch_size is None else max_batch_size, 1),
            ("max_policy_lag", max_policy_lag or 0, 0),
        ):
            if not isinstance(number, int | np.integer) or isinstance(number, bool) or number < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}")
        for name, seconds in (("step_timeout", step_timeout), ("reset_timeout", reset_timeout)):
            if seconds is not None and (not isinstance(seconds, int | float) or not seconds > 0):
                raise ValueError(f"{name} must be a number of seconds above 0, or None, got {seconds!r}")
        for name, function in (
            ("policy", policy),
            ("policy_factory", policy_factory),
            ("postproc", postproc),
            ("post_collect_hook", post_collect_hook),
            (
                "replay_buffer.extend",
                None if replay_buffer is None else getattr(replay_buffer, "extend", replay_buffer),
            ),
        ):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable, got {type(function).__qualname__}")
        info_specs(info_keys)
        if not isinstance(local_inference, bool | None):
            raise TypeError(f"local_inference must be True, False or None, got {local_inference!r}")
        if local_inference and (server is not None or in_lockstep or max_batch_size is not None):
            raise ValueError("server, in_lockstep and max_batch_size are not for local_inference=True")
        if in_lockstep and order != "fair":
            raise ValueError('in_lockstep=True needs order="fair"')
        if frames_per_batch % fragment_length and not yield_completed_trajectories:
            raise ValueError(
                "frames_per_batch must be a multiple of fragment_length, "
                f"which is {fragment_length}, got {frames_per_batch}"
            )
        for name, value, choices in (
            ("order", order, ("fair", "first")),
            ("overflow", overflow, ("wait", "drop_oldest")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        if not next_observation and (yield_completed_trajectories or replay_buffer is not None):
            raise ValueError(
                "next_observation=False is for batches of fragments, neither for whole episodes nor a replay buffer"
            )
        if max_policy_lag is not None and server is not None and not hasattr(server, "policy_version"):
            raise ValueError("max_policy_lag needs a server that tells its policy_version")
        if not isinstance(restarts, Restarts | None):
            raise TypeError(f"restarts must be a Restarts or None, got {restarts!r}")
        self._factories = _factories(create_env_fn, num_envs, create_env_kwargs, num_workers)
        self._policy, self._policy_factory, self._given_server = policy, policy_factory, server
        self.frames_per_batch = int(frames_per_batch)
        self.fragment_length = int(fragment_length)
        self.total_frames = int(total_frames)
        self._episodes = yield_completed_trajectories
        self._random_frames = init_random_frames or 0
        self._num_workers = num_workers
        self._groups = groups_per_worker
        self._local_inference = local_inference
        self._in_lockstep = in_lockstep
        self._order: Literal["fair", "first"] = order
        self._ahead = max_batches_ahead
        self._overflow: Literal["wait", "drop_oldest"] = overflow
        self._max_policy_lag = max_policy_lag
        self._step_timeout, self._reset_timeout = step_timeout, reset_timeout
        self._restarts = restarts
        self._min_envs = min_envs
        self._info_keys = info_keys
        self._state_keys = state_keys
        self._next_observation = next_observation
        self._postproc = postproc
        self._replay_buffer = replay_buffer
        self._hook = post_collect_hook
        mode = InteractionType.RANDOM if exploration_type is None else InteractionType(exploration_type)
        self._mode: str = mode.value
        self._weight_sync, self._model_id = weight_sync, weight_sync_model_id
        self._device = device
        self._max_batch_size = max_batch_size
        self._shows_progress = progress
        self._entropy = make_entropy(seed)
        self._incarnations = [0] * len(self._factories)
        # Of the collector whose state was loaded: its frames, and the episodes that each environment has begun.
        self._frames_before = 0
        self._episodes_before: list[int] = []
        self._recorder = StatsRecorder()
        self._start_lock = threading.RLock()  # a signal handler may shut down what it has interrupted
        self._opened: ExitStack | None = None
        self._coordinator: Coordinator | None = None
        self._server: Any = server
        self._lent: list[int] = []
        self._is_waited_for = False
        self._assembler: EpisodeAssembler | None = None
        self._closed = False
        self._process = os.getpid()

    # -- start -----------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Make the environments and the server, and begin to collect. Blocks until all environments are made.

        Raises:
            CollectorError: too few environments could be made.
            ValueError: the policy does not fit the environments.
            ServerNotRunningError: the server that was given does not run.
            RuntimeError: it was shut down, perhaps meanwhile.
        """
        self._start(None)
        return self

    def _start(self, loop: asyncio.AbstractEventLoop | None) -> None:
        with self._start_lock:
            if self._closed:
                raise _was_shut_down()
            if self._opened is not None:
                return
            with ExitStack() as opened:
                policy = self._make_policy()
                local = self._make_local(policy)
                self._coordinator = coordinator = Coordinator(
                    self._factories,
                    num_workers=self._num_workers,
                    groups=self._groups or (_WAITING_GROUPS if local is None else 1),
                    info_keys=self._info_keys,
                    entropy=self._entropy,
                    incarnations=self._incarnations,
                    step_timeout=self._step_timeout,
                    reset_timeout=self._reset_timeout,
                    restarts=self._restarts,
                    min_envs=self._min_envs,
                    stats=self._recorder,
                    loop=loop,
                )
                if self._closed:
                    coordinator.fail(_was_shut_down())
                opened.callback(coordinator.close)
                layout, uneven = coordinator.make()
                if self._num_workers:
                    _check_shareable(layout)
                policy_layout = self._open_policy(policy, layout, coordinator, local, opened)
                self._recorder.start()
                self._begin(coordinator, layout, policy_layout, uneven, local)
                self._progress = opened.enter_context(show_progress(self)) if self._shows_progress else None
                if self._closed:
                    raise _was_shut_down()
                self._opened = opened.pop_all()
                self._at_exit = partial(_end, self._opened, coordinator, 1.0)
                atexit.register(self._at_exit)
                self._finalizer = weakref.finalize(self, run_in_thread, self._at_exit, "aioinfer-shutdown")
                self._finalizer.atexit = False  # threads can't be started then

    def _make_policy(self) -> Any:
        """The policy that is served; ``None`` where a server was given."""
        if self._given_server is not None:
            return None
        policy = _copy(self._policy) if self._policy_factory is None else self._policy_factory()
        if self._device is not None and isinstance(policy, torch.nn.Module):
            policy.to(self._device)
        return policy

    def _make_local(self, policy: Any) -> PolicySource | None:
        """Let groups run copies of the policy; ``None`` if they ask a server."""
        if self._local_inference is False:
            return None
        try:
            if self._given_server is not None or self._in_lockstep or self._max_batch_size is not None:
                raise ValueError("server, in_lockstep and max_batch_size are not for it")
            if self._device is not None and torch.device(self._device).type != "cpu":
                raise ValueError("it has a device of its own")
            if self._local_inference is None and (self._groups or 1) > 1:
                raise ValueError("several groups_per_worker are for a server, one of which waits for it")
            return make_source(
                policy, for_workers=self._num_workers > 0, only_if_sensible=self._local_inference is None
            )
        except ValueError as error:
            if self._local_inference:
                raise ValueError(f"local_inference=True is not for this policy: {error}") from error
            _log.info("a server computes all actions, since groups can't run a copy of the policy: %s", error)
            return None

    def _open_policy(
        self,
        policy: Any,
        layout: EnvLayout,
        coordinator: Coordinator,
        local: PolicySource | None,
        opened: ExitStack,
    ) -> PolicyLayout:
        """Find out what the policy returns, and serve it."""
        states = _initial_states(self._state_keys)
        keys = list(self._state_keys)
        if self._given_server is not None:
            if not getattr(self._given_server, "is_alive", True):
                raise ServerNotRunningError("the server does not run: start it before the collector")
            model = getattr(self._given_server, "model", None)
            sends_is_init = reads_is_init(model, keys)
            request = example_request(layout, sends_is_init=sends_is_init, states=states)
            with self._given_server.client() as client, requests_carry(InteractionType(self._mode)):
                reply = client(request, wait=True)
            key = getattr(self._given_server, "policy_version_key", _VERSION_KEY)
            if key is None or reply.get(key) is None:
                raise ValueError("replies of the server must say their version: give it a policy_version_key")
            return self._policy_layout(reply, layout, keys, states, sends_is_init)
        sends_is_init = reads_is_init(policy, keys)
        request = example_request(layout, sends_is_init=sends_is_init, states=states)
        if self._device is not None and isinstance(policy, torch.nn.Module):
            request = request.to(self._device)
        try:
            reply = run_once(policy, request, InteractionType(self._mode)).to("cpu")
        except Exception as error:
            if keys and states is None:
                error.add_note("the policy was asked without states: let state_keys be a mapping to the first of each")
            raise
        found = self._policy_layout(reply, layout, keys, states, sends_is_init)
        model = LockstepPolicy(policy, self._entropy) if self._in_lockstep else policy
        sizes = coordinator.group_sizes
        if self._in_lockstep and self._max_batch_size is not None and self._max_batch_size < max(sizes):
            raise ValueError(
                f"with in_lockstep=True a group's request must fit into one forward pass: max_batch_size must be at "
                f"least {max(sizes)}, got {self._max_batch_size}"
            )
        self._server = server = InferenceServer(
            model,
            self._make_transport(found, sizes),
            max_batch_size=self._max_batch_size or max(64, sum(sizes)),
            device=self._device,
            weight_sync=self._weight_sync,
            weight_sync_model_id=self._model_id,
        )
        if local is not None:
            server._updates.on_update = partial(local.weights.publish, policy)
        opened.callback(server.shutdown)
        server.start()
        return found

    def _policy_layout(
        self,
        reply: TensorDictBase,
        layout: EnvLayout,
        keys: Sequence[NestedKey],
        states: TensorDictBase | None,
        sends_is_init: bool,
    ) -> PolicyLayout:
        return find_policy_layout(
            reply,
            layout,
            state_keys=keys,
            states=states,
            sends_is_init=sends_is_init,
            version_key=getattr(self._given_server, "policy_version_key", None) or _VERSION_KEY,
            interaction_type=self._mode,
            sends_turn=self._in_lockstep,
        )

    def _make_transport(self, policy: PolicyLayout, sizes: Sequence[int]) -> Any:
        if self._num_workers == 0:
            return ThreadingTransport()
        request = [*policy.observation, *[state.spec for state in policy.states]]
        if policy.sends_is_init:
            request.append(ArraySpec(("is_init",), (1,), np.dtype(np.bool_)))
        if policy.sends_turn:
            request.append(ArraySpec((TURN_KEY,), (2,), np.dtype(np.int64)))
        reply = [*policy.action, *policy.outputs]
        reply += [ArraySpec(state.reply_path, state.spec.shape, state.spec.dtype) for state in policy.states]
        return ProcessSlotTransport(
            _zeros(request),
            _zeros(reply),
            num_slots=len(sizes) + self._num_workers,
            rows=max(sizes),
            drop_undeclared=True,
        )

    def _begin(
        self,
        coordinator: Coordinator,
        layout: EnvLayout,
        policy: PolicyLayout,
        uneven: bool,
        local: PolicySource | None,
    ) -> None:
        if self._in_lockstep and uneven:
            raise ValueError(
                "in_lockstep=True is not for vectorised environments that reset in a step of their own: "
                "make them with autoreset_mode SAME_STEP or DISABLED, or give single environments"
            )
        left = -1 if self.total_frames < 0 else max(0, self.total_frames - self._frames_before)
        scheduler = FragmentScheduler(
            num_envs=coordinator.num_envs,
            batch_rows=max(1, self.frames_per_batch // self.fragment_length),
            fragment_length=self.fragment_length,
            order="first" if uneven else self._order,
            max_batches_ahead=self._ahead,
            overflow=self._overflow,
            total_frames=left,
            max_policy_lag=self._max_policy_lag,
            in_lockstep=self._in_lockstep,
            episodes=self._episodes,
        )
        if self._episodes:
            self._assembler = EpisodeAssembler(
                self.frames_per_batch, total_frames=left, max_policy_lag=self._max_policy_lag
            )
        share, more = divmod(max(0, self._random_frames - self._frames_before), coordinator.num_envs)
        coordinator.begin(
            scheduler,
            policy,
            self._fragment_layout(layout, policy),
            random_frames=[share + (env < more) for env in range(coordinator.num_envs)],
            episodes=self._episodes_before,
            server=self._server,
            address=None if self._num_workers == 0 else self._server.address,
            local=local,
        )

    def _fragment_layout(self, layout: EnvLayout, policy: PolicyLayout) -> FragmentLayout:
        leaves = _leaves(layout, policy, self._next_observation)
        if self._next_observation:
            return FragmentLayout(leaves, self.fragment_length)
        paths = tuple(spec.path for spec in layout.observation)
        return FragmentLayout(leaves, self.fragment_length, paths, max(2, self.fragment_length // _STEPS_PER_FINAL))

    # -- batches ---------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[TensorDictBase]:
        self.start()
        while not self._is_finished():
            try:
                batch = self._wait()
            except Exception:
                if self._started().error is not None:
                    self.shutdown()
                raise
            if batch is None:
                return
            yield self._deliver(batch)
        self.shutdown()

    async def __aiter__(self) -> AsyncIterator[TensorDictBase]:
        await self._astart()
        while not self._is_finished():
            try:
                batch = await self._await()
            except Exception:
                if self._started().error is not None:
                    await self.ashutdown()
                raise
            if batch is None:
                return
            yield self._deliver(batch)
        await self.ashutdown()

    def _running(self) -> Coordinator:
        if self._closed or self._opened is None:
            raise RuntimeError("the collector does not run")
        return self._started()

    def _started(self) -> Coordinator:
        """Of a collector that runs, or that another thread shuts down meanwhile."""
        assert self._coordinator is not None
        return self._coordinator

    def _is_finished(self) -> bool:
        if self._closed:
            return True
        return self._started().scheduler.finished if self._assembler is None else self._assembler.finished

    def _wait(self) -> TensorDictBase | None:
        coordinator = self._started()
        with coordinator.lock, self._as_the_reader():
            self._release(coordinator)
            while True:
                if self._closed:
                    return None
                if (batch := self._try_take(coordinator)) is not None:
                    return batch
                coordinator.lock.wait(LOOK_AGAIN)

    async def _await(self) -> TensorDictBase | None:
        coordinator, loop = self._started(), asyncio.get_running_loop()
        changed = asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(changed.set)

        with self._as_the_reader():
            with coordinator.lock:
                self._release(coordinator)
            while True:
                with coordinator.lock:
                    if self._closed:
                        return None
                    if (batch := self._try_take(coordinator)) is not None:
                        return batch
                    changed.clear()
                    coordinator.call_at_change(wake)
                await changed.wait()

    @contextmanager
    def _as_the_reader(self) -> Iterator[None]:
        """Wait for a batch, unless somebody does: to ask for a batch takes the one before from whoever has it."""
        if self._is_waited_for:
            raise RuntimeError("somebody waits for a batch of this collector already: it has one reader at a time")
        self._is_waited_for = True
        try:
            yield
        finally:
            self._is_waited_for = False

    def _release(self, coordinator: Coordinator) -> None:
        """Give back the rows of the batch before. Under the lock."""
        coordinator.scheduler.release(self._lent)
        self._lent = []
        coordinator.scheduler.request()
        coordinator.grant()
        self._recorder.begin_wait()

    def _try_take(self, coordinator: Coordinator) -> TensorDictBase | None:
        """Take the next batch, if it is complete. Under the lock."""
        coordinator.check()
        version = self.policy_version
        while (taken := coordinator.scheduler.take(version)) is not None:
            rows, lengths = [row for row, _, _ in taken], [length for _, _, length in taken]
            lags = [version - oldest for oldest in coordinator.oldest_versions(rows, lengths)]
            batch: TensorDictBase = coordinator.ring.batch(rows, lengths)
            if self._assembler is None:
                self._lent = rows
                self._count(batch, sum(lengths), lags)
                coordinator.grant()
                return batch
            self._assembler.add(batch, lengths)
            coordinator.scheduler.release(rows)
            coordinator.scheduler.request()  # more fragments, unless the episodes suffice
            coordinator.grant()
            episodes = self._assembler.take(version)
            if episodes is not None:
                self._count(episodes, len(episodes), lags)
                return episodes
        coordinator.grant()  # rows of fragments that were dropped, since they were too old
        return None

    def _count(self, batch: TensorDictBase, frames: int, lags: Sequence[int]) -> None:
        self._recorder.end_wait()
        self._recorder.deliver(frames, lags)
        self._recorder.non_finite += _count_non_finite(batch, self.fragment_length)

    def _deliver(self, batch: TensorDictBase) -> Any:
        if self._postproc is not None:
            batch = self._postproc(batch)
        if self._hook is not None:
            self._hook(batch)
        if self._progress is not None:
            self._progress()
        if self._replay_buffer is None:
            return batch
        mask = None if self._episodes else batch.get(("collector", "mask"), None)
        self._replay_buffer.extend(batch if mask is None else batch[mask])
        return None

    # -- weights ---------------------------------------------------------------------------------------

    @property
    def policy_version(self) -> int:
        """The version of the weights in use."""
        return int(getattr(self._server, "policy_version", 0))

    def update_weights(self, weights: Any = None, *, version: int | None = None) -> None:
        """Use other weights from the next forward pass on; return when they are in use.

        Args:
            weights: a module, a TensorDict or a state dict; ``None``: those that ``policy`` has now.
            version: your own number for them; ``None`` counts up.

        Raises:
            TypeError: there are none.
            WeightSyncError: they don't fit.
            RuntimeError: the collector does not run.
        """
        self._running()
        self._server.update_weights(self._weights(weights), version=version)

    def update_policy_weights_(self, policy_or_weights: Any = None) -> None:
        """Do as :meth:`update_weights`, under the name that torchrl has for it."""
        self.update_weights(policy_or_weights)

    async def aupdate_weights(self, weights: Any = None, *, version: int | None = None) -> None:
        """Do as :meth:`update_weights`, without blocking the event loop."""
        self._running()
        await self._server.aupdate_weights(self._weights(weights), version=version)

    def _weights(self, weights: Any) -> Any:
        weights = self._policy if weights is None else weights
        if weights is None:
            raise TypeError("give the weights: the collector was made without a policy")
        return lockstep_weights(weights) if self._in_lockstep else weights

    # -- pause, figures and state ----------------------------------------------------------------------

    @contextmanager
    def pause(self, timeout: float | None = 30.0) -> Iterator[None]:
        """Make no step inside a ``with`` block.

        Raises:
            TimeoutError: a step under way did not end within ``timeout`` seconds.
        """
        coordinator = self._running()
        try:
            coordinator.pause(timeout)
            yield
        finally:
            coordinator.resume()

    def stats(self) -> CollectorStats:
        """The figures since the start."""
        coordinator = self._coordinator
        if coordinator is None or not coordinator.has_begun:
            return self._recorder.snapshot(
                shares={"environments": 0.0, "policy": 0.0, "reader": 0.0},
                retired={} if coordinator is None else coordinator.retired,
                dropped_batches=0,
                dropped_fragments=0,
                policy_version=0,
            )
        with coordinator.lock:
            scheduler = coordinator.scheduler
            return self._recorder.snapshot(
                shares=shares_of_time(
                    coordinator.watches(),
                    started=self._recorder.started,
                    now=self._recorder.now(),
                    reader_waited=self._recorder.waited(),
                ),
                retired=coordinator.retired,
                dropped_batches=scheduler.dropped_batches,
                dropped_fragments=scheduler.dropped_by_lag + (self._assembler.dropped_by_lag if self._assembler else 0),
                policy_version=self.policy_version,
            )

    def set_seed(self, seed: int) -> int:
        """Set the seed, before the start; returns one for what is seeded next.

        Raises:
            RuntimeError: it was started.
        """
        if self._opened is not None:
            raise RuntimeError("the collector has started: give it the seed before")
        self._entropy = make_entropy(seed)
        return seed + 1

    def state_dict(self) -> dict[str, Any]:
        """What a collector needs to go on where this one is: counts and seeds, not the environments themselves."""
        coordinator = self._coordinator
        made = self._incarnations if coordinator is None else [member.incarnation for member in coordinator.members]
        return {
            "entropy": self._entropy,
            "incarnations": list(made),
            "frames": self._frames_before + self._recorder.frames,
            "episodes": self._episodes_before if coordinator is None else coordinator.episodes(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another collector was, before the start.

        Environments begin new episodes, with other seeds than before: they don't repeat what they have lived through.

        Raises:
            RuntimeError: it was started.
            ValueError: the state is of a collector with another number of environments.
        """
        if self._opened is not None:
            raise RuntimeError("the collector has started: load the state before")
        if missing := {"entropy", "incarnations", "frames", "episodes"} - state.keys():
            raise ValueError(f"the state of a collector has {', '.join(sorted(missing))} too, got {list(state)}")
        if len(state["incarnations"]) != len(self._factories):
            raise ValueError(
                f"the state is of {len(state['incarnations'])} environments, this collector has {len(self._factories)}"
            )
        self._entropy = state["entropy"]
        self._incarnations = [incarnation + 1 for incarnation in state["incarnations"]]
        self._frames_before = state["frames"]
        self._episodes_before = list(state["episodes"])

    # -- end -------------------------------------------------------------------------------------------

    def shutdown(self, timeout: float | None = 5.0) -> None:
        """End all environments, workers and the server, unless that was given. Idempotent; any thread.

        What does not end within ``timeout`` seconds is killed; a thread of this process that an environment does
        not return to is left behind. A reader that waits for a batch gets no more. In a forked child of the process
        that made the collector nothing happens.
        """
        if os.getpid() != self._process:
            return
        self._closed = True
        if self._opened is None and self._coordinator is not None:
            self._coordinator.fail(_was_shut_down())  # it may be starting
        with self._start_lock:
            opened, self._opened = self._opened, None
        if opened is None:
            return
        atexit.unregister(self._at_exit)
        self._finalizer.detach()
        coordinator = self._coordinator
        assert coordinator is not None
        with coordinator.lock:
            self._recorder.stop()
            coordinator.notify()
        _end(opened, coordinator, 5.0 if timeout is None else timeout)

    async def ashutdown(self, timeout: float | None = 5.0) -> None:  # noqa: ASYNC109 - as shutdown
        """Do as :meth:`shutdown`, without blocking the event loop."""
        await asyncio.wrap_future(run_in_thread(lambda: self.shutdown(timeout), "aioinfer-shutdown"))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    async def __aenter__(self) -> Self:
        await self._astart()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.ashutdown()

    async def _astart(self) -> None:
        if self._opened is not None:
            return
        loop = asyncio.get_running_loop()
        starting = run_in_thread(lambda: self._start(loop), "aioinfer-start")
        try:
            await asyncio.wrap_future(starting)
        except asyncio.CancelledError:
            run_in_thread(self.shutdown, "aioinfer-shutdown")
            raise


def _end(opened: ExitStack, coordinator: Coordinator, timeout: float) -> None:
    """End what a collector has opened; without the collector, which may be gone."""
    coordinator.close_timeout = timeout
    opened.close()


def _factories(
    create_env_fn: Any,
    num_envs: int | None,
    kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    num_workers: int,
) -> list[Callable[[], Any]]:
    """One function without arguments for each member."""
    if not isinstance(kwargs, Mapping | Sequence | None):
        raise TypeError(f"create_env_kwargs must be a mapping or a sequence of them, got {type(kwargs).__qualname__}")
    given = list(create_env_fn) if isinstance(create_env_fn, Sequence) else [create_env_fn] * (num_envs or 1)
    if not given:
        raise ValueError("create_env_fn must have at least one environment")
    if num_envs is not None and num_envs != len(given):
        raise ValueError(f"num_envs is {num_envs}, create_env_fn has {len(given)} environments")
    each = [kwargs or {}] * len(given) if isinstance(kwargs, Mapping | None) else list(kwargs)
    if len(each) != len(given):
        raise ValueError(f"create_env_kwargs has {len(each)} entries for {len(given)} environments")
    factories: list[Callable[[], Any]] = []
    seen: set[int] = set()
    for make, arguments in zip(given, each, strict=True):
        if hasattr(make, "step") and hasattr(make, "reset") and not isinstance(make, type):
            if num_workers:
                raise ValueError("workers make their environments themselves: give functions that make them")
            if id(make) in seen:
                raise ValueError("the same environment was given twice")
            seen.add(id(make))
            if arguments:
                raise ValueError("create_env_kwargs are for functions that make environments, not for environments")
            factories.append(_Given(make))
        elif callable(make):
            factories.append(_Partial(make, dict(arguments)) if arguments else make)
        else:
            raise TypeError(f"create_env_fn must make environments, got {type(make).__qualname__}")
    return factories


class _Given:
    """Stands for the function that makes an environment where the environment itself was given."""

    def __init__(self, env: Any) -> None:
        self._env = env

    def __call__(self) -> Any:
        return self._env


class _Partial:
    """A function and its arguments, which pickles with cloudpickle."""

    def __init__(self, function: EnvFactory, arguments: dict[str, Any]) -> None:
        self._function = function
        self._arguments = arguments

    def __call__(self) -> Any:
        return self._function(**self._arguments)


def _was_shut_down() -> RuntimeError:
    return RuntimeError("the collector was shut down; make another one")


def _copy(policy: Any) -> Any:
    try:
        return copy.deepcopy(policy)
    except Exception as error:
        raise ValueError(
            f"the policy can't be copied ({error}), as it must be for weights to be used only once they are published; "
            "give a policy_factory"
        ) from error


def _check_shareable(layout: EnvLayout) -> None:
    for spec in (*layout.observation, *layout.action):
        if spec.dtype == object:
            raise ValueError(
                f"{show_key(spec.path)} is text, which processes can't share: collect such an environment in this "
                "process (num_workers=0)"
            )


def _initial_states(state_keys: StateKeys) -> TensorDict | None:
    if not isinstance(state_keys, Mapping):
        return None
    td = TensorDict({}, batch_size=[1])
    for key, value in state_keys.items():
        td.set(key, torch.as_tensor(value)[None])
    return td


def _zeros(specs: Sequence[ArraySpec]) -> TensorDict:
    td = TensorDict({}, batch_size=[])
    for spec in specs:
        td.set(spec.path, torch.from_numpy(np.zeros(spec.shape, spec.dtype)))
    return td


def _leaves(layout: EnvLayout, policy: PolicyLayout, next_observation: bool) -> tuple[ArraySpec, ...]:
    """What is stored of each step."""
    flag, number = np.dtype(np.bool_), np.dtype(np.int64)
    returned = (*(layout.observation if next_observation else ()), *layout.info)
    return (
        *layout.observation,
        *[state.spec for state in policy.states],
        *policy.action,
        *policy.outputs,
        ArraySpec((_VERSION_KEY,), (), number),
        ArraySpec(("is_init",), (1,), flag),
        *[ArraySpec(("next", *spec.path), spec.shape, spec.dtype) for spec in returned],
        ArraySpec(("next", "reward"), (1,), np.dtype(np.float32)),
        ArraySpec(("next", "terminated"), (1,), flag),
        ArraySpec(("next", "truncated"), (1,), flag),
        ArraySpec(("collector", "episode"), (), number),
        ArraySpec(("collector", "step"), (), number),
        ArraySpec(("collector", "random"), (), flag),
    )


def _count_non_finite(batch: TensorDictBase, steps: int) -> int:
    """How many steps have a reward or a next observation that is not finite."""
    returned = batch.get("next")
    found = {name: entry for name, entry in returned.items() if name != "info"}
    size = returned.batch_size
    if len(size) == 1 and "collector" in batch and batch.get(("collector", "mask")).ndim == 2:
        found["observation"] = batch.get("observation")
        size = torch.Size((*size, steps))
    bad: torch.Tensor | None = None
    for entry in found.values():
        for value in entry.values(True, True) if isinstance(entry, TensorDictBase) else (entry,):
            # A sum is finite unless an element is not, or all are huge: it takes a tenth of looking at each of them.
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not torch.isfinite(value.sum()):
                cells = value[:, -steps:] if len(size) == 2 else value
                one = ~torch.isfinite(cells).reshape(*size, -1).all(-1)
                bad = one if bad is None else bad | one
    return 0 if bad is None else int(bad.sum())
