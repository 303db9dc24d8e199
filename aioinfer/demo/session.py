"""One run of the demo: a collector and a trainer around one server, until the goal is reached or the time is up.

The main thread runs the event loop, which passes batches on and updates the view. Threads of the collector step the
environments, the model thread belongs to the server, and the trainer is another process.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial

import torch
from tensordict.nn import TensorDictModule

from aioinfer.collectors import AsyncBatchedCollector
from aioinfer.demo.learning_curve import GOAL, WINDOW, LearningCurve, save_plot
from aioinfer.demo.metrics import Metrics, MetricsReader
from aioinfer.demo.policy import Actor, make_policy
from aioinfer.demo.trainer import TrainerProcess
from aioinfer.demo.views import View, live_view, plain_view, suits_live_view, summary
from aioinfer.errors import PeerDiedError, ServerClosedError
from aioinfer.interrupts import INTERRUPTED
from aioinfer.server import InferenceServer
from aioinfer.transports.local import ThreadingTransport
from aioinfer.weight_sync import MultiProcessWeightSyncScheme

_ENVS = 32
_TITLE = f"CartPole-v1, {_ENVS} environments on one server, a trainer in another process"


def learn(options: argparse.Namespace) -> int:
    """Learn until the goal is reached or the time is up, and save curve and weights; return the exit status."""
    torch.manual_seed(options.seed)
    policy, scheme = make_policy(Actor()), MultiProcessWeightSyncScheme(sync=False, num_workers=1)
    with _one_torch_thread(), closing(TrainerProcess(scheme, options.seed)) as trainer:
        status, metrics, curve = asyncio.run(_run(options, policy, scheme, trainer))
    print(f"summary of {metrics.elapsed:.1f} s: {_TITLE}", summary(metrics), sep="\n", flush=True)
    if status != INTERRUPTED:
        _save(policy, curve, options)
        _print_result(metrics, learned=status == 0)
    return status


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    # A batch of 32 rows through small layers gains nothing from torch's own threads, and handing the work to them
    # costs more than the work; they would also take the cores from the environments and the trainer.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _save(policy: TensorDictModule, curve: LearningCurve, options: argparse.Namespace) -> None:
    picture, weights = options.out.resolve() / "learning_curve.png", options.out.resolve() / "policy.pt"
    save_plot(curve, picture, title=f"{_TITLE}, seed {options.seed}")
    torch.save(policy.state_dict(), weights)
    print(f"learning curve: {picture}", f"weights: {weights}", sep="\n", flush=True)


def _print_result(metrics: Metrics, *, learned: bool) -> None:
    episodes, average = min(metrics.episodes, WINDOW), metrics.average_return
    found = f"the latest {episodes} episodes returned {average:.1f} on average" if episodes else "no episode has ended"
    result = f"in {metrics.elapsed:.1f} s: {found}"
    if learned:
        print(f"learned {result}", flush=True)
    else:
        print(f"not learned {result}, the goal is {GOAL:g}", file=sys.stderr)


async def _run(
    options: argparse.Namespace,
    policy: TensorDictModule,
    scheme: MultiProcessWeightSyncScheme,
    trainer: TrainerProcess,
) -> tuple[int, Metrics, LearningCurve]:
    import gymnasium

    curve = LearningCurve()
    async with InferenceServer(policy, ThreadingTransport(), max_batch_size=_ENVS, weight_sync=scheme) as server:
        reader = MetricsReader(curve, server=server)
        try:
            async with AsyncBatchedCollector(
                partial(gymnasium.make, "CartPole-v1"),
                server=server,
                num_envs=_ENVS,
                seed=options.seed,
                restarts=None,  # a CartPole that fails would fail again
                min_envs=_ENVS,
            ) as collector:
                tasks = [
                    asyncio.create_task(_collect(collector, curve, trainer)),
                    asyncio.create_task(trainer.feed(reader.publish)),
                ]
                try:
                    with _view(options) as view:
                        await _watch(tasks, curve, reader, view=view, seconds=options.seconds)
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
            status = 0 if curve.learned else 1
        except asyncio.CancelledError:  # Ctrl-C: asyncio.run cancels its main task, and no other code does
            status = INTERRUPTED
        except PeerDiedError as error:
            print(error, file=sys.stderr)
            status = 1
        except ServerClosedError as error:
            print(f"the server closed early: {error}", file=sys.stderr)
            status = 1
        return status, reader.whole(), curve


async def _collect(collector: AsyncBatchedCollector, curve: LearningCurve, trainer: TrainerProcess) -> None:
    """Read batches until cancelled, so that environments never wait for the trainer."""
    async for batch in collector:
        curve.add_batch(batch)
        trainer.offer(batch)


def _view(options: argparse.Namespace) -> AbstractContextManager[View]:
    if options.plain or not suits_live_view():
        return plain_view(f"{_TITLE}: {options.seconds:g} s at most")
    return live_view(_TITLE, seconds=options.seconds)


async def _watch(
    tasks: Sequence[asyncio.Task[None]], curve: LearningCurve, reader: MetricsReader, *, view: View, seconds: float
) -> None:
    """Show the metrics until the goal is reached or the time is up; raise the error of a task."""
    goal = asyncio.create_task(curve.goal.wait())
    try:
        while not goal.done() and (left := seconds - curve.elapsed) > 0:
            timeout = min(view.interval, left)
            done, _ = await asyncio.wait([*tasks, goal], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            view.show(reader.recent())
    finally:
        goal.cancel()
