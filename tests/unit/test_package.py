"""What ``import aioinfer`` gives, and what it does not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import aioinfer
from tests.limits import IMPORTS


def _imported_for_type_checkers() -> dict[str, str]:
    tree = ast.parse(Path(aioinfer.__file__).read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules = {alias.name: node.module or "" for node in found for alias in node.names}
    return {name: module for name, module in modules.items() if module.startswith("aioinfer.")}


def test_a_name_is_the_one_that_type_checkers_see() -> None:
    seen = _imported_for_type_checkers()
    assert sorted(seen) == sorted(aioinfer.__all__)
    for name, module in seen.items():
        assert getattr(aioinfer, name) is getattr(import_module(module), name), name


def test_a_star_import_and_dir_have_every_public_name() -> None:
    names: dict[str, object] = {}
    exec("from aioinfer import *", names)
    assert set(aioinfer.__all__) <= names.keys()
    assert set(aioinfer.__all__) <= set(dir(aioinfer))


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'aioinfer' has no attribute 'InferenceServers'"):
        aioinfer.InferenceServers  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="InferenceServers"):
        exec("from aioinfer import InferenceServers")


def _loads_torch(code: str) -> bool:
    program = f"import sys\n{code}\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=IMPORTS, check=True)
    return done.stdout.strip() == "True"


def test_torch_is_imported_with_the_first_name_that_needs_it() -> None:
    assert not _loads_torch("import aioinfer")
    assert not _loads_torch("from aioinfer import InferenceError, ServerStats")
    assert _loads_torch("import aioinfer; aioinfer.weight_sync")
