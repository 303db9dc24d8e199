"""What the tutorial says of a server on another machine: serve the demo's policy, ask it with curl's line, and play."""

import os
import re
import signal
from pathlib import Path

import httpx
import pytest
import torch

from aioinfer.demo.policy import make_policy
from tests.limits import HANG
from tests.programs import running

ROOT = Path(__file__).parents[2]
SERVE = ROOT / "tests" / "web" / "serve_program.py"
PLAY = ROOT / "docs" / "examples" / "play_remote.py"


@pytest.mark.examples
def test_the_policy_of_the_demo_is_served_asked_and_played(tmp_path: Path) -> None:
    weights = tmp_path / "policy.pt"
    torch.save(make_policy().state_dict(), weights)
    arguments = ("aioinfer.demo.policy:make_policy", "--checkpoint", str(weights), "--port", "0")
    with running(SERVE, str(tmp_path), *arguments) as server:
        said = ""
        while "Ctrl-C" not in said:
            said += (line := server.stdout.readline())
            assert line, server.errors
        found = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert found is not None
        url = found[0]
        reply = httpx.post(f"{url}/act", content='{"observation": [0.01, -0.02, 0.03, 0.04]}', timeout=HANG)
        assert reply.json()["action"] in (0, 1), reply.text
        assert reply.json()["policy_version"] == 0
        with running(PLAY, url.replace("http", "ws"), warnings="error") as player:
            played = player.stdout.read()
            assert player.wait() == 0, player.errors
        assert re.fullmatch(r"16 episodes, \d+\.\d steps on average\n", played)
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait() == 0, server.errors
