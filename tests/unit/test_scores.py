"""Score distillation in float64: at the exact scores of Gaussian data, and against the objectives it is made of."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from exact import gaussian_draws
from gaussian import Gaussian
from test_objectives import SHAPE, B, consistency, small_network, some_draws
from torch import Tensor

from models.score import Score
from models.tangent.engines import single_pass
from sctrain.objectives.base import Batch, Draws, Guide, Networks, Progress
from sctrain.objectives.diffusion import Diffusion
from sctrain.objectives.drawing import mean_square
from sctrain.objectives.scores import ScoreDistillation, ScoreDraws
from sctrain.processes import T_MAX, denoise, diffuse, per_sample
from sctrain.randomness import Purpose, SampleGenerator

SIGMA_DATA, FACTOR = 0.5, 0.7


def objective(**changes: Any) -> ScoreDistillation:
    common = vars(consistency(SIGMA_DATA, True)) | {"compared_at": (0.4, 2.0), "learnt_at": (-0.8, 1.6)}
    return ScoreDistillation(**(common | {"factor": FACTOR} | changes))


def with_scores(draws: Draws) -> ScoreDraws:
    noise = [SIGMA_DATA * torch.randn_like(draws.x0) for _ in range(3)]
    times = [0.2 + 1.2 * torch.rand_like(draws.t) for _ in range(2)]
    names = ("drawn_from", "compared_z", "learnt_z", "compared_t", "learnt_t")
    return ScoreDraws(**vars(draws), **dict(zip(names, [*noise, *times], strict=True)))


def values_alone(network: Any, primals: Any, direction: Any, *conditions: Any) -> Any:
    outputs = network(*primals, *conditions)
    return outputs, torch.zeros_like(outputs[0])


def told_of(gaussian: Gaussian, log_weights: tuple[float, float] = (0.0, 0.0)):
    """The exact score of data of this distribution."""

    def score(u: Tensor, t: Tensor, labels: Tensor, guidance: Tensor | None, balanced_t: Tensor):
        w = torch.tensor(log_weights, dtype=u.dtype).expand(len(u), 2).clone().requires_grad_()
        return gaussian.teacher(u, t, labels)[0], w

    return score


def gradient_of_output(data: Gaussian, fake: Gaussian, balance: float) -> tuple[Tensor, Tensor, ScoreDraws]:
    """dL/dF of the trajectory's half and of the one-step images' half of what the student says."""
    torch.manual_seed(0)
    draws = with_scores(gaussian_draws(data))
    said = torch.randn(2 * B, *data.mean.shape, dtype=torch.float64, requires_grad=True)
    networks = Networks(
        lambda u, t, labels: (said, torch.zeros(2 * B)), values_alone, data.teacher, score=told_of(fake, (0.0, balance))
    )
    objective().loss(draws, networks).per_sample.sum().backward()
    assert said.grad is not None
    alone = said.detach()[:B].requires_grad_()
    plain = Networks(lambda u, t, labels: (alone, torch.zeros(B)), values_alone, data.teacher)
    consistency(SIGMA_DATA, True).loss(draws, plain).per_sample.sum().backward()
    torch.testing.assert_close(said.grad[:B], alone.grad, rtol=1e-12, atol=0)
    return said.grad[B:], said.detach()[B:], draws


def test_images_move_where_they_are_likelier_to_the_teacher_than_to_the_student():
    """-dL/dg = lambda 2 e^w' / D sigma_d tan t (grad log p_teacher - grad log p_student) at x_t, in closed form."""
    data, balance = Gaussian.example(SIGMA_DATA), 0.3
    fake = replace(data, mean=data.mean + 0.5, std=1.3 * data.std)
    gradient, F, draws = gradient_of_output(data, fake, balance)
    t_max = torch.full_like(draws.t, T_MAX)
    images = denoise(draws.drawn_from, F, t_max, SIGMA_DATA)
    t = per_sample(draws.compared_t, images)
    x_t = diffuse(images, draws.compared_z, draws.compared_t)
    of_data, of_fake = (-(x_t - t.cos() * each.mean) / each.variance(t) for each in (data, fake))
    D = images[0].numel()
    expected = FACTOR * 2 * math.exp(balance) / D * SIGMA_DATA * t.tan() * (of_data - of_fake)
    dg_dF = -per_sample(t_max.sin(), images) * SIGMA_DATA
    torch.testing.assert_close(-gradient / dg_dF, expected, rtol=1e-9, atol=1e-12)


def test_a_student_that_draws_the_data_is_left_alone():
    data = Gaussian.example(SIGMA_DATA)
    assert gradient_of_output(data, data, 0.0)[0].abs().max() < 1e-12


