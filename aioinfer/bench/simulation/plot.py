"""A drawing of what a simulation found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Final

from aioinfer.bench.simulation.comparison import Comparison

__all__ = ["draw"]

_STYLE: Final = """\
    text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2933 }
    .small { font-size: 12px; fill: #52606d }
    .page { fill: #ffffff }
    .line { fill: none; stroke: #cbd2d9 }
    .axis { fill: none; stroke: #52606d }
    .free { fill: none; stroke: #7b8794; stroke-width: 1.6 }
    .full { fill: none; stroke: #b7791f; stroke-width: 1.8 }
    .timer { fill: none; stroke: #8e5bb5; stroke-width: 1.8 }
    .linear { fill: none; stroke: #2f855a; stroke-width: 1.8 }
    .ours { fill: #2f6fb5; stroke: none }
    @media (prefers-color-scheme: dark) {
      text { fill: #e4e7eb }
      .small { fill: #9aa5b1 }
      .page { fill: #15191f }
      .line { stroke: #323f4b }
      .axis { stroke: #9aa5b1 }
      .free { stroke: #9aa5b1 }
      .full { stroke: #d9a441 }
      .timer { stroke: #bd93e0 }
      .linear { stroke: #4fb286 }
      .ours { fill: #5b9be0 }
    }"""
_SHAPES: Final[Mapping[str, Callable[[float, float], str]]] = {
    "free": lambda x, y: f'<circle class="free" cx="{x:.1f}" cy="{y:.1f}" r="5"/>',
    "full": lambda x, y: f'<path class="full" d="M{x - 4.5:.1f} {y - 4.5:.1f}h9v9h-9z"/>',
    "timer": lambda x, y: f'<path class="timer" d="M{x:.1f} {y - 5.5:.1f}l5.5 9.5h-11z"/>',
    "linear": lambda x, y: f'<path class="linear" d="M{x - 4.5:.1f} {y - 4.5:.1f}l9 9m0 -9l-9 9"/>',
    "ours": lambda x, y: f'<circle class="ours" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>',
}
_LABELS: Final = {
    "free": "leave when free",
    "full": "full batches, best size",
    "timer": "timer, best time and size",
    "linear": "linear model",
    "ours": "aioinfer",
}
_TITLE: Final = (
    "The mean latency of five rules for batches on some traces, as a multiple of that of a clairvoyant. The simple "
    "rules have the parameters that suit the trace best; that of aioinfer has none."
)
_LEFT, _RIGHT, _TOP, _STEP, _WIDTH = 312, 704, 92, 22, 720
_MOST = 2.0


def draw(comparisons: Sequence[Comparison]) -> str:
    """Draw the latency of each rule, by that of the clairvoyant, as SVG; a row for each case."""
    bottom = _TOP + _STEP * len(comparisons)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{bottom + 46}" '
        f'viewBox="0 0 {_WIDTH} {bottom + 46}" role="img" aria-labelledby="title">',
        f'  <title id="title">{_TITLE}</title>',
        f"  <style>\n{_STYLE}\n  </style>",
        f'  <rect class="page" width="{_WIDTH}" height="{bottom + 46}" rx="8"/>',
    ]
    spots = ((16, 26), (180, 26), (384, 26), (16, 50), (180, 50))
    for (rule, label), (left, top) in zip(_LABELS.items(), spots, strict=True):
        parts.append(f'  {_SHAPES[rule](left + 6, top)}<text x="{left + 20}" y="{top + 4.5}">{label}</text>')
    for tenths in range(10, int(_MOST * 10) + 1, 2):
        x = _at(tenths / 10)
        parts.append(f'  <path class="{"axis" if tenths == 10 else "line"}" d="M{x:.1f} {_TOP - 14}V{bottom}"/>')
        parts.append(
            f'  <text class="small" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tenths / 10:.1f}</text>'
        )
    parts.append(
        f'  <text class="small" x="{(_LEFT + _RIGHT) / 2}" y="{bottom + 36}" text-anchor="middle">'
        "mean latency, as a multiple of that of a clairvoyant</text>"
    )
    for number, comparison in enumerate(comparisons):
        y = _TOP + number * _STEP
        parts.append(f'  <text class="small" x="16" y="{y + 4}">{escape(comparison.case)}</text>')
        for rule, shape in _SHAPES.items():
            parts.append(f"  {shape(_at(min(comparison.clairvoyant_ratio(rule), _MOST)), y)}")
    return "\n".join([*parts, "</svg>", ""])


def _at(ratio: float) -> float:
    return _LEFT + (ratio - 1.0) / (_MOST - 1.0) * (_RIGHT - _LEFT)
