"""Guidance by a second network, and images without a class."""

import pytest
import torch
from digits import publish_random, tiny_config

from sctrain import cli
from sctrain.config.schema import GuideFrom, WeightsFrom
from sctrain.errors import UserError
from sctrain.evaluation.generation import Generator, teacher_solutions
from sctrain.evaluation.guide import Guide
from sctrain.evaluation.method import Method
from sctrain.evaluation.source import Source
from sctrain.guidance import guided_by, guided_network

CPU = torch.device("cpu")
EULER = Method("euler", 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher, a smaller guide with other weights, and one that knows no images without labels."""
    folder = tmp_path_factory.mktemp("runs")
    publish_random(tiny_config(folder / "teacher", "trigflow"), 32)
    publish_random(tiny_config(folder / "guide", "trigflow", network={"width": 8, "depth": 1, "heads": 2}), 16)
    labelled = tiny_config(folder / "labelled", "edm", noise_input="log_sigma")
    publish_random(labelled, 16)
    publish_random(tiny_config(folder / "student", "sct"), 16)
    publish_random(tiny_config(folder / "other", "trigflow", sigma_data=1.0), 16)
    return folder


def drawn(runs, guide: str | None, scale: float, labels=None, label=None):
    source = Source.of(runs / "teacher")
    found = None if guide is None else Guide.of(source, Source.of(runs / guide), labels, CPU)
    return Generator.from_source(source, CPU, scale, found).draw(EULER, 0, 10, label)


def linear(factor):
    """A network that knows its label."""
    return lambda u, t, labels: (factor * u + labels[:, None, None, None], torch.ones_like(t))


def test_the_formula():
    u, t, labels, scale = torch.randn(3, 1, 2, 2), torch.ones(3), torch.tensor([1, 2, 3]), torch.tensor([0.0, 1.0, 2.5])
    s, label = (x[:, None, None, None] for x in (scale, labels))
    for told, theirs in ((9, 9), (None, label)):
        F, log_weight = guided_by(linear(2.0), linear(0.5), scale, told)(u, t, labels)
        torch.testing.assert_close(F, (0.5 * u + theirs) + s * ((2 * u + label) - (0.5 * u + theirs)))
        assert not log_weight.any()
    own = guided_network(linear(2.0), scale, 9)(u, t, labels)[0]
    torch.testing.assert_close(guided_by(linear(2.0), linear(2.0), scale, 9)(u, t, labels)[0], own)


def test_a_guide_moves_images_away_from_its_own(runs):
    plain, none, guided = drawn(runs, None, 1.0), drawn(runs, "guide", 1.0), drawn(runs, "guide", 2.0)
    torch.testing.assert_close(none.x, plain.x)
    assert guided.nfe == 4 and (guided.x - plain.x).std() > 0.01
    same = drawn(runs, "guide", 2.0, "same")
    assert not torch.allclose(same.x, guided.x)
    torch.testing.assert_close(drawn(runs, "teacher", 2.0).x, drawn(runs, None, 2.0).x)  # the guide of plain guidance
    torch.testing.assert_close(drawn(runs, "teacher", 2.0, "same").x, plain.x)


def test_a_guide_that_is_told_another_noise(runs):
    """Scale 0 is the guide alone, whatever it is told of the noise."""
    alone = Generator.from_source(Source.of(runs / "labelled"), CPU, 1.0).draw(EULER, 0, 10)
    torch.testing.assert_close(drawn(runs, "labelled", 0.0).x, alone.x)


def test_the_teacher_of_a_guided_student_is_guided_alike(runs, tmp_path):
    """What a student is compared with; kept apart from the same teacher's that guides itself."""
    teacher, guide = WeightsFrom(run=runs / "teacher", ema=0.05), GuideFrom(run=runs / "guide", ema=0.05)
    at = (teacher, 0, 10, tmp_path, CPU)
    heun = Method("heun", 2)
    source = Source.of(runs / "teacher")
    lesser = Guide.of(source, Source.of(runs / "guide"), "none", CPU)
    expected = Generator.from_source(source, CPU, 2.0, lesser).draw(heun, 0, 10).x
    for _ in range(2):  # the second time they are read
        torch.testing.assert_close(teacher_solutions(*at, 2.0, guide=guide), expected)
    assert not torch.allclose(teacher_solutions(*at, 2.0), expected)
    torch.testing.assert_close(teacher_solutions(*at, 1.0, guide=guide), teacher_solutions(*at, 1.0))


def test_images_without_a_class(runs, tmp_path, capsys):
    out = tmp_path / "none.png"
    assert cli.main(["sample", str(runs / "teacher"), "--class", "none", "--steps", "2", "--out", str(out)]) == 0
    unlabelled = drawn(runs, None, 0.0).x  # scale 0 leaves no label either
    torch.testing.assert_close(drawn(runs, None, 1.0, label=10).x, unlabelled)
    assert cli.main(["sample", str(runs / "student"), "--class", "none", "--out", str(out)]) == 2
    assert "without label dropout, so it knows no --class none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "flags", "told"),
    [
        ("teacher", ["--guide", "{}/guide"], "--guide needs a scale"),
        ("student", ["--guide", "{}/guide", "--guidance", "2"], "--guide is for diffusion models"),
        ("teacher", ["--guide", "{}/student", "--guidance", "2"], "--guide is for diffusion models"),
        ("teacher", ["--guide", "{}/other", "--guidance", "2"], "has sigma_data 1.0"),
        ("teacher", ["--guide", "{}/labelled", "--guidance", "2", "--guide-labels", "none"], "--guide-labels same"),
        ("teacher", ["--guide-labels", "same"], "name it with --guide"),
    ],
)
def test_what_does_not_fit_is_refused(runs, tmp_path, capsys, run, flags, told):
    flags = [flag.format(runs) for flag in flags]
    assert cli.main(["sample", str(runs / run), *flags, "--out", str(tmp_path / "x.png")]) == 2
    assert told in capsys.readouterr().err


def test_a_guide_on_the_command_line(runs, tmp_path, capsys):
    flags = ["--guide", str(runs / "guide"), "--guidance", "1.4", "--steps", "2", "--sampler", "euler", "--count", "4"]
    assert cli.main(["sample", str(runs / "teacher"), *flags, "--out", str(tmp_path / "x.png")]) == 0
    assert "4 network evaluations" in capsys.readouterr().err
    with pytest.raises(UserError, match="scale"):
        Guide.scale(Source.of(runs / "teacher").config, float("nan"))
