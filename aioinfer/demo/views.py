"""The views of a run: one line a second, or a live view by rich; and the summary at the end. Event loop only."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from aioinfer.demo.learning_curve import GOAL, WINDOW
from aioinfer.demo.metrics import Metrics

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 36
_LABEL_WIDTH = 14


class View(Protocol):
    """Shows the metrics."""

    interval: float
    """Seconds between two calls of ``show``."""

    def show(self, metrics: Metrics) -> None:
        """Show the metrics of this moment."""
        ...


def suits_live_view() -> bool:
    """Whether the output is a terminal that can redraw, and knows the characters to draw with."""
    from rich.console import Console

    console = Console()
    return sys.stdout.isatty() and not console.is_dumb_terminal and console.encoding.startswith("utf")


def summary(metrics: Metrics) -> str:
    """The metrics of the whole run, one to a line."""
    latest = f"{min(metrics.episodes, WINDOW)} of {metrics.episodes:,}"
    rows = (
        ("episode return", f"{_average(metrics)} over the latest {latest}"),
        ("frames/s", f"{metrics.rate:,.0f}"),
        ("policy version", f"{metrics.version}"),
        ("weights' age", _age(metrics)),
        ("batch size", f"{metrics.batch_size:.1f} on average"),
    )
    return "\n".join([f"  {label:<{_LABEL_WIDTH}}  {text}" for label, text in rows])


def _average(metrics: Metrics) -> str:
    return "-" if metrics.average_return is None else f"{metrics.average_return:.1f}"


def _age(metrics: Metrics) -> str:
    return "untrained" if metrics.weights_age is None else f"{metrics.weights_age * 1e3:.0f} ms"


class _PlainView:
    interval = 1.0

    def show(self, metrics: Metrics) -> None:
        print(
            f"{metrics.elapsed:5.1f} s  return {_average(metrics)} ({metrics.episodes:,} episodes)"
            f"  {metrics.rate:,.0f} frames/s  version {metrics.version} ({_age(metrics)})"
            f"  batch {metrics.batch_size:.1f}",
            flush=True,
        )


@contextmanager
def plain_view(title: str) -> Iterator[View]:
    """Show one line a second, for logs and pipes."""
    print(title, flush=True)
    yield _PlainView()


class _LiveView:
    interval = 0.2

    def __init__(self, live: Live, title: str, seconds: float) -> None:
        self._live = live
        self._title = title
        self._seconds = seconds
        self._returns: deque[float] = deque(maxlen=_CURVE_WIDTH)
        self._rates: deque[float] = deque(maxlen=_CURVE_WIDTH)

    def show(self, metrics: Metrics) -> None:
        self._returns.append(metrics.average_return or 0.0)
        self._rates.append(metrics.rate)
        self._live.update(self._panel(metrics), refresh=True)

    def _panel(self, metrics: Metrics) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", min_width=_LABEL_WIDTH)
        table.add_column(style="bold", justify="right", min_width=7)
        table.add_column(width=_CURVE_WIDTH)
        progress = ProgressBar(total=GOAL, completed=metrics.average_return or 0.0, width=_CURVE_WIDTH)
        table.add_row("episode return", _average(metrics), Text(_curve(self._returns, GOAL), style="green"))
        table.add_row("", "", progress)
        table.add_row("frames/s", f"{metrics.rate:,.0f}", Text(_curve(self._rates, max(self._rates)), style="cyan"))
        table.add_row("policy version", f"{metrics.version}")
        table.add_row("weights' age", _age(metrics))
        table.add_row("batch size", f"{metrics.batch_size:.1f}")
        table.add_row("episodes", f"{metrics.episodes:,}")
        foot = Text(
            f"{metrics.elapsed:.0f} of {self._seconds:g} s at most; the goal is a return of {GOAL:g}; Ctrl-C ends it",
            style="dim",
        )
        body = Group(table, Text(), foot)
        panel = Panel(body, title=self._title, title_align="left", border_style="blue", padding=(1, 2), width=80)
        # The terminal echoes ^C where the cursor is: in a line of its own it can't push the panel up.
        return Group(panel, Text())


def _curve(values: deque[float], top: float) -> str:
    return "".join([_BARS[min(round(value / top * 7), 7)] for value in values]) if top else ""


@contextmanager
def live_view(title: str, *, seconds: float) -> Iterator[View]:
    """Show a panel that is redrawn in place, and removed at the end."""
    from rich.live import Live

    # Drawn by the event loop when there is something new: no thread of rich's own.
    with Live(auto_refresh=False, transient=True) as live:
        yield _LiveView(live, title, seconds)
