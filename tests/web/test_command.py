"""``aioinfer serve``: from its options to its end."""

from __future__ import annotations

import argparse
import asyncio
import base64
import importlib.util
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path, PosixPath
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("msgpack")

import httpx
import torch
import websockets.asyncio.client as websocket
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from websockets.exceptions import ConnectionClosed, InvalidStatus

import aioinfer
from aioinfer.serve import add_arguments
from aioinfer.serve.command import Service
from aioinfer.serve.listener import AddressError, bind, bind_unix
from aioinfer.serve.settings import UsageError, read_settings, read_tokens
from aioinfer.web.arrays import packb, unpackb
from tests.limits import HANG
from tests.programs import Program, running
from tests.web.listening import connect, holds, listening

PROGRAM = Path(__file__).with_name("serve_program.py")
EXAMPLE = {"observation": [1.0, 2.0, 3.0]}
REPLY = {"action": [2.0, 4.0, 6.0]}


class Double(nn.Module):
    """``action`` is twice the ``observation``, once its gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        self.entered.set()
        assert self.gate.wait(HANG)
        return observation * 2


@pytest.fixture
def policies() -> Iterator[Any]:
    """A module, of the name ``policies``, whose ``make`` makes a policy once ``may_load`` is set."""
    module: Any = ModuleType("policies")
    module.may_load = threading.Event()
    module.may_load.set()
    module.double = Double()

    def make() -> TensorDictModule:
        assert module.may_load.wait(HANG)
        policy = TensorDictModule(module.double, in_keys=["observation"], out_keys=["action"])
        policy.metadata = {"pose": [1, 2]}  # type: ignore[assignment]
        policy.request_spec = TensorDict({"observation": torch.zeros(3)})
        return policy

    module.make, module.plain = make, module.double
    sys.modules["policies"] = module
    yield module
    module.may_load.set()
    module.double.gate.set()
    del sys.modules["policies"]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.touch(0o600)
    path.write_text("# ours\r\n\r\n \t\r\n  # theirs\r\n \tfrom-a-file \r\n")
    return path


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["policies:make", "--port", "0", *arguments])  # the last one counts


class Served:
    """A service that runs on the test's own event loop."""

    def __init__(self, service: Service, sockets: list[socket.socket], lines: list[str]) -> None:
        self.service = service
        self.lines = lines
        self.port = 0 if sockets[0].family == socket.AF_UNIX else sockets[0].getsockname()[1]
        self.running = asyncio.create_task(service.run())

    async def ready(self) -> None:
        waiting = asyncio.create_task(self.service.ready.wait())
        await asyncio.wait([waiting, self.running], return_when=asyncio.FIRST_COMPLETED, timeout=HANG)
        waiting.cancel()
        assert self.service.ready.is_set(), "it did not start"

    async def end(self) -> int:
        self.service.stop()
        return await asyncio.wait_for(self.running, HANG)


@asynccontextmanager
async def served(*arguments: str, wait: bool = True, **environment: str) -> AsyncIterator[Served]:
    settings = read_settings(options(*arguments), environment)
    lines: list[str] = []
    sockets = settings.bind()
    one = Served(Service(settings, sockets, say=lines.append), sockets, lines)
    try:
        await holds(lambda: lines or one.running.done())
        if wait:
            await one.ready()
        yield one
    finally:
        await one.end()


