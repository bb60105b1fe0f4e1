"""The parts of the report page, each a string of HTML: pictures, table, curves, environment, commands."""

import base64
import io
import os
import platform
import shlex
from collections.abc import Iterator, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from data_pipeline.description import read_description
from sctrain import __version__
from sctrain.evaluation.curves import Curve, chart
from sctrain.evaluation.results import TITLES, Figure, Result, Score
from sctrain.reporting.grids import GRID_COLUMNS, image_grid

HERO_COLUMNS = 20
STRIP_ROWS = 2
PACKAGES = ("torch", "deepspeed", "torch-fidelity", "webdataset")


class Column(NamedTuple):
    """One figure in the table, and in plain words below it."""

    heading: str
    form: str
    words: str


COLUMNS = {
    "fd": Column(
        "Frechet distance",
        "{:.2f}",
        "How far the images are from the training images as a crowd, seen through a small classifier. Lower is better; "
        "compare it with the real rows, which show what chance alone makes of it.",
    ),
    "agreement": Column(
        "Agreement",
        "{:.1%}",
        "How often the classifier recognises the class that was asked for. It alone would reward drawing one perfect "
        "example again and again: read it with recall.",
    ),
    "precision": Column("Precision", "{:.2f}", "Share of drawn images that lie among the real ones."),
    "recall": Column(
        "Recall",
        "{:.2f}",
        "Share of real images that lie among the drawn ones: variety. A collapsed model scores near zero.",
    ),
    "nn_ratio": Column(
        "Nearest neighbour",
        "{:.2f}",
        "Distance to the nearest training image, relative to that of unseen real images. Near 1 is natural; far below "
        "1 would be copying.",
    ),
    "ode_mse": Column(
        "Distance to ODE",
        "{:.4f}",
        "Mean squared distance, in model space, to the image that the teacher's ODE makes of the same noise.",
    ),
}


def hero(score: Score, pictures: Tensor) -> str:
    """The headline: what the best student draws in the fewest evaluations."""
    return f'<div class="hero">{_image(pictures, HERO_COLUMNS, f"images drawn by {score.title}")}</div>'


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Large numbers with a few words below each."""
    return (
        '<div class="facts">' + "".join(f"<div><b>{n}</b><span>{escape(w)}</span></div>" for n, w in pairs) + "</div>"
    )


def strips(results: Sequence[Result]) -> str:
    """One row per way of drawing, all from the same noise, one class per column; real images last."""
    rows = [
        _strip(
            score.title, f"{score.nfe} network evaluation{'s' * (score.nfe > 1)}", result.pictures[score.method.name]
        )
        for result in results
        for score in result.scores
    ]
    real = next((result.real for result in results if result.real is not None), None)
    if real is not None:
        rows.append(_strip("Real images", "from the test split", real))
    return f'<div class="strips">{"".join(rows)}</div>'


def _strip(name: str, words: str, pictures: Tensor) -> str:
    columns = _columns(pictures)
    image = _image(pictures[: STRIP_ROWS * columns], columns, name, tile=64)
    return (
        f'<div class="name"><b>{escape(name)}</b><span>{escape(words)}</span></div><div class="picture">{image}</div>'
    )


def full_grids(results: Sequence[Result]) -> str:
    """All pictures of every way of drawing, folded away."""
    figures = [
        _full_grid(score.title, result.pictures[score.method.name]) for result in results for score in result.scores
    ]
    return f'<details><summary>Larger grids</summary><div class="grids">{"".join(figures)}</div></details>'


def _full_grid(title: str, pictures: Tensor) -> str:
    image = _image(pictures, _columns(pictures), title, tile=32)
    return f'<figure><h3>{escape(title)}</h3><div class="picture">{image}</div></figure>'


def _columns(pictures: Tensor) -> int:
    return min(GRID_COLUMNS, len(pictures))


def _image(pictures: Tensor, columns: int, words: str, tile: int = 48) -> str:
    buffer = io.BytesIO()
    image_grid(pictures, columns, tile=tile).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(words, quote=True)}" src="data:image/png;base64,{data}">'


def table(results: Sequence[Result], reference: dict[str, Any]) -> str:
    """All figures: real images first, then every run."""
    teacher = next((s.figures["fd"].mean for r in results for s in r.scores if r.role == "teacher"), None)
    names = [
        name for name in COLUMNS if name != "ode_mse" or any("ode_mse" in s.figures for r in results for s in r.scores)
    ]
    heads = ["", "Evaluations", *(COLUMNS[name].heading for name in names)]
    if teacher is not None:
        heads.insert(3, "of the teacher's")
    rows = [*_real_rows(names, reference, teacher is not None)]
    rows += [_score_row(score, names, teacher) for result in results for score in result.scores]
    head = "".join(f"<th>{head}</th>" for head in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _score_row(score: Score, names: Sequence[str], teacher: float | None) -> str:
    cells = [_cell(score.figures.get(name), COLUMNS[name].form) for name in names]
    if teacher is not None:
        cells.insert(1, f"{score.figures['fd'].mean / teacher:.2f} x" if score.role != "teacher" else "1")
    dot = f'<span class="dot {escape(score.role, quote=True)}"></span>'
    return _row(f"{dot}{escape(score.title)}", str(score.nfe), cells)


def _real_rows(names: Sequence[str], reference: dict[str, Any], ratio: bool) -> Iterator[str]:
    """A resample of the training split, and the test split, under the same measures."""
    if not reference:
        return
    resample, test = {"fd": reference["fd_resample"]}, {"nn_ratio": 1.0}
    test |= {name: reference[f"{name}_test"] for name in ("fd", "agreement", "precision", "recall")}
    for title, values in (("Real: training resample", resample), ("Real: test split", test)):
        cells = [COLUMNS[name].form.format(values[name]) if name in values else "" for name in names]
        if ratio:
            cells.insert(1, "")
        yield _row(f'<span class="dot"></span>{title}', "", cells, "real")


def _row(title: str, nfe: str, cells: Sequence[str], kind: str = "") -> str:
    return f'<tr class="{kind}"><td>{title}</td><td>{nfe}</td>' + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"


def _cell(figure: Figure | None, form: str) -> str:
    if figure is None:
        return ""
    spread = f"<small>spread {form.format(figure.spread)}</small>" if figure.seeds > 1 else ""
    return form.format(figure.mean) + spread


def glossary() -> str:
    words = "".join(f"<div><dt>{c.heading}</dt><dd>{c.words}</dd></div>" for c in COLUMNS.values())
    return f"<dl>{words}</dl>"


def curves(results: Sequence[Result], reference: dict[str, Any]) -> str:
    """Quality, losses and tangent norms over images seen."""
    charts = [_chart("Frechet distance", "of each published snapshot", _quality(results), reference)]
    charts += [
        _chart(
            f"Loss, {TITLES.get(result.role, result.role)}",
            "mean over a status interval",
            [_training(result, "loss/all")],
        )
        for result in results
    ]
    tangents = [_training(result, "tangent_norm/all") for result in results]
    charts.append(_chart("Tangent norm", "0: one answer all along a trajectory", tangents))
    return f'<div class="charts">{"".join(charts)}</div>'


def _chart(title: str, words: str, lines: Sequence[Curve], reference: dict[str, Any] | None = None) -> str:
    lines = [line for line in lines if line.x]
    if not lines:
        return ""
    levels = [("test split", reference["fd_test"]), ("resample", reference["fd_resample"])] if reference else []
    drawing = chart(lines, levels=levels, log=bool(levels))
    return f"<figure><h3>{escape(title)}</h3><p>{escape(words)}</p>{drawing}</figure>"


def _quality(results: Sequence[Result]) -> list[Curve]:
    """The teacher's better solver, and the shortest way of each student."""
    found = []
    for result in results:
        points = [(n, result.scores_at(n)[0]) for n in dict.fromkeys(line["images"] for line in result.lines)]
        label = result.scores[0].title if result.scores else ""
        found.append(Curve(result.role, label, [n for n, _ in points], [s.figures["fd"].mean for _, s in points]))
    return found


