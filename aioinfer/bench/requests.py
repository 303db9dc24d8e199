"""How callers make their requests: one TensorDict again and again, a fresh one for each, or an observation by name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from tensordict import TensorDict

from aioinfer.bench.workloads import RequestKind


def prepare(kind: RequestKind, request: TensorDict) -> Any:
    """What a caller has before the clock starts: the request, or its observation as a tensor or a numpy array."""
    if kind is RequestKind.REUSED:
        return request
    observation = request["observation"]
    return observation.numpy() if kind is RequestKind.ARRAY else observation


def blocking(kind: RequestKind, call: Callable[..., Any]) -> Callable[[Any], Any]:
    """A function that makes a request out of what :func:`prepare` returned, sends it, and returns the reply.

    Args:
        kind: how it makes the request.
        call: a blocking client.
    """

    def ask_afresh(observation: Any) -> Any:
        reply = call(TensorDict({"observation": observation}, batch_size=[]))
        _ = reply["action"]
        return reply

    def ask_by_name(observation: Any) -> Any:
        reply = call(observation=observation)
        _ = reply["action"]
        return reply

    if kind is RequestKind.REUSED:
        return call
    return ask_afresh if kind is RequestKind.FRESH else ask_by_name


def awaiting(kind: RequestKind, call: Callable[..., Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    """The same as :func:`blocking` with an awaitable client."""

    async def ask_afresh(observation: Any) -> Any:
        reply = await call(TensorDict({"observation": observation}, batch_size=[]))
        _ = reply["action"]
        return reply

    async def ask_by_name(observation: Any) -> Any:
        reply = await call(observation=observation)
        _ = reply["action"]
        return reply

    if kind is RequestKind.REUSED:
        return call
    return ask_afresh if kind is RequestKind.FRESH else ask_by_name
