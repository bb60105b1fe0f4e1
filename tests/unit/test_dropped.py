"""What the student says of one sample is not finite: that costs this sample, for every method, and no other."""

import pytest
import torch
from torch import Tensor, nn

from models.tangent.engines import finite_difference
from sctrain.config import objectives as config
from sctrain.objectives import build_objective
from sctrain.objectives.base import Batch, Loss, Networks, Progress
from sctrain.objectives.drawing import Data
from sctrain.processes import per_sample
from sctrain.randomness import Purpose, SampleGenerator

B, SHAPE, SICK = 6, (1, 4, 4), 2
METHODS: dict[str, config.Method] = {
    "trigflow": config.TrigFlowObjective(),
    "edm": config.EdmObjective(name="edm"),
    "pd": config.ProgressiveDistillation(name="pd", first_steps=8),
    "cd": config.ConsistencyDistillation(name="cd"),
    "ct": config.ConsistencyTraining(name="ct"),
    "ct_continuous": config.EarlyContinuous(name="ct_continuous"),
    "ict": config.ImprovedTraining(name="ict"),
    "ect": config.EasyTuning(name="ect"),
    "sct": config.ContinuousObjective(name="sct"),
    "scd in segments": config.ContinuousObjective(name="scd", segments=3, guidance=config.GuidanceRange()),
    "scd_discrete": config.DiscreteTwin(name="scd_discrete"),
    "ctm": config.TrajectoryObjective(name="ctm", denoising=0.0),
    "lcm": config.LatentConsistency(name="lcm"),
    "lcf": config.LatentConsistency(name="lcf"),
}


class Network(nn.Module):
    """Told everything; with `sick` one sample of what carries a graph overflows."""

    def __init__(self, *, sick: bool = False):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.7, 0.3, 0.2], dtype=torch.float64))
        self.sick = sick

    def forward(self, u: Tensor, t: Tensor, *conditions: Tensor | None) -> tuple[Tensor, Tensor]:
        told = t + sum(0.1 * condition for condition in conditions if condition is not None)
        F = (self.scale[0] * u + self.scale[1] * per_sample(told, u)).sin()
        if self.sick and torch.is_grad_enabled():
            F = F.where(per_sample(torch.arange(len(u)) != SICK, u), torch.inf)
        return F, self.scale[2] * t


def loss_and_gradient(method: config.Method, *, sick: bool) -> tuple[Loss, Tensor]:
    """Of the sick student's whole loss, or of the sound one's but for the sample that the other loses."""
    objective = build_objective(method, Data(0.5, 10), SHAPE)
    x0 = 0.5 * torch.randn(B, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = SampleGenerator(0, range(B), Purpose.TRAINING)
    draws = objective.draw(generator, Batch(x0, torch.arange(B)), Progress(500, 1000))
    student, other = Network(sick=sick), Network().requires_grad_(False)
    loss = objective.loss(draws, Networks(student, finite_difference, other, other if method.has_target else None))
    losses = loss.per_sample if sick else loss.per_sample[torch.arange(B) != SICK]
    (gradient,) = torch.autograd.grad(losses.sum(), student.scale)
    return loss, gradient


@pytest.mark.parametrize("name", METHODS)
def test_it_is_dropped_and_the_others_learn_what_they_would(name: str):
    (loss, gradient), (sound, expected) = (loss_and_gradient(METHODS[name], sick=sick) for sick in (True, False))
    assert loss.dropped is not None and loss.dropped.tolist() == [i == SICK for i in range(B)]
    assert sound.dropped is not None and not sound.dropped.any()
    assert loss.per_sample[SICK] == 0
    torch.testing.assert_close(gradient, expected)
    others = ~loss.dropped
    torch.testing.assert_close(loss.per_sample[others], sound.per_sample[others])


def test_ctm_balances_its_denoising_term_without_it():
    loss, gradient = loss_and_gradient(config.TrajectoryObjective(name="ctm"), sick=True)
    assert loss.dropped is not None and loss.dropped.tolist() == [i == SICK for i in range(B)]
    assert gradient.isfinite().all() and gradient.any()
    assert loss.diagnostics["balance"].isfinite().all() and loss.diagnostics["balance"].all()