def _training(result: Result, name: str) -> Curve:
    points = [(line["images"], line[name]) for line in result.stats if line.get(name) is not None]
    title = TITLES.get(result.role, result.role)
    return Curve(result.role, title, [x for x, _ in points], [y for _, y in points])


def runs_table(results: Sequence[Result]) -> str:
    """What was trained, how fast, on how many ranks."""
    rows = []
    for result in results:
        status, config = result.status, result.config
        seconds, images = status.get("wall_seconds", 0), status.get("images", 0)
        cells = [
            config.objective.name if config else "",
            f"{images:,}",
            f"{config.batch.global_size:,}" if config else "",
            str(status.get("ranks", "")),
            f"{seconds / 60:.1f}",
            f"{images / seconds:,.0f}" if seconds else "",
            status.get("state", "not started"),
        ]
        dot = f'<span class="dot {escape(result.role, quote=True)}"></span>'
        rows.append(f"<tr><td>{dot}{escape(TITLES.get(result.role, result.role))}</td>" + _cells(cells) + "</tr>")
    heads = ("", "Objective", "Images seen", "Global batch", "Ranks", "Minutes", "Images/s", "State")
    head = "".join(f"<th>{head}</th>" for head in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _cells(cells: Sequence[str]) -> str:
    return "".join(f"<td>{escape(cell)}</td>" for cell in cells)


def environment() -> str:
    """Versions and machine of whoever writes the report."""
    packages = ", ".join([f"sctrain {__version__}", *(f"{package} {version(package)}" for package in PACKAGES)])
    machine = (
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    )
    return f'<p class="soft versions">{escape(packages)}. {escape(machine)}.</p>'


def commands(results: Sequence[Result], out: Path) -> str:
    """What makes this page again, from the resolved descriptions that lie in the run folders."""
    lines = [_prepare(result) for result in results]
    for result in results:
        root = shlex.quote(str(result.run.root))
        lines += [f"sctrain train {shlex.quote(str(result.run.config))}", f"sctrain evaluate {root}"]
    named = " ".join(shlex.quote(f"{result.role}={result.run.root}") for result in results)
    lines.append(f"sctrain report {named} --out {shlex.quote(str(out))}")
    return f"<pre>{escape(chr(10).join(dict.fromkeys(filter(None, lines))))}</pre>"


def _prepare(result: Result) -> str | None:
    if result.config is None:
        return None
    url = result.config.data.url
    about = read_description(url)
    if about.name == "digits":
        return f"sctrain prepare digits {shlex.quote(url)}"
    return f"# data: {url} ({about.name}, from {about.source})"
