from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer.testing import GatedModel
from aioinfer.web.app import App, create_app
from aioinfer.web.limits import Limits
from aioinfer.web.sessions import Sessions
from tests.hosted import Gated, forked
from tests.web.hosting import hosted
from tests.web.robots import act, observation, pack, robot, served, until

SUPERSEDED = "a newer request of this session"
SIZE = len(pack(observation(0)))
VLLM_OMNI = "/v1/realtime/robot/openpi"


def tell(td: TensorDictBase) -> TensorDictBase:
    """A policy that tells what it got: the value of the state, whether the session starts, and its seed."""
    count = td.batch_size[0]
    seed = td.get("seed", None)
    columns = [
        td["state"][:, :1],
        td["is_init"].float(),
        torch.full((count, 1), -1.0) if seed is None else seed.float().reshape(count, 1),
    ]
    return TensorDict({"actions": torch.cat(columns, 1)}, [count])


def starts(reply: Any) -> bool:
    """Whether the policy was told that the session starts."""
    actions = reply["actions"] if isinstance(reply, dict) else reply
    return bool(actions[1])


def seed_of(reply: Any) -> int:
    return int(reply["actions"][2])


@asynccontextmanager
async def telling(**options: Any) -> AsyncIterator[tuple[App, str]]:
    async with served(tell, in_keys=["state", "is_init", "seed"], **options) as (app, url):
        yield app, url


# -- start, reset and seed -----------------------------------------------------------------------------------


async def test_the_first_request_of_a_connection_starts_its_session() -> None:
    async with telling() as (_, url):
        for _ in range(2):
            async with robot(url) as one:
                assert [starts(await one.ask(observation(1))) for _ in range(3)] == [True, False, False]


async def test_a_reset_starts_the_session_anew_and_seeds_it() -> None:
    async with telling() as (_, url), robot(url) as one:
        assert seed_of(await one.ask(observation(1))) == -1
        for seed in (7, np.int64(7), np.array([7], np.int32)):
            assert await one.ask({"endpoint": "reset", "seed": seed}) == "reset successful"
            replies = [await one.ask(observation(1)) for _ in range(2)]
            assert [starts(reply) for reply in replies] == [True, False]
            assert [seed_of(reply) for reply in replies] == [7, 7]
        assert seed_of(await one.ask(observation(1, seed=np.array([9])))) == 9
        assert await one.ask({"endpoint": "reset"}) == "reset successful"
        assert seed_of(await one.ask(observation(1))) == -1


@pytest.mark.parametrize("seed", ["7", 7.5, 2**63, True, [7], np.array([1, 2]), np.array(["7"])])
async def test_a_seed_that_is_no_integer_resets_nothing(seed: Any) -> None:
    async with telling() as (_, url), robot(url) as one:
        await one.ask(observation(1))
        assert (await one.ask({"endpoint": "reset", "seed": seed})) != "reset successful"
        assert not starts(await one.ask(observation(1)))


async def test_what_a_robot_says_itself_counts() -> None:
    async with telling() as (_, url), robot(url) as one:
        assert [starts(await one.ask(observation(1, is_init=np.array([i == 2])))) for i in range(3)] == [
            False,
            False,
            True,
        ]


async def test_a_session_starts_with_the_first_request_that_is_answered() -> None:
    async with telling() as (_, url), robot(url) as one:
        assert isinstance(await one.ask({"state": None}), str)
        assert isinstance(await one.ask({"stat": np.zeros(8)}), str)
        assert starts(await one.ask(observation(1)))
        assert not starts(await one.ask(observation(1)))


async def test_requests_that_are_under_way_together_start_it_once() -> None:
    async with telling() as (_, url), robot(url) as one:
        for value in range(5):
            await one.send(observation(value))
        assert [starts(await one.receive()) for _ in range(5)] == [True, False, False, False, False]


# -- sessions with a name ------------------------------------------------------------------------------------


async def test_connections_that_name_the_same_session_share_it() -> None:
    async with telling() as (app, url), robot(url) as one, robot(url) as other:
        assert starts(await one.ask(observation(1, session_id="a")))
        assert not starts(await other.ask(observation(1, session_id="a")))
        assert starts(await other.ask(observation(1, session_id="b")))
        assert not starts(await one.ask(observation(1)))  # it stays in its session
        assert await other.ask({"endpoint": "reset", "session_id": "a"}) == "reset successful"
        assert starts(await one.ask(observation(1)))
        assert len(app.front.sessions) == 2


async def test_a_session_goes_on_after_a_lost_connection() -> None:
    async with telling() as (_, url):
        async with robot(url) as one:
            assert starts(await one.ask(observation(1, session_id="a", endpoint="infer")))
        async with robot(url) as one:
            assert not starts(await one.ask(observation(1, session_id="a", endpoint="infer")))


async def test_numbers_and_arrays_of_one_number_name_sessions_too() -> None:
    async with telling() as (app, url), robot(url) as one:
        names = (7, np.int64(7), np.array([7]), "7", -7)
        assert [starts(await one.ask(observation(1, session_id=name))) for name in names] == [
            True,
            False,
            False,
            False,
            True,
        ]
        for name in (1.5, np.zeros(2), [1], b"a", "a" * 10_000):
            assert isinstance(await one.ask(observation(1, session_id=name)), str)
        assert len(app.front.sessions) == 2


async def test_on_the_path_of_vllm_omni_a_session_starts_when_a_robot_comes_to_it() -> None:
    async with telling() as (_, url), robot(url, VLLM_OMNI) as one:
        names = ("a", "a", None, "b", "a", None)
        asked = [await one.ask(observation(1, **({} if name is None else {"session_id": name}))) for name in names]
        assert [starts(reply) for reply in asked] == [True, False, False, True, True, False]


