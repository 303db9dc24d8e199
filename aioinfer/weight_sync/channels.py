"""What lies between a trainer and one worker: made once, handed to both, outliving each."""

from __future__ import annotations

from aioinfer.ipc.queue import DescriptorQueue
from aioinfer.weight_sync.transport import MPTransport

__all__ = ["Channel"]


class Channel:
    """The two queues of one worker. It pickles for a process that starts, like a ``multiprocessing.Queue``.

    Attributes:
        updates: weights, from the trainer. It holds one message at most: the trainer takes an unread one back.
        hellos: from the worker, which makes a line when it begins, see :mod:`aioinfer.weight_sync.lines`.
        transport: the wire format of the updates.
    """

    def __init__(self) -> None:
        self.updates = DescriptorQueue()
        self.hellos = DescriptorQueue()
        self.transport = MPTransport(self.updates)
