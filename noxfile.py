"""Everything that developers and CI run: ``nox -l`` lists it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["tests", "lint", "types", "docs"]
nox.options.reuse_venv = "yes"

PYPROJECT = nox.project.load_toml("pyproject.toml")


# One more than there are cores, as many tests wait. `-n 0` after ``--`` is for a debugger.
IN_PARALLEL = (f"--numprocesses={(os.cpu_count() or 1) + 1}", "--maxprocesses=8", "--dist=worksteal")


def install(session: nox.Session, *groups: str, package: str = ".", options: Sequence[str] = ()) -> None:
    """Install the package with dependency groups, and the torch build that the project is developed with."""
    requirements = nox.project.dependency_groups(PYPROJECT, *groups)
    session.install(*options, "--constraint", "constraints.txt", package, *requirements)


def run_tests(session: nox.Session, *arguments: str) -> None:
    """Run pytest; its arguments after ``--`` come last, and count."""
    # An environment may say that compiled files are not kept: then each process would compile all tests anew.
    session.run("pytest", *IN_PARALLEL, *arguments, *session.posargs, env={"PYTHONDONTWRITEBYTECODE": ""})


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after ``--`` go to pytest."""
    install(session, "test", package=".[demo,serve]")
    run_tests(session)


@nox.session
def examples(session: nox.Session) -> None:
    """Run every example of the documentation as a program, and the code of the README."""
    install(session, "test", package=".[demo,serve]")
    run_tests(session, "-m", "examples")


@nox.session
def stress(session: nox.Session) -> None:
    """Try hundreds of times what goes wrong at random moments; all of it 20 times with ``-- --stress-count 20``."""
    install(session, "test", package=".[demo,serve]")
    run_tests(session, "-m", "stress")


@nox.session
def browser(session: nox.Session) -> None:
    """Look at the status page in a headless Chromium, where there is one (Debian's package: chromium).

    The pictures of the documentation are made anew with ``-- --screenshots docs/images``.
    """
    install(session, "test", package=".[demo,serve]")
    run_tests(session, "-m", "browser", "-rs", "--maxprocesses=2")


@nox.session
def oldest(session: nox.Session) -> None:
    """Run the tests beside torchrl, which brings the oldest tensordict that is supported.

    What ends processes, fills their sockets, or runs whole programs has little to do with tensordict, and takes
    minutes. The `tests` session has it, and the examples.
    """
    install(session, "test", "bench", package=".[demo,serve]")
    left_out = (
        "ipc/test_[!l]*",
        "process_server/test_[!s]*",
        "process_server/test_signals",
        "process_server/test_start",
        "contract/test_exit",
        "demo/test_[!l]*",
        "bench/test_processes",
        "unit/test_cli",
        "unit/test_package",
        "unit/test_architecture",
        "weights/test_processes",
        "collectors/test_worker_pool",
        "collectors/test_trouble",
        "collectors/test_endings",
        "collectors/test_scheduler",
        "collectors/test_steppers",
        "collectors/test_steppers_[!t]*",
        "web/test_[!nos]*",  # it has those of the network's clients, of openpi, and of streams
    )
    run_tests(session, *[f"--ignore-glob=tests/{name}.py" for name in left_out])


@nox.session
def clients(session: nox.Session) -> None:
    """Run clients that others have written against our servers; openpi's needs numpy 1, hence its own environment."""
    install(session, "test", "clients", package=".[serve]")
    run_tests(session, *sorted(map(str, Path("tests/web").glob("test_*_clients.py"))))


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    install(session, "test", "types", package=".[demo,serve]", options=["--no-compile"])  # nothing of it is imported
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into ``site/``; every warning is an error, and so is code that is not the examples'."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "docs"))
    session.run("python", "docs/update_code.py", "--check")
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def demo(session: nox.Session) -> None:
    """Learn CartPole live, in a process beside the server; arguments after ``--`` go to ``aioinfer demo``."""
    install(session, package=".[demo]")
    session.run("aioinfer", "demo", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure against torchrl, Gymnasium, EnvPool and servers; arguments after ``--`` go to ``aioinfer bench``."""
    install(session, "bench", "collectors", "serving", package=".[serve]")
    session.run("aioinfer", "bench", "--torchrl-collate", "both", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheel and the source distribution into ``dist/``."""
    session.install("build")
    session.run("python", "-m", "build", "--outdir", "dist")
