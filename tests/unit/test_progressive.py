"""Progressive distillation in float64: two steps in one, its stages, its weights."""

from types import SimpleNamespace

import pytest
import torch
from gaussian import Gaussian

from models.tangent.engines import single_pass
from sctrain import parts
from sctrain.config.objectives import ConsistencyDistillation
from sctrain.config.objectives import ProgressiveDistillation as Settings
from sctrain.objectives import build_objective
from sctrain.objectives.base import Batch, Draws, Networks, Progress
from sctrain.objectives.drawing import Data
from sctrain.objectives.progressive import ProgressiveDistillation
from sctrain.parts import Parts
from sctrain.processes import T_MAX, denoise, diffuse, jump, per_sample
from sctrain.randomness import Purpose, SampleGenerator

SIGMA_DATA, B = 0.7, 32
GAUSSIAN = Gaussian.example(SIGMA_DATA)


def build(**changes) -> ProgressiveDistillation:
    made = build_objective(Settings(name="pd", **changes), Data(SIGMA_DATA, 10), tuple(GAUSSIAN.mean.shape))
    assert isinstance(made, ProgressiveDistillation)
    return made


def drawn(objective: ProgressiveDistillation, progress: Progress) -> Draws:
    x0 = GAUSSIAN.sample(B, torch.Generator().manual_seed(1))
    generator = SampleGenerator(0, torch.arange(B), Purpose.TRAINING)
    draws = objective.draw(generator, Batch(x0, torch.zeros(B).long()), progress)
    return Draws(draws.x0, draws.z.double(), draws.t, draws.labels, s=draws.s)


def straight_to(ends):
    """The network whose jump from t to `ends(t)` is the exact flow."""

    def network(u, t, labels):
        x, s = SIGMA_DATA * u, ends(t)
        gap = per_sample(t - s, x)
        return (gap.cos() * x - GAUSSIAN.flow(x, t, s)) / (SIGMA_DATA * gap.sin()), torch.zeros_like(t)

    return network


def test_the_target_output_reaches_in_one_jump_what_the_teacher_does_in_two():
    objective = build(first_steps=8)
    draws = drawn(objective, Progress(0, 400))
    x_t, middle = diffuse(draws.x0, draws.z, draws.t), (draws.t + draws.s) / 2
    target = objective.two_steps(Networks(None, single_pass, target=GAUSSIAN.teacher), x_t, draws)
    x = jump(x_t, GAUSSIAN.teacher(x_t / SIGMA_DATA, draws.t, None)[0], draws.t, middle, SIGMA_DATA)
    x = jump(x, GAUSSIAN.teacher(x / SIGMA_DATA, middle, None)[0], middle, draws.s, SIGMA_DATA)
    torch.testing.assert_close(jump(x_t, target, draws.t, draws.s, SIGMA_DATA), x, rtol=1e-12, atol=1e-12)
    # x~ = (z'' - (sigma'' / sigma) z) / (alpha'' - (sigma'' / sigma) alpha), as the paper writes it (algorithm 2)
    ratio = per_sample(draws.s.sin() / draws.t.sin(), x)
    written = (x - ratio * x_t) / (per_sample(draws.s.cos(), x) - ratio * per_sample(draws.t.cos(), x))
    torch.testing.assert_close(denoise(x_t, target, draws.t, SIGMA_DATA), written, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("images", [0, 150, 399])
def test_with_exact_segments_the_loss_is_zero(images):
    objective = build(first_steps=8)
    progress = Progress(images, 400)
    draws, step = drawn(objective, progress), T_MAX / objective.steps(progress)
    teacher, student = straight_to(lambda t: t - step / 2), straight_to(lambda t: t - step)
    exact = objective.loss(draws, Networks(student, single_pass, target=teacher)).per_sample
    assert exact.max() < 1e-20
    other = objective.loss(draws, Networks(teacher, single_pass, target=teacher)).per_sample
    assert other.mean() > 1e-6


def test_a_target_that_overflowed_drops_its_sample_and_no_other():
    objective = build(first_steps=8)
    draws = drawn(objective, Progress(0, 400))
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)

    def student(u, t, labels):
        return factor * GAUSSIAN.student(u, t, labels)[0], torch.zeros_like(t)

    def teacher(u, t, labels):
        F, w = GAUSSIAN.teacher(u, t, labels)
        return F.where(per_sample(torch.arange(B) != 2, F), float("inf")), w

    loss = objective.loss(draws, Networks(student, single_pass, target=teacher))
    assert loss.dropped is not None and loss.dropped.tolist() == [index == 2 for index in range(B)]
    assert loss.per_sample[2] == 0 and (loss.per_sample[~loss.dropped] > 0).all()
    loss.per_sample.sum().backward()
    assert factor.grad is not None and factor.grad.isfinite()


