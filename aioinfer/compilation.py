"""Compiled models: how they are compiled, and run over batches of all sizes before the server is ready."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from typing import Any, TypeAlias

import torch
from tensordict import TensorDictBase

from aioinfer.errors import describe
from aioinfer.interaction_type import INHERIT, MODES, Mode, use_mode
from aioinfer.plan import CheckedPlan, Compile, Plan, Runner

__all__ = ["CompiledPlan", "WarmUp", "compiler"]

# Of code that is compiled once for each bucket and exploration mode; torch's own limits are 8 and 256.
_RECOMPILE_LIMIT = 1 << 30
# A first pass may leave behind what its own code does not fit: caches, and what modes were before.
_ROUNDS = 2
# What makes inductor capture CUDA graphs of its own.
_GRAPH_MODES = ("reduce-overhead", "max-autotune")
_GRAPH_OPTION = "triton.cudagraphs"

_log = logging.getLogger("aioinfer")

RunRows: TypeAlias = Callable[[list[TensorDictBase], Mode], object]


def compiler(compile: bool | Mapping[str, Any], *, cuda_graphs: bool) -> Compile | None:
    """What compiles a function for ``InferenceServer(compile=...)``; ``None``: nothing is compiled.

    Args:
        compile: whether to compile, or the options of ``torch.compile``, by default with ``dynamic=False``, so that
            there is code for each size of a batch.
        cuda_graphs: whether CUDA graphs are captured.

    Raises:
        TypeError: ``compile`` is neither a bool nor a mapping, or has options that ``torch.compile`` does not have.
        ValueError: both are to capture CUDA graphs; or the options make constants of weights.
    """
    if compile is False:
        return None
    if compile is not True and not isinstance(compile, Mapping):
        raise TypeError(f"compile must be a bool, or a dictionary of options of torch.compile, got {compile!r}")
    options: dict[str, Any] = {"dynamic": False, **({} if compile is True else compile)}
    inductor = options.get("options") or {}
    if inductor.get("freezing"):
        raise ValueError("compile has the option freezing, which makes constants of weights: updates are not seen")
    if cuda_graphs and (options.get("mode") in _GRAPH_MODES or inductor.get(_GRAPH_OPTION)):
        raise ValueError(f"compile={compile!r} captures CUDA graphs of its own; leave that out, or cuda_graphs=True")
    compile_function: Compile = partial(torch.compile, **options)
    compile_function(lambda: None)  # so that wrong options are known at once
    return compile_function


class CompiledPlan:
    """Compiles the plan of a policy; or the policy, if the plan does something else with the first batch.

    The plan is compared before it is compiled, since compiled code rounds otherwise.

    Args:
        model: the policy.
        plan: of it.
        compile: compiles a function.
    """

    def __init__(self, model: Runner, plan: Plan, compile: Compile) -> None:
        self._model = model
        self._plan = plan
        self._compile = compile
        self._run: Runner | None = None

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        """Compute ``[B, ...]`` from ``[B, ...]``."""
        if self._run is None:
            checked = CheckedPlan(self._model, self._plan)
            checked(batch.copy())
            self._run = self._compile(self._model) if checked.plan is None else self._plan.compiled(self._compile)
        return self._run(batch)


class WarmUp:
    """Runs batches of all sizes, each twice, so that nothing is compiled or captured for the first one later.

    Args:
        example: one row, ``[*size]``.
        sizes: of the batches, in ascending order.
        all_modes: also in the exploration modes that a request may carry, beside the one in force by default. One
            in which the model raises is passed over: callers who use it get the error.
    """

    def __init__(self, example: TensorDictBase, sizes: Sequence[int], *, all_modes: bool) -> None:
        self._example = example
        self._sizes = sizes
        self._modes = MODES if all_modes else (INHERIT,)

    def __call__(self, run: RunRows, is_stopping: Callable[[], bool]) -> None:
        """Run all batches, on the thread that serves them later, the largest first.

        Args:
            run: is given the rows of a batch, and the exploration mode.
            is_stopping: whether to return before the end.
        """
        for mode in self._modes:  # code that reads the mode sees whether there was one before on this thread
            with use_mode(mode):
                pass
        with _many_recompiles():
            for _, size, mode in product(range(_ROUNDS), reversed(self._sizes), self._modes):
                if is_stopping():
                    return
                rows = [self._example.copy() for _ in range(size)]
                try:
                    run(rows, mode)
                except Exception as error:
                    if mode is INHERIT:
                        raise
                    _log.debug("the model can't be warmed up in exploration mode %s: %s", mode, describe(error))


def _many_recompiles() -> AbstractContextManager[Any]:
    """Let torch compile the same function as often as there are buckets and modes, in this thread."""
    if "torch._dynamo" not in sys.modules:  # nothing was given to torch.compile, and the import takes a second
        return nullcontext()
    config: Any = torch._dynamo.config
    limits = {"recompile_limit": _RECOMPILE_LIMIT, "accumulated_recompile_limit": _RECOMPILE_LIMIT}
    patched: AbstractContextManager[Any] = config.patch(**limits)
    return patched
