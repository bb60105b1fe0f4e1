"""Curves as inline SVG whose colours are CSS variables, so that a page decides between light and dark."""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

# matplotlib writes these placeholders; the page's colours replace them.
INK, FAINT = "#010101", "#020202"
SERIES = {"teacher": "#030303", "scd": "#040404", "sct": "#050505"}
OTHER = "#060606"
_VARIABLES = {
    INK: "var(--soft)",
    FAINT: "var(--line)",
    SERIES["teacher"]: "var(--teacher)",
    SERIES["scd"]: "var(--scd)",
    SERIES["sct"]: "var(--sct)",
    OTHER: "var(--ink)",
}


class Curve(NamedTuple):
    """One line; `role` decides its colour."""

    role: str
    label: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def chart(curves: Sequence[Curve], *, levels: Sequence[tuple[str, float]] = (), log: bool = False) -> str:
    """An <svg> of 360 x 230 units; x are images seen, `levels` are labelled horizontal lines."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "sctrain",
        "text.color": INK,
        "axes.edgecolor": FAINT,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.formatter.useoffset": False,
        "axes.labelcolor": INK,
        "font.size": 11,
    }
    with rc_context(style):
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for name, level in levels:
            axes.axhline(level, color=INK, linewidth=1, linestyle=(0, (1, 2)))
            axes.annotate(name, (1, level), (0, 2), ("axes fraction", "data"), "offset points", ha="right", fontsize=10)
        for curve in curves:
            _draw(axes, curve)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("images seen")
        axes.grid(color=FAINT, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=0)
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=10)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue())


def _draw(axes, curve: Curve) -> None:
    few = len(curve.x) <= 12
    axes.plot(
        curve.x,
        curve.y,
        color=SERIES.get(curve.role, OTHER),
        label=curve.label,
        linewidth=1.8,
        linestyle="--" if curve.dashed else "-",
        marker="o" if few else None,
        markersize=3.5,
    )


def _inline(svg: str) -> str:
    """Without prologue, fixed size, fonts and the identifiers that every chart repeats."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick|legend)_\d+"', "", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", svg)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, variable)
    return svg
