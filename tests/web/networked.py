"""Servers whose callers reach them over a network: an app under uvicorn, on an event loop in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from anyio.from_thread import start_blocking_portal

from aioinfer import InferenceServer, connect
from aioinfer.testing import Callers
from aioinfer.web import create_app
from tests.web.hosting import hosted


@contextmanager
def networked(server: Any, **options: Any) -> Iterator[str]:
    """Serve the app of a server, which runs or not; gives its URL."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(hosted(create_app(server, **options), lifespan="off")) as url,
    ):
        yield url.replace("http", "ws", 1)


def over_network(kind: Callable[[Any], Callers]) -> Callable[[InferenceServer], AbstractContextManager[Callers]]:
    """Callers of one kind, each with a client of ``connect("ws://...")``."""

    @contextmanager
    def callers(server: InferenceServer) -> Iterator[Callers]:
        with networked(server) as url, connect(url) as remote, kind(remote) as made:
            yield made

    return callers
