"""Draw the learning curves of the examples, with five seeds for each: ``python docs/learning_curves.py``.

A run takes a minute or so. Its curve is kept in a directory, by default ``learning-curves``, and only runs that are
missing there are made. The drawing is docs/images/learning-curves.svg.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

DOCS: Final = Path(__file__).resolve().parent
SEEDS: Final = range(5)

Curve = Sequence[tuple[int, float]]
"""Frames so far, and the mean return of the latest 100 episodes."""


@dataclass(frozen=True)
class Figure:
    """One of the four: what is run, and how it is drawn."""

    title: str
    run: Callable[[int], Curve]
    solved: float
    returns: tuple[float, float]


class Result(NamedTuple):
    """The curves of all seeds at the same frames."""

    frames: NDArray[np.float64]
    returns: NDArray[np.float64]  # [seeds, frames]


def figures() -> dict[str, Figure]:
    """The four, by the name under which their curves are kept."""
    sys.path.insert(0, str(DOCS / "examples"))
    import dqn
    import ppo

    return {
        "ppo-cartpole": Figure("PPO, CartPole-v1", lambda seed: ppo.learn("CartPole-v1", seed), 475, (0, 500)),
        "ppo-acrobot": Figure("PPO, Acrobot-v1", lambda seed: ppo.learn("Acrobot-v1", seed), -100, (-500, 0)),
        "ppo-pendulum": Figure("PPO, Pendulum-v1", lambda seed: ppo.learn("Pendulum-v1", seed), -250, (-1500, 0)),
        "dqn-cartpole": Figure("DQN, CartPole-v1", dqn.learn, 475, (0, 500)),
    }


def run_missing(results: Path, wanted: dict[str, Figure]) -> None:
    """Run what has no curve yet, one after the other."""
    results.mkdir(parents=True, exist_ok=True)
    for name, figure in wanted.items():
        for seed in SEEDS:
            kept = results / f"{name}-{seed}.json"
            if not kept.exists():
                print(f"{figure.title}, seed {seed}", flush=True)
                started = time.monotonic()
                curve = figure.run(seed)
                kept.write_text(json.dumps({"seconds": time.monotonic() - started, "curve": curve}), encoding="utf-8")


def load(results: Path, name: str) -> Result:
    """Read the curves of all seeds."""
    curves = [json.loads((results / f"{name}-{seed}.json").read_text(encoding="utf-8"))["curve"] for seed in SEEDS]
    frames = np.linspace(0, min(curve[-1][0] for curve in curves), 61)[1:]
    # A curve begins with its first episodes; an environment that ends none at first has nothing to show there.
    begun = [np.array([point for point in curve if point[1]]) for curve in curves]
    returns = [np.interp(frames, curve[:, 0], curve[:, 1], left=np.nan) for curve in begun]
    together = ~np.isnan(returns).any(axis=0)
    return Result(frames[together], np.array(returns)[:, together])


_STYLE: Final = """\
    text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2933 }
    .small { font-size: 12px; fill: #52606d }
    .page { fill: #ffffff }
    .line { fill: none; stroke: #cbd2d9 }
    .solved { fill: none; stroke: #2f855a; stroke-dasharray: 5 4 }
    .range { fill: #2f6fb5; fill-opacity: 0.25 }
    .mean { fill: none; stroke: #2f6fb5; stroke-width: 2.2 }
    @media (prefers-color-scheme: dark) {
      text { fill: #e4e7eb }
      .small { fill: #9aa5b1 }
      .page { fill: #15191f }
      .line { stroke: #323f4b }
      .solved { stroke: #4fb286 }
      .range { fill: #5b9be0 }
      .mean { stroke: #5b9be0 }
    }"""
_TITLE: Final = (
    "The mean return of the latest 100 episodes over the frames, for PPO on CartPole, Acrobot and Pendulum, and for "
    "DQN on CartPole: the mean of five seeds, and the range from the lowest to the highest. A dashed line is the goal."
)
_WIDTH, _HEIGHT = 720, 556
_PANEL_WIDTH, _PANEL_HEIGHT = 280, 180


def draw(drawn: Sequence[tuple[Figure, Result]]) -> str:
    """Draw four figures as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="title">',
        f'  <title id="title">{_TITLE}</title>',
        f"  <style>\n{_STYLE}\n  </style>",
        f'  <rect class="page" width="{_WIDTH}" height="{_HEIGHT}" rx="8"/>',
    ]
    for index, (figure, result) in enumerate(drawn):
        parts += _panel(figure, result, left=60 + index % 2 * 355, top=48 + index // 2 * 260)
    caption = "Mean return of the latest 100 episodes: mean and range of five seeds; dashed: the goal"
    parts.append(f'  <text class="small" x="{_WIDTH / 2:.0f}" y="{_HEIGHT - 16}" text-anchor="middle">{caption}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(figure: Figure, result: Result, *, left: float, top: float) -> list[str]:
    low, high = figure.returns
    bottom, last = top + _PANEL_HEIGHT, float(result.frames[-1])

    def at(frames: float, episode_return: float) -> str:
        x = left + frames / last * _PANEL_WIDTH
        return f"{x:.1f} {bottom - (episode_return - low) / (high - low) * _PANEL_HEIGHT:.1f}"

    def path(returns: NDArray[np.float64], frames: NDArray[np.float64] = result.frames) -> str:
        return "L".join(map(at, frames.tolist(), returns.tolist()))

    parts = [f'  <text x="{left}" y="{top - 14}">{figure.title}</text>']
    for mark in np.linspace(low, high, 6 if high - low == 500 else 4).tolist():
        parts.append(f'  <path class="line" d="M{at(0, mark)}h{_PANEL_WIDTH}"/>')
        y = float(at(0, mark).split()[1]) + 4
        parts.append(f'  <text class="small" x="{left - 8}" y="{y:.1f}" text-anchor="end">{mark:g}</text>')
    for part in (0.0, 0.5, 1.0):
        x = left + part * _PANEL_WIDTH
        label = f"{part * last:,.0f}" + (" frames" if part == 1.0 else "")
        anchor = "end" if part == 1.0 else "middle"
        parts.append(f'  <text class="small" x="{x:.1f}" y="{bottom + 18}" text-anchor="{anchor}">{label}</text>')
    lowest, highest = result.returns.min(axis=0), result.returns.max(axis=0)
    around = f"M{path(highest)}L{path(lowest[::-1], result.frames[::-1])}Z"
    parts.append(f'  <path class="range" d="{around}"/>')
    parts.append(f'  <path class="mean" d="M{path(result.returns.mean(axis=0))}"/>')
    parts.append(f'  <path class="solved" d="M{at(0, figure.solved)}h{_PANEL_WIDTH}"/>')
    return parts


def main() -> None:
    """Run what is missing, draw, and print a table of how the runs ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("learning-curves"), help="where the curves are kept")
    options = parser.parse_args()
    wanted = figures()
    run_missing(options.results, wanted)
    results = {name: load(options.results, name) for name in wanted}
    drawing = draw([(figure, results[name]) for name, figure in wanted.items()])
    (DOCS / "images" / "learning-curves.svg").write_text(drawing, encoding="utf-8")
    for name, figure in wanted.items():
        last = sorted(results[name].returns[:, -1].tolist())
        print(f"| {figure.title} | {figure.solved:g} | {' '.join(f'{one:.0f}' for one in last)} |")


if __name__ == "__main__":
    main()
