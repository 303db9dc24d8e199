"""A headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Self

from websockets.asyncio.client import ClientConnection, connect

from tests.limits import HANG, IMPORTS

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """A tab.

    Args:
        socket: to the browser.

    Attributes:
        errors: what its code has raised, or has written to the console as errors.
        network_errors: what could not be loaded.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self.errors: list[str] = []
        self.network_errors: list[str] = []
        self._socket = socket
        self._numbers = count(1)
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session: str | None = None

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Self]:
        """Open it, empty, inside an ``async with`` block."""
        receiving = asyncio.create_task(self._receive())
        try:
            target = await self.call("Target.createTarget", url="about:blank")
            attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                await self.call(f"{domain}.enable")
            yield self
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        number = next(self._numbers)
        reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._replies[number] = reply
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        await self._socket.send(json.dumps(message))
        return await asyncio.wait_for(reply, HANG)

    async def resize(self, width: int, height: int) -> None:
        """Be a screen of this size, in pixels."""
        size = {"width": width, "height": height}
        await self.call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=width < 600)

    async def prefer(self, scheme: str) -> None:
        """Prefer ``light`` or ``dark`` colours."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def open(self, url: str) -> None:
        """Go there."""
        result = await self.call("Page.navigate", url=url)
        assert "errorText" not in result, result["errorText"]
        await self.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    async def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until an expression of JavaScript is true."""
        async with asyncio.timeout(HANG):
            while not await self.evaluate(expression):  # noqa: ASYNC110 - nothing tells when
                await asyncio.sleep(0.02)

    async def screenshot(self) -> bytes:
        """The whole page, as PNG."""
        result = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(result["data"])

    async def _receive(self) -> None:
        async for text in self._socket:
            message = json.loads(text)
            match message:
                case {"id": number, "result": result}:
                    self._replies.pop(number).set_result(result)
                case {"id": number, "error": error}:
                    self._replies.pop(number).set_exception(RuntimeError(error["message"]))
                case {"method": "Runtime.exceptionThrown", "params": {"exceptionDetails": details}}:
                    self.errors.append(json.dumps(details))
                case {"method": "Runtime.consoleAPICalled", "params": {"type": "error" | "warning", "args": written}}:
                    self.errors.append(json.dumps(written))
                case {"method": "Log.entryAdded", "params": {"entry": {"level": "error", "source": source} as entry}}:
                    (self.network_errors if source == "network" else self.errors).append(entry["text"])


@asynccontextmanager
async def browsing(profile: Path) -> AsyncIterator[Page]:
    """Run a browser inside an ``async with`` block.

    Args:
        profile: an empty folder that it may write to.
    """
    assert EXECUTABLE is not None
    options = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}", "--disable-gpu"]
    options += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += ["--disable-dev-shm-usage", "--hide-scrollbars", "--proxy-server=direct://"]
    if os.geteuid() == 0:
        options.append("--no-sandbox")
    with (profile / "stderr").open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            EXECUTABLE, *options, "about:blank", stdout=stderr, stderr=stderr, start_new_session=True
        )
    try:
        address = await _address(process, profile)
        async with connect(address, compression=None, max_size=None) as socket, Page(socket).opened() as page:
            yield page
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it and its children, which share its group
        await process.wait()


async def _address(process: asyncio.subprocess.Process, profile: Path) -> str:
    written = profile / "DevToolsActivePort"
    async with asyncio.timeout(IMPORTS):
        while not (written.exists() and written.read_text().count("\n")):
            assert process.returncode is None, f"the browser ended: {(profile / 'stderr').read_text()}"
            await asyncio.sleep(0.02)
    port, path = written.read_text().splitlines()[:2]
    return f"ws://127.0.0.1:{port}{path}"
