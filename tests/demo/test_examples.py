"""Every example in the documentation runs, and so does the code in the README."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from aioinfer.testing import check_transport
from tests.limits import IMPORTS
from tests.programs import running

ROOT = Path(__file__).parents[2]
SERVES_UNTIL_CTRL_C = {"web.py"}  # see test_web.py
ASKS_A_SERVER = {"play_remote.py"}  # see test_tutorial.py
LEARNS_FOR_MINUTES = {"ppo.py", "dqn.py"}
EXAMPLES = sorted(
    path
    for path in (ROOT / "docs" / "examples").glob("*.py")
    if path.name not in SERVES_UNTIL_CTRL_C | ASKS_A_SERVER | LEARNS_FOR_MINUTES
)

# What they learn in some seconds is nothing.
LEARNING = [
    ("ppo.py", "CartPole-v1", "--frames", "5000"),
    ("ppo.py", "Acrobot-v1", "--frames", "5000"),
    ("ppo.py", "Pendulum-v1", "--frames", "5000"),
    ("dqn.py", "--frames", "5000"),
]


def run(program: Path, *arguments: str) -> str:
    """Run a program, with every warning an error; return what it printed."""
    with running(program, *arguments, warnings="error") as process:
        printed = process.stdout.read()  # of its processes, too
        assert process.wait() == 0, process.errors
        assert "Traceback" not in process.errors, process.errors  # of a process or a thread that it has started
    return printed


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.examples
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_ends_by_itself_and_tells_what_it_did(example: Path) -> None:
    assert run(example)


@pytest.mark.examples
@pytest.mark.parametrize(
    ("example", "arguments"), [(name, rest) for name, *rest in LEARNING], ids=map(" ".join, LEARNING)
)
def test_an_example_that_learns_makes_exactly_as_many_steps_as_it_may(example: str, arguments: list[str]) -> None:
    assert "after 5000 frames" in run(ROOT / "docs" / "examples" / example, *arguments)


@pytest.mark.examples
def test_the_transport_of_the_example_holds_the_contract() -> None:
    check_transport(runpy.run_path(str(ROOT / "docs" / "examples" / "own_transport.py"))["ListTransport"])


README_BLOCKS = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


@pytest.mark.examples
def test_the_code_in_the_readme_runs_from_top_to_bottom() -> None:
    assert len(README_BLOCKS) == 5
    command = [sys.executable, "-W", "error", "-c", "\n".join([*README_BLOCKS[:3], README_BLOCKS[4]])]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=IMPORTS, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout


@pytest.mark.examples
def test_the_program_in_the_readme_that_starts_a_process_runs(tmp_path: Path) -> None:
    program = tmp_path / "program.py"  # a process that is spawned imports it
    program.write_text(README_BLOCKS[3], encoding="utf-8")
    assert "computed by version" in run(program)
