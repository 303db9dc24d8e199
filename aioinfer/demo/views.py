"""What is seen: one line a second, or a live view by rich; and the summary at the end."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from aioinfer.demo.figures import Figures
from aioinfer.stats import Percentiles

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

__all__ = ["View", "live_view", "plain_view", "suits_live_view", "summary"]

_BARS = "▁▂▃▄▅▆▇█"
_LABEL_WIDTH = 10


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
    mean_return = "-" if figures.mean_return is None else f"{figures.mean_return:.1f}"
    return [
        ("frames/s", f"{figures.rate:,.0f}"),
        ("  tasks", f"{figures.task_rate:,.0f}"),
        ("  threads", f"{figures.thread_rate:,.0f}"),
        ("batch size", f"{figures.batch_size:.1f} on average"),
        ("queue wait", f"{_milliseconds(figures.queue_wait)} of the latest requests"),
        ("forward", f"{_milliseconds(figures.forward)} of the latest passes"),
        ("episodes", f"{figures.episodes:,} finished, mean return {mean_return}"),
        ("requests", ", ".join([f"{count:,} {outcome}" for outcome, count in figures.outcomes.items()])),
    ]


def _milliseconds(percentiles: Percentiles) -> str:
    return f"{percentiles.p50 * 1e3:.2f} ms p50, {percentiles.p99 * 1e3:.2f} ms p99"


# -- one line a second -----------------------------------------------------------------------------


class _PlainView:
    interval = 1.0

    def show(self, figures: Figures) -> None:
        mean_return = "-" if figures.mean_return is None else f"{figures.mean_return:.1f}"
        print(
            f"{figures.elapsed:5.1f} s  {figures.rate:,.0f} frames/s"
            f" ({figures.task_rate:,.0f} tasks, {figures.thread_rate:,.0f} threads)"
            f"  batch {figures.batch_size:.1f}"
            f"  wait {figures.queue_wait.p50 * 1e3:.2f}/{figures.queue_wait.p99 * 1e3:.2f} ms"
            f"  forward {figures.forward.p50 * 1e3:.2f} ms"
            f"  episodes {figures.episodes:,}  return {mean_return}  "
            + " ".join([f"{outcome} {count:,}" for outcome, count in figures.outcomes.items()]),
            flush=True,
        )


@contextmanager
def plain_view(title: str) -> Iterator[View]:
    """Show one line a second, for logs and pipes."""
    print(title, flush=True)
    yield _PlainView()


# -- the live view ---------------------------------------------------------------------------------


class _LiveView:
    interval = 0.25

    def __init__(self, live: Live, title: str, seconds: float) -> None:
        self._live = live
        self._title = title
        self._seconds = seconds
        self._rates: deque[float] = deque(maxlen=36)

    def show(self, figures: Figures) -> None:
        self._rates.append(figures.rate)
        self._live.update(self._panel(figures), refresh=True)

    def _panel(self, figures: Figures) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        top = Table.grid(padding=(0, 2))
        top.add_column(style="dim", min_width=_LABEL_WIDTH)
        top.add_column(justify="right", min_width=9)
        top.add_column(width=self._rates.maxlen)
        rows = _rows(figures)
        curves = (
            Text(_curve(self._rates), style="green"),
            _share(figures.task_rate, figures.rate, style="cyan"),
            _share(figures.thread_rate, figures.rate, style="magenta"),
        )
        for (label, text), curve in zip(rows, curves, strict=False):
            top.add_row(label, Text(text, style="bold"), curve)
        bottom = Table.grid(padding=(0, 2))
        bottom.add_column(style="dim", min_width=_LABEL_WIDTH)
        bottom.add_column()
        for label, text in rows[len(curves) :]:
            bottom.add_row(label, text)
        foot = Table.grid(padding=(0, 2))
        done = min(figures.elapsed, self._seconds)
        foot.add_row(
            ProgressBar(total=self._seconds, completed=done, width=40),
            f"{done:.0f} of {self._seconds:g} s",
            Text("Ctrl-C ends it", style="dim"),
        )
        body = Group(top, Text(), bottom, Text(), foot)
        panel = Panel(body, title=self._title, title_align="left", border_style="blue", padding=(1, 2), width=80)
        # The terminal echoes ^C where the cursor is: in a line of its own it can't push the panel up.
        return Group(panel, Text())


def _curve(rates: deque[float]) -> str:
    top = max(rates)
    return "".join([_BARS[round(rate / top * (len(_BARS) - 1))] for rate in rates]) if top else ""


def _share(part: float, whole: float, *, style: str) -> RenderableType:
    from rich.progress_bar import ProgressBar

    return ProgressBar(total=whole or 1.0, completed=part, width=36, complete_style=style, finished_style=style)


@contextmanager
def live_view(title: str, *, seconds: float) -> Iterator[View]:
    """Show a panel that is redrawn in place, and removed at the end."""
    from rich.live import Live

    # Drawn by the event loop when there is something new: no thread of rich's own.
    with Live(auto_refresh=False, transient=True) as live:
        yield _LiveView(live, title, seconds)
