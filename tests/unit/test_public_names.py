"""Tests touch public names only: else a change of the inside that changes no behaviour breaks them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SOURCES = {str(path.relative_to(TESTS)): path for path in sorted(TESTS.rglob("*.py"))}
# Functions and methods that take the name of an attribute as a string.
BY_NAME = {"attrgetter", "delattr", "getattr", "hasattr", "setattr"}
# Private names of the standard library and of torch and tensordict, for which there are no public ones.
ALLOWED = {
    "TensorDict._new_unsafe",
    "os._exit",
    "task._log_destroy_pending",
    "torch._subclasses",
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(source: str) -> Iterator[tuple[int, str]]:
    """Each private name of another object or module that a file uses: its line, and what is written there."""
    for node in ast.walk(ast.parse(source)):
        found: list[str] = []
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):  # of the test's own
                continue
            case ast.Attribute(attr=name):
                found = [ast.unparse(node)] if is_private(name) else []
            case ast.ImportFrom(module=str(module), names=names):
                found = [f"{module}.{name.name}" for name in names if is_private(name.name)]
                found += [module] if any(map(is_private, module.split("."))) else []
            case ast.Import(names=names):
                found = [name.name for name in names if any(map(is_private, name.name.split(".")))]
            case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called), args=arguments) if called in BY_NAME:
                of = f"{ast.unparse(arguments[0])}." if len(arguments) > 1 else ""
                given = [argument.value for argument in arguments[:2] if isinstance(argument, ast.Constant)]
                texts = [text for text in given if isinstance(text, str)]
                found = [f"{of}{text}" for text in texts if any(map(is_private, text.split(".")))]
            case ast.Subscript(value=of, slice=ast.Constant(value=str(name))) if is_private(name):
                inside = ast.unparse(of)
                found = [f"{inside}[{name!r}]"] if inside.startswith("vars(") or inside.endswith(".__dict__") else []
        for name in found:
            if not any(name == allowed or name.startswith(f"{allowed}.") for allowed in ALLOWED):
                yield node.lineno, name  # type: ignore[attr-defined]


@pytest.mark.parametrize("file", SOURCES)
def test_a_test_touches_public_names_only(file: str) -> None:
    found = [f"tests/{file}:{line}: {name}" for line, name in private_names(SOURCES[file].read_text())]
    assert not found, "private names of other objects; see aioinfer.testing.inspection:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "server._queue",
        "server._queue.pending()",
        "server.clients(1)[0]._endpoint",
        "from aioinfer.tensors import _checked",
        "from aioinfer import _tensors",
        "import aioinfer._tensors",
        "getattr(server, '_queue')",
        "hasattr(server, '_queue')",
        "monkeypatch.setattr(server, '_queue', None)",
        "monkeypatch.setattr('aioinfer.server._queue', None)",
        "monkeypatch.delattr(server, '_queue')",
        "attrgetter('_queue')",
        "vars(server)['_queue']",
        "server.__dict__['_queue']",
    ],
)
def test_a_private_name_is_found(source: str) -> None:
    assert len(list(private_names(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "self._queue",
        "cls._queue",
        "server.__dict__",
        "os._exit(3)",
        "getattr(server, 'queue')",
        "weights['_extra_state']",
        "monkeypatch.delattr(TensorDict, '_new_unsafe')",
    ],
)
def test_other_names_are_not_found(source: str) -> None:
    assert not list(private_names(source))