def trained() -> tuple[torch.nn.Module, Score, Networks]:
    torch.manual_seed(1)
    student, teacher, score = small_network(), small_network(), Score(small_network()).double()
    torch.nn.init.normal_(score.balance.out.weight)
    return student, score, Networks(student, single_pass, teacher.requires_grad_(False), score=score)


def test_the_fake_score_learns_as_a_diffusion_model_of_the_images():
    student, score, networks = trained()
    draws = with_scores(some_draws(SIGMA_DATA))
    loss = objective().loss(draws, networks)
    assert loss.beside is not None
    t_max = torch.full_like(draws.t, T_MAX)
    images = denoise(
        draws.drawn_from, student(draws.drawn_from / SIGMA_DATA, t_max, draws.labels)[0], t_max, SIGMA_DATA
    )
    as_data = Draws(images.detach(), draws.learnt_z, draws.learnt_t, draws.labels)
    diffusion = Diffusion(SIGMA_DATA, 10, -0.8, 1.6, 0.0).loss(as_data, Networks(score.network, single_pass))
    u = diffuse(images.detach(), draws.compared_z, draws.compared_t) / SIGMA_DATA
    F, (F_fake, weights) = (
        networks.teacher(u, draws.compared_t, draws.labels)[0],
        score(u, draws.compared_t, draws.labels, None, draws.compared_t),
    )
    square, w = mean_square((F - F_fake).detach()), weights[:, 1]
    torch.testing.assert_close(loss.beside, diffusion.per_sample + w.exp() * square - w, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss.diagnostics["score_error"], diffusion.diagnostics["velocity_error"])
    expected = consistency(SIGMA_DATA, True).loss(draws, networks).per_sample + FACTOR * (w.exp() * square - w)
    torch.testing.assert_close(loss.per_sample, expected, rtol=1e-10, atol=1e-12)


def test_neither_loss_reaches_the_other_network():
    student, score, networks = trained()
    loss = objective().loss(with_scores(some_draws(SIGMA_DATA)), networks)
    assert loss.beside is not None
    loss.per_sample.sum().backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in score.parameters())
    moved = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}  # type: ignore[union-attr]
    loss.beside.sum().backward()
    assert all(torch.equal(moved[name], parameter.grad) for name, parameter in student.named_parameters())  # type: ignore[arg-type]
    assert all(parameter.grad is not None for parameter in score.parameters())


def test_what_is_not_finite_is_dropped():
    _, score, networks = trained()
    draws = with_scores(some_draws(SIGMA_DATA))
    draws.compared_z[2] = torch.nan
    loss = objective().loss(draws, networks)
    assert loss.dropped is not None and loss.dropped.tolist() == [row == 2 for row in range(B)]
    assert loss.beside is not None and loss.beside.isfinite().all() and loss.beside[2] == 0
    (loss.per_sample.sum() + loss.beside.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in score.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("no_label", [10, None])
def test_a_guide_takes_the_place_of_the_teacher_without_a_label(no_label: int | None):
    teacher, guide = small_network(), small_network()
    draws = replace(some_draws(SIGMA_DATA), guidance=1 + torch.rand(B, dtype=torch.float64))
    networks = Networks(teacher, single_pass, teacher, guide=Guide(guide, no_label))
    u = diffuse(draws.x0, draws.z, draws.t) / SIGMA_DATA
    found, _ = consistency(SIGMA_DATA, True).teacher(draws, networks)(u, draws.t, draws.labels)
    told = draws.labels if no_label is None else torch.full_like(draws.labels, 10)
    F, F_guide = teacher(u, draws.t, draws.labels)[0], guide(u, draws.t, told)[0]
    torch.testing.assert_close(found, F_guide + per_sample(draws.guidance, u) * (F - F_guide))  # type: ignore[arg-type]


def test_the_draws_are_those_of_scd_and_more():
    positions = range(4)
    batch = Batch(torch.zeros(4, *SHAPE), torch.arange(4))
    mine, plain = (
        each.draw(SampleGenerator(1, positions, Purpose.TRAINING), batch, Progress(0, 10))
        for each in (objective(guidance=(1.0, 2.0)), consistency(SIGMA_DATA, True, guidance=(1.0, 2.0)))
    )
    assert isinstance(mine, ScoreDraws)
    for name in ("z", "t", "labels", "guidance"):
        assert torch.equal(getattr(mine, name), getattr(plain, name))
    noises = [mine.z, mine.drawn_from, mine.compared_z, mine.learnt_z]
    assert len({noise.flatten()[0].item() for noise in noises}) == 4, "all of their own"
    assert mine.compared_t.max() <= T_MAX and mine.learnt_t.max() <= T_MAX
