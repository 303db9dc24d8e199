"""The learning curve as a picture."""

from __future__ import annotations

from pathlib import Path

from aioinfer.demo.curve import GOAL, WINDOW, LearningCurve

__all__ = ["save_plot"]


def save_plot(curve: LearningCurve, path: Path, *, title: str) -> None:
    """Draw returns and policy versions over time into a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no window, and no state that outlives the picture

    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    figure.suptitle(title)
    returns, versions = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])

    at = [episode[0] for episode in curve.episodes]
    returns.scatter(
        at,
        [episode[1] for episode in curve.episodes],
        s=9,
        alpha=0.25,
        linewidths=0,
        color="tab:blue",
        label="an episode",
    )
    returns.plot(
        at, [episode[2] for episode in curve.episodes], color="tab:blue", lw=2, label=f"average over {WINDOW} episodes"
    )
    returns.axhline(GOAL, color="tab:green", ls="--", lw=1.2, label=f"goal: {GOAL:g}")
    for first in [at for at, version in curve.versions if version > 0][:1]:
        returns.axvline(first, color="tab:orange", ls=":", lw=1.2, label="first weights from the trainer")
    returns.set_ylim(0, 520)
    returns.set_ylabel("return")
    returns.legend(loc="center left", frameon=False)

    # The last version is drawn up to the last episode.
    steps = [*curve.versions, *[(at[-1], version) for _, version in curve.versions[-1:] if at]]
    versions.step([step[0] for step in steps], [step[1] for step in steps], where="post", color="tab:orange", lw=2)
    versions.set_ylim(bottom=0)
    versions.set_xlim(left=0)
    versions.set_ylabel("policy version")
    versions.set_xlabel("seconds since the start")
    for axes in (returns, versions):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
