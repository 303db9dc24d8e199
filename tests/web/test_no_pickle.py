from __future__ import annotations

import ast
import asyncio
import json
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

import aioinfer
from tests.limits import HANG
from tests.web.robots import pack, served

PACKAGE = Path(aioinfer.__file__).parent
FILES = sorted(file for part in ("web", "serve", "transports/network") for file in (PACKAGE / part).rglob("*.py"))
FORBIDDEN = {
    "pickle",
    "_pickle",
    "cloudpickle",
    "marshal",
    "shelve",
    "dill",
    "joblib",
    "multiprocessing.connection",
    "aioinfer.ipc.pickling",
}
PIPES = {
    "serve/loading.py": {"multiprocessing.connection", "aioinfer.ipc.pickling", "pickle"},  # the error of torch.load
    "serve/command.py": {"multiprocessing.connection", "aioinfer.ipc.pickling"},
}
"""Files that use some of them on the pipe between the command and the process that it has started."""


def imports_of(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names |= {f"{node.module}.{one.name}" for one in node.names} | {str(node.module)}
    return names


def unsafe_loads_of(tree: ast.AST) -> list[str]:
    """Calls of ``torch.load`` that may unpickle, and of ``numpy.load``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
            of = ast.unparse(node.func.value)
            safe = any(one.arg == "weights_only" and ast.unparse(one.value) == "True" for one in node.keywords)
            if of in ("np", "numpy") or (of == "torch" and not safe):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_the_network_imports_nothing_that_unpickles(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imports = imports_of(tree)
    found = {bad for bad in FORBIDDEN if any(name == bad or name.startswith(f"{bad}.") for name in imports)}
    assert found == PIPES.get(file.relative_to(PACKAGE).as_posix(), set())
    assert not imports & {"torch.load", "numpy.load"}
    assert not unsafe_loads_of(tree)


def test_the_search_finds_what_it_looks_for() -> None:
    assert len(FILES) > 20
    assert "pickle.loads" in imports_of(ast.parse("from pickle import loads"))
    assert unsafe_loads_of(ast.parse("torch.load(f); np.load(f); torch.load(f, weights_only=True)")) == [
        "torch.load(f)",
        "np.load(f)",
    ]


class Creates:
    """Whoever unpickles it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "created"


def pickles(target: Path) -> list[bytes]:
    return [
        pickle.dumps(what, protocol) for what in (Creates(target), {"a": Creates(target)}) for protocol in (0, 2, 5)
    ]


def test_these_pickles_create_a_file(target: Path) -> None:
    for one in pickles(target):
        made = pickle.loads(one)
        (made["a"] if isinstance(made, dict) else made).close()
        target.unlink()


async def test_a_pickle_over_http_is_an_error(target: Path) -> None:
    infer = "/v2/models/policy/infer"
    async with served() as (_, url), httpx.AsyncClient(base_url=url, timeout=HANG) as http:
        for bad in pickles(target):
            tensor = {"name": "state", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(bad)}}
            head = json.dumps({"inputs": [tensor]}).encode()
            length = {"Inference-Header-Content-Length": str(len(head))}
            for kind in ("application/json", "application/octet-stream", "application/x-pickle"):
                content_type = {"content-type": kind}
                for path in ("/act", infer, "/v2/models/policy/versions/1/infer"):
                    assert (await http.post(path, content=bad, headers=content_type)).status_code == 400
                assert (
                    await http.post(infer, content=head + bad, headers={**length, **content_type})
                ).status_code == 400
                only = {"Inference-Header-Content-Length": str(len(bad)), **content_type}
                assert (await http.post(infer, content=bad, headers=only)).status_code == 400
        for path in ("/", "/stats", "/metrics", "/healthz", "/livez", "/readyz", "/v2/models/policy"):
            assert (await http.post(path, content=bad)).status_code in (404, 405)
    assert not await asyncio.to_thread(target.exists)


@pytest.mark.parametrize("path", ["/", "/v1/realtime/robot/openpi", "/openpi/policy", "/v1/stream"])
async def test_a_pickle_over_a_websocket_is_an_error(target: Path, path: str) -> None:
    async with served() as (_, url):
        for bad in pickles(target):
            object_array = {b"__ndarray__": True, b"data": bad, b"dtype": "|O", b"shape": [1]}
            for message in (bad, pack({"state": bad}), pack({"state": object_array})):
                async with connect(url.replace("http", "ws") + path, compression=None, open_timeout=HANG) as socket:
                    await socket.recv()  # what the server says first
                    await socket.send(message)
                    answer: str | bytes = ""
                    with suppress(ConnectionClosed):
                        answer = await socket.recv()
                    assert isinstance(answer, str) or b"error" in answer
                    assert socket.close_code != 1000
    assert not await asyncio.to_thread(target.exists)
