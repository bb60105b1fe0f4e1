"""Figures over labelled points: the mean of several seeds as a line, their spread as a bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure


def spread_plot(
    points: Sequence[str], panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], path: Path
) -> bool:
    """One panel per title, in it a line per name with the values of all seeds at each point; no empty panels.

    Writes nothing and returns False where all of them are.
    """
    shown = {title: lines for title, lines in panels.items() if any(any(values) for values in lines.values())}
    if not shown:
        return False
    figure = Figure(figsize=(5.5 * len(shown), 4), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)
    for axis, (title, lines) in zip(axes[0], shown.items(), strict=True):
        for name, values in lines.items():
            known = [(index, seeds) for index, seeds in enumerate(values) if seeds]
            means = [fmean(seeds) for _, seeds in known]
            low = [mean - min(seeds) for mean, (_, seeds) in zip(means, known, strict=True)]
            high = [max(seeds) - mean for mean, (_, seeds) in zip(means, known, strict=True)]
            axis.errorbar([index for index, _ in known], means, yerr=[low, high], marker="o", capsize=3, label=name)
        axis.set_xticks(range(len(points)), points, rotation=30, ha="right", fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True
