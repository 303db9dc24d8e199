"""Play CartPole in many tasks and threads at once, all on one server, and watch it."""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial

import torch

from aioinfer.demo.figures import Scoreboard
from aioinfer.demo.players import Player, play_in_task, play_in_thread
from aioinfer.demo.policies import HIDDEN, make_policy
from aioinfer.demo.views import View, live_view, plain_view, suits_live_view, summary
from aioinfer.errors import ServerClosedError
from aioinfer.server import InferenceServer
from aioinfer.transports.threads import ThreadingTransport

__all__ = ["add_arguments", "run"]

_INTERRUPTED = 128 + 2  # what a shell reports for a program that SIGINT ended
_PATIENCE = 2.0  # seconds that workers have for their last reply, before the server closes on them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``aioinfer demo``."""
    parser.add_argument("--envs", type=_count, default=64, help="environments in coroutines (default: %(default)s)")
    parser.add_argument("--threads", type=_count, default=8, help="environments in threads (default: %(default)s)")
    parser.add_argument("--seconds", type=_seconds, default=15.0, help="how long to play (default: %(default)g)")
    parser.add_argument(
        "--model", choices=list(HIDDEN), default="mlp", help="size of the policy (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the policy and the environments (default: %(default)s)")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="one line a second, no live view; the default where the output is no terminal",
    )
    parser.set_defaults(refuse=parser.error)


def _count(text: str) -> int:
    count = int(text) if text.isdecimal() else -1
    if count < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return count


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return seconds


def run(options: argparse.Namespace) -> int:
    """Run ``aioinfer demo``.

    Returns:
        The exit status: 0 after the full time, 130 after Ctrl-C, 1 without the extra ``demo`` or where the server
        closed early.

    Raises:
        SystemExit: there would be nobody to play.
        Exception: what a worker raised: its environment's error, or the model's.
    """
    if options.envs + options.threads == 0:
        options.refuse("argument --envs: must be at least 1 where --threads is 0")
    try:
        missing = _missing_extra()
        if missing is not None:
            print(f'the demo needs {missing}: pip install "aioinfer[demo]"', file=sys.stderr)
            return 1
        with _one_torch_thread():
            return asyncio.run(_demo(options))
    except KeyboardInterrupt:  # before the first frame, or a second one while the first was obeyed
        return _INTERRUPTED


def _missing_extra() -> str | None:
    try:
        import gymnasium  # noqa: F401
        import rich  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name in ("gymnasium", "rich"):
            return error.name
        raise
    return None


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    # A batch of some 70 rows through small layers gains nothing from torch's own threads, and handing the work to
    # them costs more than the work; they would also take the cores from the workers and their environments.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


async def _demo(options: argparse.Namespace) -> int:
    import gymnasium

    torch.manual_seed(options.seed)
    status, halt = 0, threading.Event()
    with ExitStack() as stack:  # left in the reverse order: no environment is closed under its worker
        players = [
            Player(stack.enter_context(closing(gymnasium.make("CartPole-v1"))), options.seed + index)
            for index in range(options.envs + options.threads)
        ]
        in_tasks, in_threads = players[: options.envs], players[options.envs :]
        pool = stack.enter_context(ThreadPoolExecutor(max(1, len(in_threads)), thread_name_prefix="aioinfer-demo"))
        async with InferenceServer(
            make_policy(options.model), ThreadingTransport(), max_batch_size=len(players)
        ) as server:
            board = Scoreboard(in_tasks, in_threads, stats=server.stats)
            client, task_client, loop = server.client(), server.async_client(), asyncio.get_running_loop()
            workers: list[asyncio.Future[None]] = [
                *[loop.create_task(play_in_task(player, task_client, halt=halt)) for player in in_tasks],
                *[
                    loop.run_in_executor(pool, partial(play_in_thread, player, client, halt=halt))
                    for player in in_threads
                ],
            ]
            for worker in workers:
                worker.add_done_callback(_take_note)
            try:
                with _view(options) as view:
                    await _watch(workers, board, view=view, seconds=options.seconds)
            except asyncio.CancelledError:  # Ctrl-C: asyncio.run cancels its main task, and nobody else does
                status = _INTERRUPTED
            except ServerClosedError as closed:
                print(f"the server closed early: {closed}", file=sys.stderr)
                status = 1
            finally:
                halt.set()
                # Their last replies first, so that no request is left to fail when the server closes.
                await asyncio.wait(workers, timeout=_PATIENCE)
            figures = board.whole()
    print(f"summary of {figures.elapsed:.1f} s: {_title(options)}", summary(figures), sep="\n", flush=True)
    return status


def _title(options: argparse.Namespace) -> str:
    tasks, threads = _number(options.envs, "task"), _number(options.threads, "thread")
    return f"CartPole-v1, {tasks} and {threads} on one server, model {options.model}"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _view(options: argparse.Namespace) -> AbstractContextManager[View]:
    if options.plain or not suits_live_view():
        return plain_view(f"{_title(options)}: {options.seconds:g} s")
    return live_view(_title(options), seconds=options.seconds)


async def _watch(workers: Sequence[asyncio.Future[None]], board: Scoreboard, *, view: View, seconds: float) -> None:
    """Show how it goes until the time is up; raise what a worker raises."""
    end = time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0:
        done, _ = await asyncio.wait(workers, timeout=min(view.interval, left), return_when=asyncio.FIRST_EXCEPTION)
        for worker in done:
            worker.result()
        view.show(board.recent())


def _take_note(worker: asyncio.Future[None]) -> None:
    # Else asyncio logs each error but the one that ends the demo.
    if not worker.cancelled():
        worker.exception()