def client(at: Served, **more: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{at.port}", timeout=HANG, trust_env=False, **more)


def robot(at: Served, path: str = "/", **more: Any) -> websocket.connect:
    return websocket.connect(f"ws://127.0.0.1:{at.port}{path}", proxy=None, compression=None, open_timeout=HANG, **more)


def bytes_of(message: bytes | str) -> bytes:
    assert isinstance(message, bytes), message
    return message


async def refuses(connect: Callable[[], websocket.connect]) -> None:
    """Wait until it accepts no more connections: it is being drained."""
    async with asyncio.timeout(HANG):
        while True:
            try:
                async with connect():
                    pass
            except InvalidStatus as refused:
                status = refused.response.status_code
                break
    assert status == 503


async def test_it_lives_and_is_not_ready_while_the_policy_is_loaded(policies: Any) -> None:
    policies.may_load.clear()
    async with served(wait=False) as at, client(at) as http, robot(at) as early:
        assert (await http.get("/livez")).status_code == 200
        ready = await http.get("/readyz")
        assert (ready.status_code, ready.json()["reason"]) == (503, "the policy is being loaded")
        refused = await http.post("/act", json=EXAMPLE)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        await asyncio.wait_for(await early.ping(), HANG)
        policies.may_load.set()
        await at.ready()
        async with asyncio.timeout(HANG):
            first = await early.recv()
        assert unpackb(bytes_of(first)) == {"pose": [1, 2]}
        reply = (await http.post("/act", json=EXAMPLE)).json()
        assert reply == {**REPLY, "policy_version": 0}


async def test_it_can_end_while_the_policy_is_loaded(policies: Any) -> None:
    policies.may_load.clear()
    async with served(wait=False) as at, robot(at) as early:
        assert await at.end() == 0
        assert at.service.is_loading
        with pytest.raises(ConnectionClosed):
            await early.recv()
        assert early.close_code == 1001
        policies.may_load.set()


async def test_a_policy_that_can_not_be_loaded_ends_it(
    policies: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ValueError("no weights")

    monkeypatch.setattr(policies, "make", broken)
    async with served(wait=False) as at:
        assert await asyncio.wait_for(at.running, HANG) == 1
    assert capsys.readouterr().err == "aioinfer serve: error: policies:make() raised ValueError: no weights\n"


async def test_a_policy_that_fails_on_its_own_example_ends_it(
    policies: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(observation: torch.Tensor) -> torch.Tensor:
        raise ValueError("wrong size")

    monkeypatch.setattr(policies.double, "forward", fail)
    async with served(wait=False) as at:
        assert await asyncio.wait_for(at.running, HANG) == 1
    assert "the policy fails on its request_spec: ValueError: wrong size" in capsys.readouterr().err


async def test_a_plain_module_is_served_by_the_names_of_its_arguments(
    policies: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "make", policies.plain)
    async with served("--in-keys", "observation", "--out-keys", "action") as at, client(at) as http:
        assert (await http.post("/act", json={**EXAMPLE, "more": "text"})).json()["action"] == REPLY["action"]
        assert "-d '{\"observation\": [...]}'" in at.lines[-1]
    monkeypatch.setattr(policies, "make", nn.Linear(3, 3))
    async with served(wait=False) as at:
        assert await asyncio.wait_for(at.running, HANG) == 1
    assert "--in-keys observation --out-keys action" in capsys.readouterr().err


async def test_it_is_asked_by_address_or_by_a_name_that_is_allowed(policies: Any) -> None:
    async with served("--allow-host", "robots.example.org") as at, client(at) as http:
        names = ["127.0.0.1", "[::1]:8000", "192.0.2.7:80", "localhost", "Robots.Example.org:443", "evil.example.org"]
        statuses = [(await http.post("/act", json=EXAMPLE, headers={"host": name})).status_code for name in names]
        assert statuses == [200, 200, 200, 200, 200, 421]


async def test_what_it_says_can_be_pasted(policies: Any, key_file: Path) -> None:
    async with served("--api-key-file", str(key_file), AIOINFER_API_KEY="from-the-environment") as at:
        text = at.lines[-1]
        assert "from-a-file" not in text
        assert "from-the-environment" not in text
        assert f"ws://127.0.0.1:{at.port}" in text
        line = next(line for line in text.splitlines() if "try it" in line).split(maxsplit=2)[2]
        if shutil.which("curl") is None:
            pytest.skip("there is no curl")
        done = await asyncio.to_thread(subprocess.run, line, shell=True, capture_output=True, timeout=HANG)
        assert json.loads(done.stdout)["action"] == [0.0, 0.0, 0.0]


async def test_tokens_are_asked_for(policies: Any, key_file: Path) -> None:
    async with (
        served("--api-key-file", str(key_file), AIOINFER_API_KEY="from-the-environment") as at,
        client(at) as http,
    ):
        assert (await http.post("/act", json=EXAMPLE)).status_code == 401
        with pytest.raises(Exception, match="401"):
            await robot(at)
        for token in ("from-a-file", "from-the-environment"):
            headers = {"authorization": f"Bearer {token}"}
            assert (await http.post("/act", json=EXAMPLE, headers=headers)).status_code == 200


async def test_no_token_is_logged(policies: Any, key_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    upgrade = "upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n"
    upgrade += f"sec-websocket-key: {base64.b64encode(bytes(16)).decode()}\r\n"
    async with served("--api-key-file", str(key_file), "--log-level", "debug") as at:
        for more, path in (("", "/stats"), (upgrade, "/robot")):
            for token in ("from-a-file", "a-wrong-one"):
                async with connect(at.port) as caller:
                    head = f"GET {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {token}\r\n{more}\r\n"
                    caller.say(head.encode())
                    assert (b" 401 " in await caller.head()) == (token == "a-wrong-one")
    assert caplog.text.count("/stats") == 2, "requests are logged"
    assert "/robot" in caplog.text
    assert "from-a-file" not in caplog.text
    assert "a-wrong-one" not in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines ask; give --api-key-file FILE"),
        (["--host", "::"], "--host :: lets other machines ask"),
        (["--host", "192.0.2.1"], "lets other machines ask"),
        (["--host", "no.such.host.invalid"], "can't listen on 'no.such.host.invalid'"),
        (["--host", "a" * 64 + ".invalid"], "can't listen on 'aaa.*label"),
        (["--api-key-file", "nowhere"], "--api-key-file nowhere: No such file"),
        (["--checkpoint", "nowhere"], "--checkpoint nowhere: there is no such file"),
        (["--metadata", "nowhere"], "--metadata nowhere: No such file"),
        (["--ssl-keyfile", "nowhere"], "--ssl-keyfile needs --ssl-certfile"),
        (["--ssl-certfile", "nowhere"], "--ssl-certfile nowhere: .*No such file"),
        (["--ssl-certfile", __file__], "--ssl-certfile .*expected a certificate and its key, both in PEM"),
        (["--in-keys", "observation"], "needs both --in-keys and --out-keys"),
    ],
)
def test_options_that_can_not_be_used_are_told_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as told:
        read_settings(options(*arguments), {})
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("arguments", [["--insecure"], ["--uds", "socket"], ["--host", "localhost"]])
def test_nobody_else_reaches_it_without_a_token_unless_it_is_asked_for(arguments: list[str]) -> None:
    host = [] if "localhost" in arguments else ["--host", "0.0.0.0"]
    assert not read_settings(options(*host, *arguments), {}).tokens
    assert read_settings(options("--host", "0.0.0.0"), {"AIOINFER_API_KEY": "secret"}).tokens == ["secret"]


@pytest.mark.parametrize(
    ("text", "message"), [("", "no token"), ("# none\n\n", "no token"), ("a b", "no blank"), ("\u00e4", "ASCII")]
)
def test_a_file_without_usable_tokens_is_refused(key_file: Path, text: str, message: str) -> None:
    key_file.write_text(text, "utf-8")
    with pytest.raises(UsageError, match=message):
        read_tokens(key_file)


def test_a_file_of_tokens_that_everybody_can_read_is_told(key_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_tokens(key_file) == ["from-a-file"]
    assert not caplog.records
    key_file.chmod(0o604)
    assert read_tokens(key_file) == ["from-a-file"]
    assert "chmod o-r" in caplog.text


def test_metadata_is_read_from_json_and_from_yaml(tmp_path: Path) -> None:
    as_json, as_yaml, as_list = tmp_path / "a.json", tmp_path / "a.yaml", tmp_path / "list.json"
    as_json.write_text('{"pose": [1, 2]}')
    assert read_settings(options("--metadata", str(as_json)), {}).metadata == {"pose": [1, 2]}
    as_list.write_text("[1]")
    with pytest.raises(UsageError, match="expected a map, got a list"):
        read_settings(options("--metadata", str(as_list)), {})
    if importlib.util.find_spec("yaml") is None:
        return
    as_yaml.write_text("pose: [1, 2]")
    assert read_settings(options("--metadata", str(as_yaml)), {}).metadata == {"pose": [1, 2]}
    for text, message in (("pose: [1", "flow sequence"), ("since: 2020-01-01", "carry no date")):
        as_yaml.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_settings(options("--metadata", str(as_yaml)), {})


@pytest.mark.parametrize(
    ("text", "size"), [("64MiB", 2**26), ("1GiB", 2**30), ("500kB", 500_000), ("1.5KiB", 1536), ("1000", 1000)]
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert read_settings(options("--max-message-size", text), {}).limits.max_message_size == size


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-message-size", "64 apples"],
        ["--max-message-size", "0"],
        ["--port", "65536"],
        ["--drain", "-1"],
        ["--deadline", "0"],
        ["--max-pending", "0"],
        ["--name", "a/b"],
        ["--in-keys", "a,,b"],
    ],
    ids=" ".join,
)
def test_values_that_make_no_sense_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        options(*arguments)
    assert refused.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_sockets_are_of_tcp_so_that_asyncio_sends_at_once() -> None:
    sockets = bind("localhost", 0)
    try:
        assert {one.proto for one in sockets} == {socket.IPPROTO_TCP}
        assert len({one.getsockname()[1] for one in sockets}) == 1
        with pytest.raises(AddressError, match=r"can't listen on 127\.0\.0\.1, port"):
            bind("127.0.0.1", next(one.getsockname()[1] for one in sockets if one.family == socket.AF_INET))
    finally:
        for one in sockets:
            one.close()


def addresses(monkeypatch: pytest.MonkeyPatch, *found: str) -> None:
    """Let a host have these addresses."""

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (one, port)) for one in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_addresses_that_this_machine_has_not_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a name leads to ``::1`` too, and there is no IPv6."""
    addresses(monkeypatch, "240.0.0.1", "127.0.0.1")
    (only,) = bind("robots", 0)
    with only:
        assert only.getsockname()[0] == "127.0.0.1"
    addresses(monkeypatch, "240.0.0.1", "240.0.0.2")
    with pytest.raises(AddressError, match=r"can't listen on 240\.0\.0\.1, port 0: Cannot assign"):
        bind("robots", 0)


def test_a_free_port_is_free_on_all_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses(monkeypatch, "127.0.0.1", "127.0.0.2")
    taken: list[socket.socket] = []

    class Raced(socket.socket):
        """Somebody takes the port on the second address, the first three times."""

        def listen(self, backlog: int = 128) -> None:
            super().listen(backlog)
            address, port = self.getsockname()
            if address == "127.0.0.1" and len(taken) < 3:
                one = plain()
                with suppress(OSError):  # a stranger has it
                    one.bind(("127.0.0.2", port))
                one.listen()
                taken.append(one)

    plain = socket.socket
    monkeypatch.setattr(socket, "socket", Raced)
    sockets = bind("robots", 0)
    assert len({one.getsockname()[1] for one in sockets}) == 1
    assert len(sockets) == 2
    for one in [*taken, *sockets]:
        one.close()


def test_one_of_two_servers_takes_the_place_of_one_that_has_gone(tmp_path: Path) -> None:
    taken: list[socket.socket] = []

    def take(path: Path) -> None:
        with suppress(AddressError):
            taken.append(bind_unix(path))

    class Raced(PosixPath):
        """The other server comes before this one removes what nobody uses, and has a moment to be too fast."""

        def unlink(self, missing_ok: bool = False) -> None:
            other.start()
            other.join(0.2)
            super().unlink(missing_ok)

    path = tmp_path / "policy"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
    other = threading.Thread(target=take, args=(path,))
    take(Raced(path))
    other.join(HANG)
    assert not other.is_alive()
    for one in taken:
        one.close()
    assert len(taken) == 1


async def test_a_unix_socket(policies: Any, tmp_path: Path) -> None:
    path = tmp_path / "policy"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
    async with served("--uds", str(path)):
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=HANG) as http:
            assert (await http.post("/act", json=EXAMPLE)).json()["action"] == REPLY["action"]
        with pytest.raises(AddressError, match=r"a server listens on .* already"):
            await asyncio.to_thread(bind_unix, path)
    other = tmp_path / "file"
    other.touch()
    with pytest.raises(AddressError, match="is no socket"):
        bind_unix(other)
    assert other.exists()
    with pytest.raises(AddressError, match="can't listen on"):
        bind_unix(tmp_path / "no" / "folder")


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of 127.0.0.1, signed by itself, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    path = tmp_path / "certificate.pem"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(path), "-keyout", str(tmp_path / "key.pem")]
    subprocess.run(["openssl", *words.split(), *files], check=True, capture_output=True, timeout=HANG)
    with path.open("a") as file:
        file.write((tmp_path / "key.pem").read_text())
    return path


async def test_https_and_wss(policies: Any, certificate: Path) -> None:
    trusted = ssl.create_default_context(cafile=str(certificate))
    async with served("--ssl-certfile", str(certificate)) as at:
        url = f"//127.0.0.1:{at.port}"
        assert f"wss:{url}" in at.lines[-1]
        async with httpx.AsyncClient(verify=trusted, timeout=HANG, trust_env=False) as http:
            reply = await http.post(f"https:{url}/act", json=EXAMPLE)
            assert reply.json()["action"] == REPLY["action"]
        async with websocket.connect(f"wss:{url}", ssl=trusted, proxy=None, open_timeout=HANG) as secure:
            assert unpackb(bytes_of(await secure.recv())) == {"pose": [1, 2]}
        remote = await asyncio.to_thread(partial(aioinfer.connect, f"wss:{url}", tls=trusted, timeout=HANG))
        async with remote:
            answer = await remote.async_client()(observation=torch.tensor(EXAMPLE["observation"]))
            assert answer["action"].tolist() == REPLY["action"]
        with pytest.raises(aioinfer.ServerClosedError, match="certificate verify failed"):
            await asyncio.to_thread(partial(aioinfer.connect, f"wss:{url}", timeout=HANG))


async def test_a_connection_that_begins_no_tls_is_closed(certificate: Path) -> None:
    tls = read_settings(options("--ssl-certfile", str(certificate)), {}).tls
    assert tls is not None
    async with listening(tls=tls, head_timeout=0.05) as at, connect(at.port) as silent:
        assert await silent.heard() == b""


async def test_the_end_waits_for_replies_and_closes_websockets_after_them(policies: Any) -> None:
    async with served() as at, client(at) as http, client(at) as idle, robot(at) as connected:
        await idle.get("/livez")
        await connected.recv()
        policies.double.entered.clear()
        policies.double.gate.clear()
        asking = asyncio.create_task(http.post("/act", json=EXAMPLE))
        assert await asyncio.to_thread(policies.double.entered.wait, HANG)
        at.service.stop()
        await refuses(partial(robot, at))
        async with asyncio.timeout(HANG):
            assert (await idle.post("/act", json=EXAMPLE)).status_code == 503
            assert not at.running.done()
            policies.double.gate.set()
            assert (await asking).json()["action"] == REPLY["action"]
            with pytest.raises(ConnectionClosed):
                await connected.recv()
            assert connected.close_code == 1001
            assert await at.running == 0


async def test_requests_that_take_too_long_are_given_up(policies: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with served("--drain", "0.01") as at, client(at) as http:
        policies.double.entered.clear()
        policies.double.gate.clear()
        asking = asyncio.create_task(http.post("/act", json=EXAMPLE))
        assert await asyncio.to_thread(policies.double.entered.wait, HANG)
        assert await at.end() == 0
        policies.double.gate.set()
        with suppress(httpx.TransportError):  # where it was so late that the connection was cut, too
            assert (await asking).status_code == 503
    assert "requests were not answered within 0.01 seconds (--drain)" in caplog.text


# Of programs: each pass waits for the file "open"; the policy says that it was asked, and in which process.
POLICIES = """
import os
from pathlib import Path

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from aioinfer.testing import eventually

def act(observation):
    if observation[0, 0] > 0:  # no warm-up
        Path("entered").touch()
        eventually(Path("open").exists)
    return observation * 2

def make():
    Path("pid").write_text(str(os.getpid()))
    policy = TensorDictModule(act, in_keys=["observation"], out_keys=["action"])
    policy.metadata = {"pose": [1, 2]}
    policy.request_spec = TensorDict({"observation": torch.zeros(3)})
    return policy
"""


class Command:
    """``aioinfer serve`` as a program, which has said where it is."""

    def __init__(self, program: Program, folder: Path) -> None:
        self.program = program
        self.folder = folder
        said: list[str] = []
        while not (said and said[-1].strip().startswith("try it")):
            said.append(program.stdout.readline())
            assert said[-1], program.errors
        self.said = "".join(said)
        self.port = int(self.said.partition("ws://127.0.0.1:")[2].split(maxsplit=1)[0])
        self.url = f"http://127.0.0.1:{self.port}"

    async def entered(self) -> None:
        await holds((self.folder / "entered").exists)

    def send(self, number: int) -> None:
        os.kill(self.program.pid, number)

    async def wait(self) -> int:
        return await asyncio.to_thread(self.program.wait)


@asynccontextmanager
async def command(folder: Path, *arguments: str) -> AsyncIterator[tuple[Command, httpx.AsyncClient]]:
    (folder / "policies.py").write_text(POLICIES)
    with running(PROGRAM, str(folder), "policies:make", "--port", "0", *arguments) as program:
        started = await asyncio.to_thread(Command, program, folder)
        async with httpx.AsyncClient(base_url=started.url, timeout=HANG, trust_env=False) as http:
            yield started, http


async def test_a_program_says_what_it_serves_and_ends_at_sigterm_after_its_replies(tmp_path: Path) -> None:
    async with command(tmp_path, "--newest-wins") as (at, http):
        assert "serving policies:make (TensorDictModule, on the CPU) at http://127.0.0.1:" in at.said
        words = shlex.split(at.said.rpartition("try it")[2])
        assert words[:3] == ["curl", "-s", f"{at.url}/act"]
        assert (await http.post(words[2], content=words[4])).json()["action"] == [0.0, 0.0, 0.0]
        async with websocket.connect(f"ws://127.0.0.1:{at.port}", proxy=None, open_timeout=HANG) as connected:
            assert unpackb(bytes_of(await connected.recv())) == {"pose": [1, 2]}
            asking = asyncio.create_task(http.post("/act", json=EXAMPLE))
            await at.entered()
            at.send(signal.SIGTERM)
            await refuses(partial(websocket.connect, f"ws://127.0.0.1:{at.port}", proxy=None, open_timeout=HANG))
            async with asyncio.timeout(HANG):
                (tmp_path / "open").touch()
                assert (await asking).json()["action"] == REPLY["action"]
                with pytest.raises(ConnectionClosed):
                    await connected.recv()
            assert connected.close_code == 1001
            assert await at.wait() == 0
            assert at.program.errors == ""


async def test_a_second_ctrl_c_ends_a_program_at_once(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    (tmp_path / "policies.py").write_text(POLICIES)
    with running(PROGRAM, str(tmp_path), "policies:make", "--uds", str(path), "--drain", "1000") as program:
        for _ in range(3):
            assert await asyncio.to_thread(program.stdout.readline), program.errors
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=HANG) as http:
            asking = asyncio.create_task(http.post("/act", json=EXAMPLE))
            await holds((tmp_path / "entered").exists)
            os.kill(program.pid, signal.SIGINT)
            await refuses(partial(websocket.unix_connect, str(path), open_timeout=HANG))
            os.kill(program.pid, signal.SIGINT)
            assert await asyncio.to_thread(program.wait) == 130
            with pytest.raises(httpx.TransportError):
                await asking
        assert not path.exists()


async def test_callers_are_told_when_the_process_of_a_policy_is_killed_and_the_program_ends(tmp_path: Path) -> None:
    async with command(tmp_path, "--process") as (at, http):
        assert "in a process of its own" in at.said
        policy = int((tmp_path / "pid").read_text())
        assert policy != at.program.pid
        async with websocket.connect(f"ws://127.0.0.1:{at.port}", proxy=None, open_timeout=HANG) as connected:
            assert unpackb(bytes_of(await connected.recv())) == {"pose": [1, 2]}
            asking = asyncio.create_task(http.post("/act", json=EXAMPLE))
            await at.entered()
            os.kill(policy, signal.SIGTERM)  # as an init system does, which tells all processes of a service
            (tmp_path / "open").touch()
            assert (await asyncio.wait_for(asking, HANG)).json()["action"] == REPLY["action"]
            (tmp_path / "open").unlink()
            (tmp_path / "entered").unlink()
            asking = asyncio.create_task(http.post("/act", json=EXAMPLE))
            await at.entered()
            await connected.send(packb({"observation": torch.ones(3).numpy()}))
            os.kill(policy, signal.SIGKILL)
            async with asyncio.timeout(HANG):
                told = await asking
                assert told.status_code == 503
                assert "process" in told.json()["error"]
                assert isinstance(await connected.recv(), str)
                with pytest.raises(ConnectionClosed):
                    await connected.recv()
        with suppress(httpx.TransportError):  # it has ended
            assert (await http.get("/readyz")).status_code != 200
        assert await at.wait() == 1
        assert "killed by SIGKILL" in at.program.errors


class Recorder(nn.Module):
    """``action`` is twice the ``observation``; it notes what it was asked for."""

    def __init__(self, asked: list[int]) -> None:
        super().__init__()
        self.asked = asked

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        self.asked += [int(number) for number in observation[:, 0]]
        return observation * 2


class Asker:
    """A caller with a connection of its own, which asks again where its request was not accepted."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, number: int) -> list[float]:
        body = json.dumps({"observation": [float(number)] * 3}).encode()
        while True:
            with suppress(OSError, asyncio.IncompleteReadError):
                status, reply = await self._exchange(body)
                if status == 200:
                    action: list[float] = json.loads(reply)["action"]
                    return action
                assert status == 503, reply
            self.close()
            await asyncio.sleep(0.02)  # as a client would, which leaves the server time to come back

    async def _exchange(self, body: bytes) -> tuple[int, bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(b"POST /act HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return int(head.split()[1]), await reader.readexactly(length)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def grows(answered: dict[int, list[float]], size: int) -> None:
    """Wait until so many are answered: it may take a while, but not for one more."""
    while (now := len(answered)) < size:
        await holds(lambda now=now: len(answered) > now)  # type: ignore[misc]


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.stress)])
async def test_a_restart_under_load_loses_no_accepted_request(
    policies: Any, monkeypatch: pytest.MonkeyPatch, port: int, count: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(policies, "double", Recorder(asked))
    answered: dict[int, list[float]] = {}

    async def load(numbers: Iterator[int]) -> None:
        asker = Asker(port)
        for number in numbers:
            answered[number] = await asker.ask(number)
        asker.close()

    async with served("--port", str(port)) as first:
        numbers = iter(range(1, count + 1))
        callers = [asyncio.create_task(load(numbers)) for _ in range(32)]
        await grows(answered, count // 2 + 1)
        assert await first.end() == 0
        before = len(asked)
        async with served("--port", str(port)):
            await grows(answered, count)
            await asyncio.gather(*callers)
    assert before < len(asked), "the second server was not asked"
    assert answered == {number: [2.0 * number] * 3 for number in range(1, count + 1)}
    assert sorted(number for number in asked if number) == sorted(answered), "computed twice, or not answered"
