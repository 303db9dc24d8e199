"""The policy of a command line: how it is found and made, and what is said where that fails."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer.serve.loading import LoadError, PolicyInfo, PolicySource

MODULE = """
import torch
from tensordict.nn import TensorDictModule
from torch import nn

def make():
    return TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])

class Policy(nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.linear = nn.Linear(size, 2)

class Needs(nn.Module):
    def __init__(self, size):
        super().__init__()

class Home:
    make = staticmethod(make)

def function(td):
    return td

async def make_later(): ...
def broken(): raise ValueError("no\\nweights")
def leaves(): raise SystemExit(3)
def makes_nothing(): return 5

policy = make()
number = 5
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, which has the module."""
    (tmp_path / "my_robot.py").write_text(MODULE)
    (tmp_path / "lacks.py").write_text("import not_there_at_all")
    (tmp_path / "fails.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("my_robot", "lacks", "fails"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("make", TensorDictModule),
        ("Home.make", TensorDictModule),
        ("policy", TensorDictModule),
        ("Policy", nn.Module),
        ("function", type(lambda: None)),
    ],
)
def test_a_policy_is_found_or_made(name: str, kind: type) -> None:
    model = PolicySource(f"my_robot:{name}").load()
    assert isinstance(model, kind)


def test_a_source_can_be_sent_to_another_process(folder: Path) -> None:
    source = PolicySource("my_robot:make", folder / "weights.pt")
    assert pickle.loads(pickle.dumps(source)) == source


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("my_robt:make", "there is no module 'my_robt', neither in .* nor installed"),
        ("my_robot.py:make", "for the file my_robot.py, write my_robot:"),
        ("lacks:make", "lacks can't be imported: No module named 'not_there_at_all'"),
        ("fails:make", "fails can't be imported: ZeroDivisionError: division by zero"),
        ("my_robot:mak", "my_robot:mak: there is no 'mak'; there is make"),
        ("my_robot:zzz", "there is make, Policy, Needs, Home, function, make_later, broken, "),
        ("my_robot:policy.nowhere", "there is no 'nowhere'; it is a TensorDictModule"),
        ("my_robot:number", "my_robot:number is no policy, and makes none: it is a int"),
        ("my_robot:make_later", "is an async function"),
        ("my_robot:broken", r"my_robot:broken\(\) raised ValueError: no weights$"),
        ("my_robot:leaves", r"my_robot:leaves\(\) raised SystemExit: 3"),
        ("my_robot:makes_nothing", "must return a policy, and returned a int"),
        ("my_robot:Needs", "missing 1 required positional argument: 'size'"),
    ],
)
def test_what_is_no_policy_is_told_in_one_line(reference: str, message: str) -> None:
    with pytest.raises(LoadError, match=message) as told:
        PolicySource(reference).load()
    assert "\n" not in str(told.value)


class Hidden:
    """What unpickling a checkpoint must not make."""

    made = False

    def __reduce__(self) -> Any:
        return setattr, (Hidden, "made", True)


WEIGHTS = {"module.weight": torch.full((2, 4), 3.0), "module.bias": torch.zeros(2)}


@pytest.mark.parametrize(
    "saved",
    [WEIGHTS, {"state_dict": WEIGHTS}, {"model": WEIGHTS, "step": 5, "optimizer": {"lr": 0.1}}],
    ids=["weights", "state_dict", "model"],
)
def test_a_checkpoint_is_loaded(folder: Path, saved: dict[str, Any]) -> None:
    torch.save(saved, folder / "weights.pt")
    model = PolicySource("my_robot:make", folder / "weights.pt").load()
    assert isinstance(model, TensorDictModule)
    assert model(TensorDict({"observation": torch.ones(4)}))["action"].tolist() == [12.0, 12.0]


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"weight": torch.zeros(1)}, "does not fit the policy: .*[Mm]issing key.*module.weight"),
        ({**WEIGHTS, "module.bias": torch.zeros(3)}, "does not fit the policy: .*size mismatch for module.bias"),
        (torch.zeros(3), "has no state dict, but a Tensor"),
        ({"model": Hidden()}, "which could run code"),
        (b"rubbish", "is no checkpoint|can't be read"),
        (None, "can't be read: FileNotFoundError"),
    ],
    ids=["names", "shapes", "a tensor", "an object", "rubbish", "no file"],
)
def test_a_checkpoint_that_does_not_fit_is_told_in_one_line(folder: Path, saved: Any, message: str) -> None:
    path = folder / "weights.pt"
    if isinstance(saved, bytes):
        path.write_bytes(saved)
    elif saved is not None:
        torch.save(saved, path)
    with pytest.raises(LoadError, match=message) as told:
        PolicySource("my_robot:make", path).load()
    assert "\n" not in str(told.value)
    assert not Hidden.made


def test_a_checkpoint_needs_a_module(folder: Path) -> None:
    torch.save(WEIGHTS, folder / "weights.pt")
    with pytest.raises(LoadError, match=r"is no nn\.Module"):
        PolicySource("my_robot:function", folder / "weights.pt").load()


def test_what_a_policy_says_of_itself_is_known() -> None:
    model: Any = PolicySource("my_robot:make").load()
    assert PolicyInfo.of(model) == PolicyInfo("TensorDictModule", 10, ["observation"], None, None)
    model.metadata, model.request_spec = {"pose": [1]}, TensorDict({"observation": torch.zeros(4)})
    info = PolicyInfo.of(model, ["state"])
    assert (info.in_keys, info.metadata, info.request_spec) == (["state"], {"pose": [1]}, model.request_spec)
    assert PolicyInfo.of(lambda td: td).kind == "<lambda>"
