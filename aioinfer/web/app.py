"""The app: which path is served by what, and what holds for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from starlette._utils import get_route_path
from starlette.exceptions import HTTPException
from starlette.routing import Router

from aioinfer.batching import Caller
from aioinfer.client import AsyncInferenceClient, ClientMaker
from aioinfer.web.access import Access, Refusal
from aioinfer.web.act import ActEndpoint
from aioinfer.web.arrays import packb
from aioinfer.web.asgi import Disconnected, Headers, Receive, Scope, Send, headers_of
from aioinfer.web.backend import Backend
from aioinfer.web.exchange import Exchange, Exchanges, Respond
from aioinfer.web.front import Front
from aioinfer.web.http import JSON, InferEndpoint, respond_failure, respond_json
from aioinfer.web.limits import Limits
from aioinfer.web.metrics import metrics_routes
from aioinfer.web.monitor import Monitor
from aioinfer.web.open_inference import OpenInferenceEndpoint, open_inference_routes
from aioinfer.web.openpi import OPENPI, VLLM_OMNI, RobotSession
from aioinfer.web.plain_requests import PlainRequests
from aioinfer.web.probes import probe_routes
from aioinfer.web.status import status_routes
from aioinfer.web.stream import StreamSession
from aioinfer.web.websocket import GOING_AWAY, WebSocketConnection, WebSocketSession

__all__ = ["App", "create_app"]

_VLLM_OMNI = "/v1/realtime/robot/openpi"
_STREAM = "/v1/stream"
_OPEN_PATHS = {"/", "/healthz", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready"}
"""Need no token: probes, and the status page, which has no figures in itself."""


class App:
    """An ASGI app; see :func:`create_app`.

    Attributes:
        front: what its protocols share.
    """

    def __init__(self, front: Front, registry: CollectorRegistry | None) -> None:
        self.front = front
        self._monitor = Monitor(front)
        self._greeting = packb(dict(front.metadata))
        infer = OpenInferenceEndpoint(front)
        self._infer_endpoints: dict[str, InferEndpoint[Any]] = {
            "/act": ActEndpoint(front),
            f"/v2/models/{front.name}/infer": infer,
            f"/v2/models/{front.name}/versions/1/infer": infer,
        }
        self._raw_endpoints = {path.encode(): endpoint for path, endpoint in self._infer_endpoints.items()}
        self._router = Router(
            [
                *probe_routes(self._monitor),
                *open_inference_routes(self._monitor, infer),
                *metrics_routes(self._monitor, registry),
                *status_routes(self._monitor),
            ],
            redirect_slashes=False,
        )
        self._plain_requests = PlainRequests(front)
        self._exchanges = Exchanges(front, self._plain_requests, self._end_request)
        self._sessions: set[WebSocketSession] = set()
        self._requests = 0
        self._idle = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, connection, or lifespan."""
        kind = scope["type"]
        if kind == "lifespan":
            await self._live(receive, send)
        elif kind == "websocket":
            await self._serve_websocket(scope, receive, send)
        else:
            await self._serve_http(scope, receive, send)

    async def _serve_http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, headers = get_route_path(scope), headers_of(scope)
        self._requests += 1
        try:
            self._check(headers, path)
            endpoint = self._infer_endpoints.get(path)
            if endpoint is None:
                # With an app in its scope, the router raises what it would tell a caller itself.
                await self._router({**scope, "app": self}, receive, send)
            elif scope["method"] == "POST":  # past the router: these are most requests
                await endpoint.serve(headers, receive, send)
            else:
                raise HTTPException(405, headers={"Allow": "POST"})
        except HTTPException as error:
            more = [(name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()]
            await respond_json(send, error.status_code, {"error": error.detail}, (JSON, *more))
        except Refusal as refusal:
            self.front.stats.refuse(refusal)
            await respond_failure(send, self.front.failure_of(refusal))
        finally:
            self._end_request()

    def takes_whole(self, path: bytes) -> bool:
        """Whether :meth:`answer` serves ``POST`` requests of this path."""
        return path in self._raw_endpoints

    def answer(self, path: bytes, headers: Headers, body: bytes, caller: Caller, respond: Respond) -> Exchange | None:
        """Serve a ``POST`` request that has come whole, for servers of HTTP that need no messages of ASGI for it.

        Args:
            path: one that :meth:`takes_whole`.
            headers: of the request; it has no ``Content-Encoding``.
            body: of the request.
            caller: the connection.
            respond: sends the response; see :meth:`Exchanges.serve`.

        Returns:
            For :meth:`cancel`; ``None``: the request may not be made.
        """
        self._requests += 1
        try:
            self.front.access.check_page(headers)
            self.front.access.check_token(headers)
        except Refusal as refusal:
            self.front.stats.refuse(refusal)
            self._exchanges.refuse(respond, refusal)
            return None
        return self._exchanges.serve(self._raw_endpoints[path], headers, body, caller, respond)

    def cancel(self, exchange: Exchange) -> None:
        """The caller of a request is gone; see :meth:`answer`."""
        self._exchanges.cancel(exchange)

    def _end_request(self) -> None:
        self._requests -= 1
        if not self._requests:
            self._idle.set()

    def _check(self, headers: Headers, path: str) -> None:
        self.front.access.check_page(headers)
        if path not in _OPEN_PATHS:
            self.front.access.check_token(headers)

    async def _serve_websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = get_route_path(scope)
        front, limits = self.front, self.front.limits
        connection = WebSocketConnection(
            scope, receive, send, max_message_size=limits.max_message_size, stall_timeout=limits.stall_timeout
        )
        try:
            front.access.check_page(headers_of(scope))
            front.access.check_token(headers_of(scope))
            if front.draining or len(self._sessions) >= limits.max_connections:
                raise Refusal(503, front.draining or f"{limits.max_connections} connections are open already")
        except Refusal as refusal:
            front.stats.refuse(refusal)
            await connection.refuse(front.failure_of(refusal))
            return
        session: WebSocketSession
        if path == _STREAM:
            session = StreamSession(connection, front)
        else:
            dialect = VLLM_OMNI if path == _VLLM_OMNI else OPENPI
            session = RobotSession(connection, front, self._plain_requests, self._greeting, dialect)
        self._sessions.add(session)
        try:
            with front.stats.connected(session.protocol):
                await session.run()
        except Disconnected:
            pass
        finally:
            self._sessions.discard(session)
            connection.release()

    async def drain(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109
        """Answer what has been asked, and close connections: with 1001 (going away), each after its last reply.

        From then on the app is not ready, and refuses requests. Idempotent.

        Args:
            timeout: seconds to wait for replies, after which connections are closed all the same; ``None`` waits for
                all of them.

        Returns:
            Whether all requests were answered.
        """
        self.front.draining = "the server is shutting down"
        try:
            async with asyncio.timeout(timeout):
                await asyncio.gather(*[session.drain() for session in self._sessions], self._until_idle())
        except TimeoutError:
            sessions = list(self._sessions)
            await asyncio.gather(*[one.connection.close(GOING_AWAY, self.front.draining) for one in sessions])
            return False
        return True

    def close(self) -> None:
        """Free what the app itself holds: its clients of the server, and tasks. Idempotent; the last call."""
        self._monitor.close()
        self.front.backend.close()

    async def _until_idle(self) -> None:
        while self._requests:
            self._idle.clear()
            await self._idle.wait()

    async def _live(self, receive: Receive, send: Send) -> None:
        """Start the server with the app, and end it with the app, unless it runs already."""
        started = False
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    started = await self.front.backend.start()
                except Exception as error:
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    return
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.drain()
                if started:
                    await self.front.backend.stop()
                self.close()
                await send({"type": "lifespan.shutdown.complete"})
                return


def create_app(
    server: ClientMaker | AsyncInferenceClient,
    *,
    name: str = "policy",
    metadata: Mapping[str, Any] | None = None,
    in_keys: Sequence[str] | None = None,
    deadline: float | None = None,
    newest_wins: bool = False,
    tokens: Sequence[str] = (),
    hosts: Sequence[str] | None = None,
    origins: Sequence[str] = (),
    limits: Limits | None = None,
    registry: CollectorRegistry | None = None,
    debug: bool = False,
) -> App:
    """Make an ASGI app that serves a policy: to robots, over HTTP, to clients of ``connect("ws://...")``, with metrics.

    Run it with an ASGI server such as uvicorn, or mount it in another app, under a prefix if you like. Where it runs
    alone, it starts the server and ends it; mounted, it uses the server that runs. All callers share one batch, with
    each other and with whoever else asks this server.

    Args:
        server: an :class:`InferenceServer`, a :class:`ProcessInferenceServer`, what :func:`connect` returns, or an
            awaitable client of any of them.
        name: of the policy, in ``/v2/models/{name}`` and in metrics.
        metadata: what robots get as their first message; by default the attribute ``metadata`` of the policy, if it
            has one.
        in_keys: the entries of a message that make a request; others are left out. By default those that the policy
            reads, where they are known; otherwise all.
        deadline: seconds from the arrival of a request to its reply, where the request names none; what can't be
            answered in time is not computed.
        newest_wins: whether a request of a session takes the place of those of it that have no reply yet.
        tokens: of which callers need one: ``Authorization: Bearer <token>``, or ``Api-Key <token>``. Probes and the
            status page need none. Without tokens, nobody needs one.
        hosts: names by which this server may be asked, beside IP addresses and ``localhost``; ``None``: any where there
            are tokens, otherwise no others.
        origins: of web pages that may ask, ``"https://example.org"``, beside pages of this server.
        limits: of messages, connections and time.
        registry: of prometheus_client, takes the metrics, and ``GET /metrics`` has all that is in it; by default one
            of this app's own.
        debug: whether errors that callers get have tracebacks.

    Raises:
        TypeError: ``server`` is nothing of that kind, or messages can't carry the metadata.
        ValueError: ``registry`` has the metrics of another app already.
    """
    backend = Backend(server, in_keys=in_keys, deadline=deadline)
    if metadata is None:
        metadata = getattr(getattr(server, "model", None), "metadata", None)
    front = Front(
        backend,
        Access(tokens, () if hosts is None and not tokens else hosts, origins),
        Limits() if limits is None else limits,
        name=name,
        metadata=metadata if isinstance(metadata, Mapping) else {},
        newest_wins=newest_wins,
        debug=debug,
    )
    return App(front, registry)