async def test_the_session_that_was_used_least_recently_is_forgotten() -> None:
    async with telling(limits=Limits(max_sessions=2)) as (app, url), robot(url) as one:
        for name in ("a", "b", "a", "c"):
            await one.ask(observation(1, session_id=name))
        assert len(app.front.sessions) == 2
        assert [starts(await one.ask(observation(1, session_id=name))) for name in ("a", "c", "b")] == [
            False,
            False,
            True,
        ]


def test_sessions_are_found_by_name() -> None:
    sessions = Sessions(2)
    first = sessions.find("a")
    assert sessions.find("a") is first
    sessions.find("b")
    sessions.find("a")
    sessions.find("c")
    assert sessions.find("a") is first
    assert len(sessions) == 2


# -- newest wins ---------------------------------------------------------------------------------------------


async def test_a_newer_request_takes_the_place_of_those_that_no_batch_has_taken() -> None:
    gate = GatedModel(act)
    async with served(gate, newest_wins=True) as (app, url), robot(url) as one, robot(url) as other:
        await other.send(observation(50))
        await until(gate.entered.is_set)
        for value in (1, 2, 3):
            await one.send(observation(value))
        for _ in (1, 2):
            assert SUPERSEDED in await one.receive()
        gate.open()
        one.check(await one.receive(), 3)
        other.check(await other.receive(), 50)
        assert gate.seen == {50, 3}
        assert app.front.stats.requests["openpi", "superseded"] == 2
        assert app.front.bytes_in_flight.bytes == 0


async def test_a_request_that_is_being_computed_is_answered_before_the_newer_one() -> None:
    gate = GatedModel(act)
    async with served(gate, newest_wins=True) as (_, url), robot(url) as one:
        await one.send(observation(1))
        await until(gate.entered.is_set)
        for value in (2, 3, 4):
            await one.send(observation(value))
        gate.open()
        one.check(await one.receive(), 1)
        for _ in (2, 3):
            assert SUPERSEDED in await one.receive()
        one.check(await one.receive(), 4)
        assert gate.seen == {1, 4}


async def test_a_newer_request_supersedes_those_of_its_session_on_other_connections() -> None:
    gate = GatedModel(act)
    async with (
        served(gate, newest_wins=True) as (app, url),
        robot(url) as one,
        robot(url) as two,
        robot(url) as other,
    ):
        await other.send(observation(50))
        await until(gate.entered.is_set)
        await one.send(observation(1, session_id="a"))
        await two.send(observation(2, session_id="b"))
        await until(lambda: app.front.bytes_in_flight.bytes > 3 * SIZE)
        await two.send(observation(3, session_id="a"))
        assert SUPERSEDED in await one.receive()
        gate.open()
        for socket, value in ((two, 2), (two, 3), (other, 50)):
            socket.check(await socket.receive(), value)
        assert gate.seen == {50, 2, 3}


async def test_a_malformed_request_supersedes_nothing() -> None:
    gate = GatedModel(act)
    async with served(gate, newest_wins=True) as (_, url), robot(url) as one, robot(url) as other:
        await other.send(observation(50))
        await until(gate.entered.is_set)
        await one.send(observation(1))
        await one.send({"state": None})
        await one.send({})
        gate.open()
        one.check(await one.receive(), 1)
        assert "tensor" in await one.receive()


async def test_the_request_that_supersedes_the_first_one_starts_the_session() -> None:
    gate = GatedModel(tell, key="state")
    options = {"in_keys": ["state", "is_init"], "newest_wins": True}
    async with served(gate, **options) as (_, url), robot(url) as one, robot(url) as other:
        await other.send(observation(50))
        await until(gate.entered.is_set)
        for value in (1, 2, 3):
            await one.send(observation(value))
        for _ in (1, 2):
            assert SUPERSEDED in await one.receive()
        gate.open()
        assert starts(await one.receive())
        assert not starts(await one.ask(observation(4)))


async def test_without_it_all_are_answered() -> None:
    gate = GatedModel(act)
    async with served(gate) as (_, url), robot(url) as one:
        for value in range(4):
            await one.send(observation(value))
        await until(gate.entered.is_set)
        gate.open()
        for value in range(4):
            one.check(await one.receive(), value)


async def test_where_batches_are_made_elsewhere_the_oldest_request_is_answered(tmp_path: Path) -> None:
    """Nobody knows there whether a batch has taken it, and a robot that never waits must get replies too."""
    gate = Gated(tmp_path)
    async with forked(gate) as server, hosted(create_app(server, newest_wins=True)) as url, robot(url) as one:
        await one.send({"observation": np.full(3, 1, np.float32)})
        await until(gate.entered.exists)
        for value in (2, 3, 4):
            await one.send({"observation": np.full(3, value, np.float32)})
        gate.gate.touch()
        replies = [await one.receive() for _ in range(4)]
    assert (replies[0]["action"] == 2).all()
    assert [SUPERSEDED in reply for reply in replies[1:3]] == [True, True]
    assert (replies[3]["action"] == 8).all()


async def test_a_connection_that_ends_cancels_its_own_requests_only() -> None:
    gate = GatedModel(act)
    async with served(gate) as (app, url), robot(url) as one:
        await one.send(observation(50))
        await until(gate.entered.is_set)
        await one.send(observation(1, session_id="a"))
        async with robot(url) as other:
            await other.send(observation(2, session_id="a"))
            await until(lambda: app.front.bytes_in_flight.bytes > 3 * SIZE)
        await until(lambda: app.front.stats.requests["openpi", "cancelled"] == 1)
        gate.open()
        one.check(await one.receive(), 50)
        one.check(await one.receive(), 1)
        assert gate.seen == {50, 1}
