"""A progress bar of a collector, by rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aioinfer.collectors.collector import AsyncBatchedCollector

__all__ = ["show_progress"]


@contextmanager
def show_progress(collector: AsyncBatchedCollector) -> Iterator[Callable[[], None]]:
    """Show a progress bar inside a ``with`` block; what it gives is to be called after each batch.

    Raises:
        ImportError: rich is not installed.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.completed:,.0f} frames"),
        BarColumn(),
        TextColumn("{task.fields[rate]:,.0f}/s"),
        TextColumn("{task.fields[episodes]:,} episodes"),
        TextColumn("return {task.fields[episode_return]}"),
        TextColumn("limited by {task.fields[limited_by]}"),
        TimeElapsedColumn(),
    )
    total = collector.total_frames if collector.total_frames >= 0 else None
    # Drawn after each batch, by the reader: no thread of rich's own.
    with Progress(*columns, auto_refresh=False) as bar:
        task = bar.add_task("", total=total, rate=0.0, episodes=0, episode_return="-", limited_by="-")

        def update() -> None:
            stats = collector.stats()
            bar.update(
                task,
                completed=stats.frames,
                rate=stats.frames_per_second,
                episodes=stats.episodes,
                episode_return="-" if stats.episode_return is None else f"{stats.episode_return:.1f}",
                limited_by=stats.limited_by,
                refresh=True,
            )

        yield update
