"""The trainer: a process of its own that asks for a batch, learns from it, publishes the weights, and asks again."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import pickle
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer.demo.policy import Actor, make_policy
from aioinfer.demo.ppo import LEARNED_FROM, PPO
from aioinfer.errors import PeerDiedError
from aioinfer.weight_sync import MultiProcessWeightSyncScheme

# The messages of the trainer: a version that it has published, and the time, by the clock of this machine.
_NOTICE = struct.Struct("<qd")
_END_TIMEOUT = 2.0  # seconds that the trainer has to end before it is killed
_DEATH_TIMEOUT = 20.0  # seconds for one that has died to be gone


def _train(scheme: MultiProcessWeightSyncScheme, channel: socket.socket, seed: int) -> None:
    """Train until EOF on the channel, in the other process."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    actor = Actor()
    learner = PPO(actor)
    scheme.init_on_sender(model_id="policy", model=make_policy(actor))
    scheme.connect(version=1)
    try:
        with channel, channel.makefile("rb") as batches:
            for version in itertools.count(1):
                channel.sendall(_NOTICE.pack(version, time.monotonic()))
                learner.update(TensorDict.from_dict(pickle.load(batches), batch_dims=2))
                scheme.send(version=version + 1)
    except (EOFError, pickle.UnpicklingError, ConnectionError):
        pass
    finally:
        scheme.shutdown()


class TrainerProcess:
    """The trainer's process, and this end of the channel to it. Starts at once; one thread uses it.

    Args:
        scheme: publishes the weights.
        seed: of its weights, and of the order of the steps of a batch.
    """

    def __init__(self, scheme: MultiProcessWeightSyncScheme, seed: int) -> None:
        self._offered: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1)
        self._channel, far = socket.socketpair()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_train, args=(scheme, far, seed), name="aioinfer-trainer", daemon=True
        )
        with far, _interrupts_held_back():
            self._process.start()

    def offer(self, batch: TensorDictBase) -> None:
        """Copy a batch for the trainer, in place of one that it has not asked for yet. Event loop only.

        So nobody waits for the trainer, and it never learns from a batch if there is a newer one.
        """
        if self._offered.full():
            self._offered.get_nowait()
        self._offered.put_nowait(pickle.dumps(batch.select(*LEARNED_FROM).numpy(), pickle.HIGHEST_PROTOCOL))

    async def feed(self, published: Callable[[int, float], None]) -> None:
        """Send the latest batch each time that the trainer asks for one; never blocks the event loop.

        Args:
            published: called with a version and the time, by ``time.monotonic``, at which it was published.

        Raises:
            PeerDiedError: the trainer is gone.
        """
        reader, writer = await asyncio.open_connection(sock=self._channel)
        try:
            while True:
                published(*_NOTICE.unpack(await reader.readexactly(_NOTICE.size)))
                writer.write(await self._offered.get())
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            # Its end of the channel closes a moment before the process is gone.
            await asyncio.to_thread(self._process.join, _DEATH_TIMEOUT)
            raise PeerDiedError(f"the trainer died with exit code {self._process.exitcode}") from None
        finally:
            writer.transport.abort()  # a trainer that ends reads no more

    def close(self) -> None:
        """End the process, if it has not ended."""
        self._channel.close()
        self._process.join(_END_TIMEOUT)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    # The trainer inherits the mask: Ctrl-C reaches this process only, which then ends the trainer.
    resource_tracker.ensure_running()  # else the start does it, and lets interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
