"""The floors of the house: a module imports from lower floors only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import aioinfer

ROOT = Path(aioinfer.__file__).parent
# Each line may import from the lines above it.
FLOORS = (
    {"errors", "interaction", "interrupts", "batching", "modes", "health"},
    {"segments", "tensors", "stats", "client"},
    {"columns", "stamps", "transports.admission", "transports.bells", "transports.poller"},
    {"devices", "transports.room", "transports.futures", "transports.sleepers", "transports.wire"},
    {"executor", "transports.outlets"},
    # between processes, the client's side
    {"transports.parcels", "transports.addresses", "transports.receivers", "transports.slot_memory"},
    {"transports.control", "transports.turns", "transports.calls"},
    {"transports.station"},
    {"transports.tickets"},
    {"transports.slot_tickets", "transports.remote"},
    # the server's side
    {"transports.requests"},
    {"transports.pending", "transports.line"},
    {"transports.switchboard"},
    {"transports.bridge", "forward"},
    {"transports.base"},
    {"transports.queued", "transports.polling", "pause", "policy"},
    {"transports.in_process", "transports.processes", "worker"},
    {"transports.threads", "transports.slots", "transports.process_slots", "transports.queues", "transports.joined"},
    {"transports"},
    {"weight_sync.weights", "weight_sync.snapshots", "weight_sync.waiting"},
    {"weight_sync.queues", "weight_sync.targets"},
    {"weight_sync.lines", "weight_sync.publications"},
    {"weight_sync.transport"},
    {"weight_sync.channels"},
    {"weight_sync.receiver", "weight_sync.peers"},
    {"weight_sync.worker", "weight_sync.sender", "weight_sync.scheme"},
    {"weight_sync.recipes"},
    {"weight_sync.queued"},
    {"weight_sync.multiprocess", "weight_sync.shared_memory", "weight_sync.nothing"},
    {"weight_sync"},
    {"life", "updates"},
    {"server"},
    {"hosting.orders", "hosting.process", "hosting.completion"},
    {"hosting.child", "hosting.hotline"},
    {"hosting.deliveries", "hosting.pause"},
    {"hosting.life"},
    {"hosting.server"},
    {"hosting"},
    {""},
    {"testing.callers"},
    {"testing.replies", "testing.endings"},
    {"testing.contract"},
    {"testing"},
    {"demo", "bench"},
    {"cli"},
    {"__main__"},
)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int:
    for name in (module, module.split(".")[0]):  # demo and bench may be packages, with an order of their own
        for floor, modules in enumerate(FLOORS):
            if name in modules and (name == module or name in {"demo", "bench"}):
                return floor
    raise AssertionError(f"{module} is on no floor")


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
def test_a_module_imports_from_lower_floors_only(module: str) -> None:
    floor = floor_of(module)
    for imported in imports_of(SOURCES[module]):
        same_package = module.split(".")[0] == imported.split(".")[0] in {"demo", "bench"}
        assert floor_of(imported) < floor or same_package, f"{module} imports {imported}"


def test_the_picture_of_the_package_names_files_that_exist() -> None:
    named = re.findall(r"[a-z_/]+\.py", aioinfer.__doc__ or "")
    assert named
    for name in named:
        assert (ROOT / name).is_file(), name


def test_the_package_imports_no_optional_dependency() -> None:
    optional = ["gymnasium", "matplotlib", "rich", "fastapi", "starlette", "uvicorn", "torchrl", "uvloop", "pytest"]
    code = f"import sys, aioinfer, aioinfer.cli, aioinfer.testing; print([n for n in {optional} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists_and_is_documented() -> None:
    for name in aioinfer.__all__:
        assert getattr(aioinfer, name).__doc__, name