def test_stages():
    """N = 1024, 512, ..., 1 in eleven equal parts, and the target becomes the student between two of them."""
    objective = build()
    for stage in range(11):
        assert objective.steps(Progress(100 * stage, 1100)) == objective.steps(Progress(100 * stage + 99, 1100))
        assert objective.steps(Progress(100 * stage, 1100)) == 1024 >> stage
    assert objective.steps(Progress(1200, 1100)) == 1
    keeps = [objective.target_keep(Progress(i, 1100), Progress(i + 1, 1100)) for i in range(1100)]
    assert [i + 1 for i, keep in enumerate(keeps) if keep == 0] == list(range(100, 1100, 100))
    assert set(keeps) == {0.0, 1.0}
    assert build(first_steps=4, last_steps=4).steps(Progress(999, 1000)) == 4


def test_the_teacher_is_replaced_also_where_the_step_at_the_boundary_was_dropped():
    """Its images count, so N halves; otherwise the next student would learn from the teacher before the last."""
    keeps: list[float] = []
    run = SimpleNamespace(target=SimpleNamespace(update=keeps.append), objective=build())
    for before, after, applied in ((50, 60, False), (99, 100, False), (149, 150, True)):
        Parts.update_target(run, Progress(before, 1100), Progress(after, 1100), applied=applied)  # pyright: ignore
    assert keeps == [0.0, 1.0]


def test_no_second_teacher_is_built_where_the_target_network_teaches(monkeypatch):
    """It would hold a frozen network's memory on all ranks and never be asked."""
    built: list[str] = []
    monkeypatch.setattr(parts, "FrozenEngine", lambda network, *_: SimpleNamespace(fill=built.append))
    monkeypatch.setattr(parts, "lay_out", lambda *_, **__: None)
    monkeypatch.setattr(parts.building, "teacher_network", lambda config, _: (None, config.objective.name))
    monkeypatch.setattr(parts.building, "source_parameterization", lambda _: SimpleNamespace(of=lambda engine: engine))
    data, world = SimpleNamespace(description=None), SimpleNamespace(device="cpu")
    for method in (Settings(name="pd"), ConsistencyDistillation(name="cd")):
        run = object.__new__(Parts)
        run.config = SimpleNamespace(objective=method, teacher="a run")  # pyright: ignore
        run.dataset, run.world = data, world  # pyright: ignore
        run._teacher({})
    assert built == ["cd"]


def test_times_divide_the_angle_evenly():
    objective = build(first_steps=8)
    draws = drawn(objective, Progress(0, 400))
    torch.testing.assert_close(draws.t - draws.s, torch.full_like(draws.t, T_MAX / 8))
    index = draws.t * 8 / T_MAX
    torch.testing.assert_close(index, index.round(), rtol=0, atol=1e-12)
    assert index.min().round() == 1 and index.max().round() == 8


@pytest.mark.parametrize(
    ("weighting", "of_x"),
    [("snr_plus_one", lambda snr: 1 + snr), ("truncated_snr", lambda snr: snr.clamp_min(1))],
)
def test_weights_are_those_of_the_paper_on_x(weighting, of_x):
    """w(SNR) ||x^ - x~||^2 (PD section 4), in units of sigma_d^2."""
    objective = build(first_steps=8, weighting=weighting)
    draws = drawn(objective, Progress(0, 400))
    x_t, networks = diffuse(draws.x0, draws.z, draws.t), Networks(GAUSSIAN.student, single_pass, None, GAUSSIAN.teacher)
    target = objective.two_steps(networks, x_t, draws)
    ours, theirs = GAUSSIAN.student(x_t / SIGMA_DATA, draws.t, None)[0], target
    error = denoise(x_t, ours, draws.t, SIGMA_DATA) - denoise(x_t, theirs, draws.t, SIGMA_DATA)
    expected = of_x(draws.t.tan() ** -2) * error.square().mean((1, 2, 3)) / SIGMA_DATA**2
    torch.testing.assert_close(objective.loss(draws, networks).per_sample, expected, rtol=1e-9, atol=0)
