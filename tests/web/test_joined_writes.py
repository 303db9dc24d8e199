"""The head and the body of a response leave together, and nothing is left behind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("uvicorn")

from aioinfer.serve.joined_writes import JoiningTransport


class RecordingTransport(asyncio.Transport):
    """Notes what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[Any] = []

    def write(self, data: Any) -> None:
        self.done.append(data)

    def close(self) -> None:
        self.done.append("closed")


async def test_two_writes_of_a_tick_are_one_and_a_single_one_leaves_at_its_end() -> None:
    recorded = RecordingTransport()
    joining = JoiningTransport(recorded, asyncio.get_running_loop())
    joining.write(b"head")
    assert recorded.done == []
    joining.write(b"body")
    assert recorded.done == [b"headbody"]
    joining.write(b"chunk")
    await asyncio.sleep(0)
    assert recorded.done == [b"headbody", b"chunk"]


async def test_what_is_written_leaves_before_the_connection_is_closed() -> None:
    recorded = RecordingTransport()
    joining = JoiningTransport(recorded, asyncio.get_running_loop())
    joining.write(b"bye")
    joining.close()
    assert recorded.done == [b"bye", "closed"]
    await asyncio.sleep(0)
    assert recorded.done == [b"bye", "closed"]
