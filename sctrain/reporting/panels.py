"""Small panels of curves on one figure, for people: PNG, PDF or SVG by the ending of the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, NullLocator

from sctrain.errors import UserError

INK, FAINT = "#30343b", "#d9dce1"
COLOURS = ("#2f6db5", "#d1622b", "#3b8f5a", "#8a5bb0")
SEQUENCE = colormaps["viridis"]
MOST_ROWS_OF_LEGEND = 3
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.formatter.useoffset": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Curve:
    """One line; `held` draws each value until the next x, and takes one more x than values or as many."""

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    held: bool = False


@dataclass(frozen=True)
class SecondScale:
    """A scale below the panel's own: its name, the map from x and back, and where its ticks are."""

    label: str
    forward: Callable[[Any], Any]
    backward: Callable[[Any], Any]
    ticks: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """One set of axes. `ordered` curves, stages for example, take the colours of a sequence."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    scales: tuple[Literal["linear", "log"], Literal["linear", "log"]] = ("linear", "linear")
    counts: bool = False  # x are counts of images
    ordered: bool = False
    second: SecondScale | None = None
    legend: Literal["best", "upper left", "lower left"] = "best"


def draw_panels(panels: Sequence[Panel], title: str, out: Path) -> None:
    """Write the figure to `out`; UserError if it cannot be written."""
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with rc_context(STYLE):
        figure = Figure(
            figsize=(4.4 * columns, 3.3 * rows + 0.4), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        )
        figure.suptitle(title, x=0.008, ha="left", fontsize=12, fontweight="bold")
        for number, panel in enumerate(panels, 1):
            _draw(figure.add_subplot(rows, columns, number), panel)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(out, dpi=140)
        except OSError as error:
            raise UserError(f"{out} cannot be written ({error.strerror}); choose another --out") from error


def _draw(axes: Axes, panel: Panel) -> None:
    for depth, (curve, colour) in enumerate(zip(panel.curves, _colours(panel), strict=True)):
        look: dict[str, Any] = {"color": colour, "linewidth": 1.6, "zorder": 3 - 0.01 * depth}  # the first is on top
        label = curve.label or None
        if curve.held:
            edges = curve.x if len(curve.x) > len(curve.y) else [*curve.x, curve.x[-1]]
            axes.stairs(curve.y, edges, baseline=None, label=label, **look)
        else:
            axes.plot(curve.x, curve.y, label=label, **look)
    axes.set_xscale(panel.scales[0])
    axes.set_yscale(panel.scales[1])
    if panel.scales[1] == "linear":
        highest = max(max(curve.y) for curve in panel.curves)
        axes.set_ylim(-0.03 * highest, 1.1 * highest)
        axes.yaxis.set_major_formatter(FuncFormatter(_short))
    if panel.counts:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_title(panel.title, pad=8)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, which="both")
    if panel.second:
        _add_scale(axes, panel.second)
    if any(curve.label for curve in panel.curves):
        columns = math.ceil(len(panel.curves) / MOST_ROWS_OF_LEGEND)
        axes.legend(
            loc=panel.legend,
            frameon=False,
            fontsize=8.5,
            ncols=columns,
            handlelength=1.4,
            columnspacing=1.0,
            borderaxespad=1.1,
        )


def _short(value: float, _: object) -> str:
    """0.25, 4e-4."""
    if value == 0 or abs(value) >= 1e-2:
        return f"{value:.3g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def _colours(panel: Panel) -> list[Any]:
    count = len(panel.curves)
    if panel.ordered and count > 1:
        return [SEQUENCE(0.9 * (1 - i / (count - 1))) for i in range(count)]
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _add_scale(axes: Axes, scale: SecondScale) -> None:
    below = axes.secondary_xaxis(-0.26, functions=(scale.forward, scale.backward))
    below.xaxis.set_major_locator(FixedLocator(list(scale.ticks)))
    below.xaxis.set_major_formatter("{x:g}")
    below.xaxis.set_minor_locator(NullLocator())
    below.set_xlabel(scale.label)
    below.tick_params(length=3, color=FAINT)
    below.spines["bottom"].set_color(FAINT)
