"""The order of the packages."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import aioinfer
from tests.limits import IMPORTS

ROOT = Path(aioinfer.__file__).parent
# Packages, and modules of the top, in their order: each imports from those above it only, or from its own package.
LAYERS = (
    {
        "errors",
        "histogram",
        "interaction_type",
        "interrupts",
        "batching",
        "learned_rule",
        "modes",
        "tensors",
        "stats",
        "client",
        "entries",
        "rows",
    }
    | {"buckets", "compilation", "devices", "futures", "ipc", "plan"},
    {"transports", "weight_sync"},
    {"forward", "policy", "model_thread", "weight_updates", "server"},
    {"process_server"},
    {"collectors", "web"},
    {""},
    {"testing"},
    {"demo", "bench", "serve", "cli", "__main__"},
)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int:
    return next(number for number, packages in enumerate(LAYERS) if module.split(".")[0] in packages)


SOURCES = {module_of(path): path for path in ROOT.rglob("*.py")}


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "aioinfer":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name.removeprefix("aioinfer.") in SOURCES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "aioinfer"}
    return {name.removeprefix("aioinfer").removeprefix(".") for name in found}


@pytest.mark.parametrize("module", SOURCES)
def test_a_package_imports_from_packages_above_it_only(module: str) -> None:
    for imported in imports_of(SOURCES[module]):
        assert layer_of(imported) <= layer_of(module), f"{module} imports {imported}"


def test_the_picture_of_the_package_names_files_that_exist() -> None:
    named = re.findall(r"[a-z_/]+\.py", aioinfer.__doc__ or "")
    assert named
    for name in named:
        assert (ROOT / name).is_file(), name


def test_the_package_imports_no_optional_dependency() -> None:
    optional = [
        "gymnasium",
        "pettingzoo",
        "envpool",
        "matplotlib",
        "rich",
        "fastapi",
        "starlette",
        "uvicorn",
        "websockets",
        "msgpack",
        "prometheus_client",
        "torchrl",
        "uvloop",
        "pytest",
    ]
    ours = "aioinfer, aioinfer.cli, aioinfer.testing, aioinfer.collectors"
    code = f"import sys, {ours}; print([n for n in {optional} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORTS, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists_and_is_documented() -> None:
    for name in aioinfer.__all__:
        assert getattr(aioinfer, name).__doc__, name
