"""What is seen: one line a second, or a live view by rich; and the summary at the end."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from aioinfer.demo.curve import GOAL, WINDOW
from aioinfer.demo.figures import Figures

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

__all__ = ["View", "live_view", "plain_view", "suits_live_view", "summary"]

_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 36
_LABEL_WIDTH = 14


class View(Protocol):
    """Shows how the run goes."""

    interval: float
    """Seconds between two calls of ``show``."""

    def show(self, figures: Figures) -> None:
        """Show the figures of now."""
        ...


def suits_live_view() -> bool:
    """Whether the output is a terminal that can redraw, and knows the characters to draw with."""
    from rich.console import Console

    console = Console()
    return sys.stdout.isatty() and not console.is_dumb_terminal and console.encoding.startswith("utf")


def summary(figures: Figures) -> str:
    """The figures of the whole run, one to a line."""
    return "\n".join([f"  {label:<{_LABEL_WIDTH}}  {text}" for label, text in _rows(figures)])


def _rows(figures: Figures) -> list[tuple[str, str]]:
    return [
        (
            "episode return",
            f"{_average(figures)} over the latest {min(figures.episodes, WINDOW)} of {figures.episodes:,}",
        ),
        ("frames/s", f"{figures.rate:,.0f}"),
        ("policy version", f"{figures.version}"),
        ("weights' age", _age(figures)),
        ("batch size", f"{figures.batch_size:.1f} on average"),
    ]


def _average(figures: Figures) -> str:
    return "-" if figures.average_return is None else f"{figures.average_return:.1f}"


def _age(figures: Figures) -> str:
    return "untrained" if figures.weights_age is None else f"{figures.weights_age * 1e3:.0f} ms"


# -- one line a second -----------------------------------------------------------------------------


class _PlainView:
    interval = 1.0

    def show(self, figures: Figures) -> None:
        print(
            f"{figures.elapsed:5.1f} s  return {_average(figures)} ({figures.episodes:,} episodes)"
            f"  {figures.rate:,.0f} frames/s  version {figures.version} ({_age(figures)})"
            f"  batch {figures.batch_size:.1f}",
            flush=True,
        )


@contextmanager
def plain_view(title: str) -> Iterator[View]:
    """Show one line a second, for logs and pipes."""
    print(title, flush=True)
    yield _PlainView()


# -- the live view ---------------------------------------------------------------------------------


class _LiveView:
    interval = 0.2

    def __init__(self, live: Live, title: str, seconds: float) -> None:
        self._live = live
        self._title = title
        self._seconds = seconds
        self._returns: deque[float] = deque(maxlen=_CURVE_WIDTH)
        self._rates: deque[float] = deque(maxlen=_CURVE_WIDTH)

    def show(self, figures: Figures) -> None:
        self._returns.append(figures.average_return or 0.0)
        self._rates.append(figures.rate)
        self._live.update(self._panel(figures), refresh=True)

    def _panel(self, figures: Figures) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", min_width=_LABEL_WIDTH)
        table.add_column(style="bold", justify="right", min_width=7)
        table.add_column(width=_CURVE_WIDTH)
        progress = ProgressBar(total=GOAL, completed=figures.average_return or 0.0, width=_CURVE_WIDTH)
        table.add_row("episode return", _average(figures), Text(_curve(self._returns, GOAL), style="green"))
        table.add_row("", "", progress)
        table.add_row("frames/s", f"{figures.rate:,.0f}", Text(_curve(self._rates, max(self._rates)), style="cyan"))
        table.add_row("policy version", f"{figures.version}")
        table.add_row("weights' age", _age(figures))
        table.add_row("batch size", f"{figures.batch_size:.1f}")
        table.add_row("episodes", f"{figures.episodes:,}")
        foot = Text(
            f"{figures.elapsed:.0f} of {self._seconds:g} s at most; the goal is a return of {GOAL:g}; Ctrl-C ends it",
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
