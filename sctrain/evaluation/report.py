"""The report of a teacher and its students: one self-contained page, and all figures by flat names beside it.

Reads run folders only; nothing is trained or drawn here. What is not there yet is said, not filled in.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from sctrain.errors import UserError
from sctrain.evaluation import page
from sctrain.evaluation.results import TITLES, Result, Score, flat_figures
from sctrain.files import write_json, write_text

STUDENTS = ("scd", "sct")


def write_report(runs: dict[str, Path], out: Path) -> Path:
    """Write `report.html` and `figures.json` into the folder `out`.

    Args:
        runs: run folders by role: "teacher", "scd", "sct"; any may be absent or unfinished.
        out: made if missing.

    Returns:
        The page's path.

    Raises:
        UserError: a run folder does not exist, or `out` cannot be written.

    """
    results = [Result.of(role, folder) for role, folder in runs.items()]
    text = _page(results, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "figures.json", flat_figures(results))
        write_text(out / "report.html", text)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); choose another --out") from error
    return out / "report.html"


def _page(results: Sequence[Result], out: Path) -> str:
    reference = next((result.reference for result in results if result.reference), {})
    scored = [result for result in results if result.scores]
    sections = [
        _opening(scored, reference),
        *(f'<p class="missing">{escape(sentence)}</p>' for sentence in _missing(results)),
        _section("From the same noise", _NOISE, page.strips(scored) + page.full_grids(scored)) if scored else "",
        _section("Figures", _figures_words(scored), page.table(scored, reference) + page.glossary()) if scored else "",
        _section("Training", "", page.curves(results, reference)),
        _section("Runs", "", page.runs_table(results) + page.environment()),
        _section("Make it again", _AGAIN, page.commands(results, out)),
    ]
    css = Path(__file__).with_name("report.css").read_text()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>sctrain report</title>\n<style>\n{css}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main></body></html>\n"
    )


_NOISE = (
    "Every row starts from the same noise and asks for the same classes, one per column. A good student draws what its "
    "teacher's differential equation would have arrived at, in a fraction of the work."
)
_AGAIN = "Repeating a command continues where it stopped. The descriptions in the run folders are complete."


def _opening(scored: Sequence[Result], reference: dict[str, Any]) -> str:
    """Headline, the best student's pictures, and the few numbers to remember."""
    eyebrow = '<p class="eyebrow">sctrain report</p>'
    found = [(result, score) for result in scored for score in result.scores if score.nfe == 1]
    if not found:
        state = "Nothing has been scored yet." if not scored else "No one-step generator has been scored yet."
        return f"{eyebrow}<h1>{state}</h1>"
    result, score = min(found, key=lambda pair: pair[1].figures["fd"].mean)
    title = "<h1>These images were drawn in one network evaluation each</h1>"
    lead = f'<p class="lead">{escape(_lead(result, score, scored))}</p>'
    return (
        eyebrow + title + lead + page.hero(score, result.pictures[score.method.name]) + _facts(score, scored, reference)
    )


def _lead(result: Result, score: Score, scored: Sequence[Result]) -> str:
    name = TITLES.get(result.role, result.role)
    seen = f"{name} after {result.lines[-1]['images']:,} training images, one step from pure noise"
    teacher = _teacher(scored)
    if teacher is None or result.role == "teacher":
        return f"{seen}."
    return f"{seen}. Its teacher needs {teacher.nfe} evaluations for an image."


def _facts(score: Score, scored: Sequence[Result], reference: dict[str, Any]) -> str:
    figures = score.figures
    pairs = [
        (f"{figures['fd'].mean:.2f}", f"Frechet distance in one step (test split: {reference['fd_test']:.2f})"),
        (f"{figures['agreement'].mean:.1%}", "drawn as the class that was asked for"),
        (f"{figures['nn_ratio'].mean:.2f}", "of a new image's distance to the nearest training image"),
    ]
    teacher = _teacher(scored)
    if teacher is not None:
        pairs.insert(1, (f"{figures['fd'].mean / teacher.figures['fd'].mean:.2f} x", "its teacher's distance"))
    seconds = [result.status["wall_seconds"] for result in scored if result.status]
    if seconds:
        pairs.append((f"{sum(seconds) / 60:.1f} min", "of training, all runs together"))
    return page.facts(pairs)


def _teacher(scored: Sequence[Result]) -> Score | None:
    return next((result.scores[0] for result in scored if result.role == "teacher"), None)


def _figures_words(scored: Sequence[Result]) -> str:
    """How the figures were measured, in one paragraph."""
    line = scored[0].lines[-1]
    seeds = max(figure.seeds for result in scored for score in result.scores for figure in score.figures.values())
    drawn = f"{line['samples']:,} images per figure, classes in equal numbers, against the whole training split."
    several = f" Means over {seeds} sampling seeds; the spread is largest minus smallest." if seeds > 1 else ""
    widths = ", ".join(f"{TITLES.get(r.role, r.role)} {r.scores[0].ema:g}" for r in scored)
    solver = " The teacher is scored with the better of Euler and Heun." if _teacher(scored) else ""
    return f"{drawn}{several}{solver} Width of the weight average: {widths}."


def _missing(results: Sequence[Result]) -> list[str]:
    """One sentence for each part that is not there."""
    given = {result.role for result in results}
    sentences = [f"There is no {TITLES[role]} run in this report." for role in TITLES if role not in given]
    for result in results:
        title = TITLES.get(result.role, result.role)
        if not result.scores:
            sentences.append(f"{title}: {result.run.root} has no scored snapshot yet; run `sctrain evaluate` on it.")
        elif result.status.get("state") != "finished":
            sentences.append(f"{title}: training has not finished; these are the figures of an earlier snapshot.")
    return sentences


def _section(title: str, words: str, body: str) -> str:
    intro = f'<p class="soft">{escape(words)}</p>' if words else ""
    return f"<section><h2>{escape(title)}</h2>{intro}{body}</section>"
