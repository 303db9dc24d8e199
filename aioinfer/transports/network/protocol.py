"""What a client process and a server elsewhere say to each other, each message as ``messages.py`` writes it.

The server speaks first: ``protocol``, ``policy``, ``max_message_size`` and ``max_pending``. Then, in any order:

=========  =================================================================================================
from       header
=========  =================================================================================================
client     ``cancelled``: numbers of requests that nobody waits for any more. ``refused``: how many requests the client
           has refused itself, to be counted. For each group: ``numbers``, of the requests; ``callers``, of each the
           number of who makes one after the other, 0 if nobody does; ``mode``, the exploration mode; ``wait``, whether
           they wait for space where the queue is full; ``deadline``, seconds from receipt or ``None``.
server     ``errors``: for each request that failed its number, and a ``WireError``. For each group of replies:
           ``numbers``. ``malformed``: why a message was not understood of which not even the numbers are known.
=========  =================================================================================================

The numbers of requests ascend, and each is used once on a connection. All requests of a message that are in its groups
are pending in the order of their numbers.
"""

from __future__ import annotations

from aioinfer.interaction_type import INHERIT, MODES, Mode

__all__ = ["MODES_BY_NAME", "MODE_NAMES", "PROTOCOL", "STREAM_PATH"]

PROTOCOL = 1
STREAM_PATH = "/v1/stream"
"""Of the WebSocket, below the prefix of the app."""


def _name(mode: Mode) -> str:
    if mode is INHERIT:
        return "inherit"
    return "none" if mode is None else mode.name.lower()


MODE_NAMES = tuple(map(_name, MODES))
"""By which modes travel: their codes may be others where another version of tensordict is installed."""
MODES_BY_NAME: dict[str, Mode] = dict(zip(MODE_NAMES, MODES, strict=True))
