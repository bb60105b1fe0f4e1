"""The report: flat figures from the scores, a page that needs nothing else, and honesty about what is missing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from digits import publish_random, tiny_config, write_status

from sctrain.errors import UserError
from sctrain.evaluation.report import write_report
from sctrain.evaluation.worker import evaluate
from sctrain.reporting.grids import enlarged, grid_indices, image_grid
from sctrain.runs import RunFolder

VOID = {"meta", "img", "br"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A teacher and a student, scored with two seeds."""
    root = tmp_path_factory.mktemp("a&b")
    folders = {role: root / role for role in ("teacher", "scd")}
    two_seeds = {"seeds": [0, 1]}
    teacher = {"run": folders["teacher"], "ema": 0.05}
    publish_random(tiny_config(folders["teacher"], "trigflow", evaluation=two_seeds), 32)
    publish_random(tiny_config(folders["scd"], "scd", teacher=teacher, evaluation=two_seeds), 16, 32)
    for seconds, run in zip((60.0, 30.0), folders.values(), strict=True):
        evaluate(run, watch=False)
        write_status(run, "finished", 6400, seconds)
        stats = [{"images": n, "loss/all": 1 / n, "tangent_norm/all": None if n == 8 else 2.0} for n in (8, 16, 24)]
        RunFolder(run).stats.write_text("".join(json.dumps(line) + "\n" for line in stats))
    return folders


@pytest.fixture(scope="module")
def written(runs: dict[str, Path], tmp_path_factory) -> tuple[str, dict[str, float]]:
    page = write_report(runs, tmp_path_factory.mktemp("report"))
    assert page.name == "report.html"
    return page.read_text(), json.loads(page.with_name("figures.json").read_text())


def lines(run: Path, **where: Any) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in RunFolder(run).metrics.read_text().splitlines()]
    return [line for line in found if all(line[key] == value for key, value in where.items())]


def test_figures_are_means_and_spreads_of_the_newest_snapshot(runs, written):
    _, figures = written
    for steps in (1, 2):
        values = [line["fd"] for line in lines(runs["scd"], images=32, steps=steps)]
        assert figures[f"fd_scd_{steps}step"] == pytest.approx(fmean(values))
        assert figures[f"fd_scd_{steps}step_spread"] == pytest.approx(max(values) - min(values))
    assert figures["ode_mse_scd_1step"] > 0 and "ode_mse_teacher" not in figures


def test_teacher_is_the_better_of_its_solvers(runs, written):
    by_solver = [fmean(line["fd"] for line in lines(runs["teacher"], sampler=sampler)) for sampler in ("heun", "euler")]
    assert written[1]["fd_teacher"] == pytest.approx(min(by_solver)) and by_solver[0] != by_solver[1]


def test_names_of_the_figures(written):
    _, figures = written
    for name in ("fd", "agreement", "precision", "recall", "nn_ratio"):
        assert {f"{name}_teacher", f"{name}_scd_1step", f"{name}_scd_2step"} <= figures.keys()
    assert {"fd_resample", "fd_test", "agreement_test", "recall_test"} <= figures.keys()
    assert figures["wall_minutes"] == pytest.approx(1.5)
    assert figures["images_per_second_teacher"] == pytest.approx(6400 / 60)
    assert all(isinstance(value, int | float) for value in figures.values())
    assert not any("sct" in name for name in figures)


class Balance(HTMLParser):
    """Fails where tags do not close in order."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_well_formed_and_needs_no_network(runs, written):
    page, _ = written
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert not re.search(r'(?:src|href)="(?!data:|#)', page) and not re.search(r"<(?:script|link|iframe)|@import", page)
    assert not re.search(r"url\((?!#)", page)
    assert "a&b" not in page and str(runs["scd"]).replace("&", "&amp;") in page


def test_page_shows_pictures_curves_and_commands(runs, written):
    page, _ = written
    assert "drawn in one network evaluation each" in page
    assert page.count("<img") == 1 + 4 + 3  # the headline; teacher, 1 and 2 steps, real; larger grids
    assert page.count("<svg") == 4  # distance, two losses, tangent norm
    for command in ("sctrain prepare digits", "sctrain train ", "sctrain evaluate ", "sctrain report "):
        assert command in page


def test_what_is_missing_is_said(runs, tmp_path: Path):
    untrained = tmp_path / "sct"
    untrained.mkdir()
    page = write_report({**runs, "sct": untrained}, tmp_path / "out").read_text()
    assert f"sCT: {untrained} has no scored snapshot yet; run `sctrain evaluate` on it." in page
    page = write_report({"teacher": runs["teacher"]}, tmp_path / "out").read_text()
    assert "No one-step generator has been scored yet." in page
    assert "There is no sCD run in this report." in page and "There is no sCT run in this report." in page
    page = write_report({"sct": untrained}, tmp_path / "out").read_text()
    assert "Nothing has been scored yet." in page


def test_unfinished_run_is_said(runs, tmp_path: Path):
    write_status(runs["teacher"], "stopped", 6400, 60.0)
    page = write_report(runs, tmp_path).read_text()
    write_status(runs["teacher"], "finished", 6400, 60.0)
    assert "Teacher: training has not finished; these are the figures of an earlier snapshot." in page


def test_mistakes_are_named(runs, tmp_path: Path):
    with pytest.raises(UserError, match="nowhere is not a run folder"):
        write_report({"teacher": tmp_path / "nowhere"}, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --out"):
        write_report(runs, tmp_path / "file" / "out")


def test_grid_has_one_class_per_column():
    assert grid_indices(5000, 10, rows=2) == list(range(20))
    assert grid_indices(5000, 1000, rows=2) == [*range(10), *range(1000, 1010)]
    assert grid_indices(40, 3, rows=2) == list(range(6))
    assert grid_indices(4, 1000) == [0, 1, 2, 3]


def test_grid_enlarges_smoothly_and_labels():
    images = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
    images[:, :, :, 4:] = 255
    tile = enlarged(images[0])
    assert tile.size == (64, 64) and tile.mode == "RGB"
    edge = np.asarray(tile)[32, 26:38, 0]
    assert len(np.unique(edge)) > 5, "an edge is a ramp, not a step"
    plain, labelled = image_grid(images, 3), image_grid(images, 3, row_labels=["one", "two"], column_labels="abc")
    assert plain.size == (4 + 3 * 68, 4 + 2 * 68)
    assert labelled.width > plain.width and labelled.height > plain.height
    assert enlarged(torch.zeros(3, 96, 96, dtype=torch.uint8)).size == (96, 96)
