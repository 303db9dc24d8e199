from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule

from aioinfer import InferenceServer, ProcessSlotTransport, ThreadingTransport, connect
from aioinfer.errors import InvalidRequestError, NoFreeSlotError, ServerNotRunningError
from aioinfer.testing import GatedModel, double, request
from aioinfer.web.backend import Backend, PendingReply
from tests.limits import HANG
from tests.web.robots import until


def ask(backend: Backend, value: float) -> PendingReply:
    return backend.submit({"observation": np.full(3, value, np.float32)}, time.perf_counter())


async def test_a_client_that_has_found_no_slot_is_not_asked_again() -> None:
    model = GatedModel()
    transport = ProcessSlotTransport(request(0), double(request(0)), num_slots=2)
    with InferenceServer(model, transport) as server, await asyncio.to_thread(connect, server.address) as remote:
        backend = Backend(remote)
        pending = [ask(backend, value) for value in (1.0, 2.0, 3.0)]
        await until(lambda: any(one.future.done() for one in pending))
        model.open()
        async with asyncio.timeout(HANG):
            outcomes = await asyncio.gather(*[one.reply() for one in pending], return_exceptions=True)
            assert [type(one) for one in outcomes if isinstance(one, BaseException)] == [NoFreeSlotError]
            for one in pending:
                backend.finish(one)
            for value in (4.0, 5.0):
                again = [ask(backend, value), ask(backend, value)]
                for one in again:
                    assert (await one.reply())["action"][0] == 2 * value
                    backend.finish(one)
        backend.close()


async def test_a_server_that_does_not_run_is_not_asked() -> None:
    server = InferenceServer(double, ThreadingTransport())
    backend = Backend(server)
    with pytest.raises(ServerNotRunningError):
        ask(backend, 1.0)
    async with server:
        assert (await ask(backend, 1.0).reply())["action"][0] == 2.0
    with pytest.raises(ServerNotRunningError):
        ask(backend, 1.0)


@pytest.mark.parametrize("deadline", [0.0, -1.0, float("nan")])
def test_the_deadline_of_an_app_is_above_0(deadline: float) -> None:
    with pytest.raises(ValueError, match="deadline"):
        Backend(InferenceServer(double, ThreadingTransport()), deadline=deadline)


# -- what makes a request ----------------------------------------------------------------------------------


def tell(td: TensorDictBase) -> TensorDictBase:
    """A policy that tells the names of what it got, and the text in it."""
    names = sorted(name if isinstance(name, str) else ".".join(name) for name in td.keys(True, True))
    reply = TensorDict({"count": torch.ones(td.batch_size)}, td.batch_size)
    reply.set_non_tensor("names", " ".join(names))
    if "prompt" in td:
        reply.set_non_tensor("prompt", td["prompt"])
    return reply


async def names_in(backend: Backend, entries: dict[str, Any]) -> str:
    async with asyncio.timeout(HANG):
        reply = await backend.submit(entries, time.perf_counter()).reply()
    return str(reply["names"])


MESSAGE: dict[str, Any] = {"a": np.zeros(2), "b": {"c": np.zeros(2), "d": np.ones(3), "e": "text"}, "f": "text"}


@pytest.mark.parametrize(
    ("in_keys", "names", "roots"),
    [
        (["a"], "a", {"a"}),
        ([("a",), ("b", "c")], "a b.c", {"a", "b"}),
        ([["b", "c"], ["b", "d"]], "b.c b.d", {"b"}),
        (["a", "absent", ("b", "absent"), ("b", "d")], "a b.d", {"a", "absent", "b"}),
    ],
)
async def test_in_keys_choose_entries_also_nested_ones(in_keys: Any, names: str, roots: set[str]) -> None:
    async with InferenceServer(tell, ThreadingTransport()) as server:
        backend = Backend(server, in_keys=in_keys)
        assert set(backend.in_keys or ()) == roots
        assert await names_in(backend, MESSAGE) == names


async def test_all_entries_are_chosen_where_in_keys_are_not_known() -> None:
    async with InferenceServer(tell, ThreadingTransport()) as server:
        backend = Backend(server)
        assert backend.in_keys is None
        assert await names_in(backend, {"a": np.zeros(2), "b": {"c": np.zeros(2)}}) == "a b.c"


async def test_a_module_tells_its_in_keys() -> None:
    module = TensorDictModule(lambda a, c: a + c, in_keys=["a", ("b", "c")], out_keys=["sum"])
    async with InferenceServer(module, ThreadingTransport()) as server:
        backend = Backend(server)
        assert set(backend.in_keys or ()) == {"a", "b"}
        pending = backend.submit(MESSAGE, time.perf_counter())
        assert (await pending.reply())["sum"].shape == (2,)


@pytest.mark.parametrize("entries", [{"prompt": "pick it"}, {"prompt": "pick it", "a": np.zeros(2)}])
async def test_texts_reach_the_policy(entries: dict[str, Any]) -> None:
    async with InferenceServer(tell, ThreadingTransport(), max_batch_size=1) as server:
        pending = Backend(server).submit(entries, time.perf_counter())
        async with asyncio.timeout(HANG):
            assert "pick it" in str((await pending.reply())["prompt"])


@pytest.mark.parametrize("entries", [{}, {"a": object()}, {"a": [[1], [1, 2]]}, {"b": {"e": "text"}}, {1: 2.0}, [1.0]])
async def test_what_makes_no_request_is_refused(entries: Any) -> None:
    async with InferenceServer(tell, ThreadingTransport()) as server:
        with pytest.raises(InvalidRequestError):
            Backend(server).submit(entries, time.perf_counter())


def test_in_keys_are_a_sequence() -> None:
    with pytest.raises(TypeError, match="in_keys"):
        Backend(InferenceServer(tell, ThreadingTransport()), in_keys="state")
