"""Every method from scratch on a mixture of Gaussians: its one-step map against the true flow.

Errors are mean squares over the variance of the data; the best affine map of the noise has 0.3 or more. A method is
added by registering it in CASES.
"""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from mixture import Mixture, affine_residual
from torch import Tensor, nn

from models.tangent.engines import single_pass
from sctrain.config import objectives as config
from sctrain.objectives import build_objective
from sctrain.objectives.base import Batch, Networks, Progress
from sctrain.objectives.drawing import Data
from sctrain.objectives.levels import ddim_times
from sctrain.parameterization import Parameterization
from sctrain.processes import T_MAX, denoise

SIGMA_DATA, BATCH, POINTS = 0.5, 256, 256
FEW, LOOSE = 600, 0.2  # steps of the fast test, and its bound
MIXTURE = Mixture.example(torch.float32)
L2 = config.Distance(name="l2")


class Network(nn.Module):
    """(u, t, labels, ...) -> (F, w), for two numbers."""

    def __init__(self, width: int = 64):
        super().__init__()
        layers = nn.Linear(9, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        self.body, self.out = nn.Sequential(*layers), nn.Linear(width, 2)
        self.weighting = nn.Linear(7, 1)
        nn.init.zeros_(self.weighting.weight)

    def forward(self, u: Tensor, t: Tensor, labels: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        waves = [f(k * t) for k in (1, 2, 4) for f in (torch.sin, torch.cos)]
        times = torch.stack([t, *waves], 1)
        F = self.out(self.body(torch.cat([2 * u.flatten(1), times], 1)))
        return F.reshape(u.shape), self.weighting(times).squeeze(1)


class Generator:
    """Draws as SampleGenerator does, fast: these samples need no positions."""

    def __init__(self, seed: int):
        self.torch = torch.Generator().manual_seed(seed)

    def normal(self, shape: tuple[int, ...] = ()) -> Tensor:
        return torch.randn(BATCH, *shape, generator=self.torch)

    def uniform(self) -> Tensor:
        return torch.rand(BATCH, generator=self.torch)


@dataclass(frozen=True)
class Case:
    """A method, and how it is trained. Distillations have the perfect teacher; `after` is trained first."""

    method: config.Method
    after: str | None = None
    rate: float = 2e-3
    start: float = T_MAX  # the largest time that it learns
    converged: config.Method | None = None  # in place of `method` where there is time
    many: int = 6000  # steps of that


# Losses that are not quadratic, and tangents that are normalised, have medians where the flow has means. In many
# dimensions these are close, in two they are not: with the papers' constants the exact function is no fixed point of a
# method without a teacher. So constants are large against the residuals here.
LCM = {"guidance": config.GuidanceRange(low=1.0, high=1.0), "metric": L2, "target_decay": 0.5}
LCM_START = ddim_times(50)[-1].item()
CASES = {
    "trigflow": Case(config.TrigFlowObjective()),
    "pd": Case(config.ProgressiveDistillation(name="pd", first_steps=32), after="trigflow"),
    "cd": Case(config.ConsistencyDistillation(name="cd", levels=40)),
    # These settings reach 0.077 in 6000 steps; those below 0.047 in 8000 and 0.037 in 15 000. Which of N and mu it is,
    # is open.
    "ct": Case(
        config.ConsistencyTraining(name="ct", first_levels=5, last_levels=40, first_decay=0.5),
        converged=config.ConsistencyTraining(name="ct", first_levels=10, last_levels=150, first_decay=0.0),
        many=15_000,
    ),
    "ict": Case(config.ImprovedTraining(name="ict", metric=config.Distance(name="pseudo_huber", constant=0.3))),
    "ect": Case(config.EasyTuning(name="ect", metric=config.Distance(name="pseudo_huber", constant=0.3))),
    "lcm": Case(config.LatentConsistency(name="lcm", **LCM), start=LCM_START),
    "lcf": Case(config.LatentConsistency(name="lcf", **LCM), after="lcm", start=LCM_START),
    "sct": Case(config.ContinuousObjective(name="sct", tangent_constant=10.0)),
    "scd": Case(config.ContinuousObjective(name="scd")),
}


def train(name: str, steps: int, start: Network | None = None, engine=single_pass, changed=lambda x: x) -> Network:
    """The average of the weights; `changed` mutates the objective."""
    case = CASES[name]
    method = case.converged or case.method if steps > FEW else case.method
    torch.manual_seed(0)
    objective = changed(build_objective(method, Data(SIGMA_DATA, 0), (2, 1, 1)))
    student = (copy.deepcopy(start) if start else Network()).requires_grad_(True)
    average, target = (copy.deepcopy(student).requires_grad_(False) for _ in range(2))
    as_F = Parameterization(SIGMA_DATA, "t", method.anchor).of
    networks = Networks(as_F(student), engine, MIXTURE.teacher, as_F(target) if method.has_target else None)
    adam = torch.optim.Adam(student.parameters(), lr=case.rate, betas=(0.9, 0.99), fused=True)
    generator, labels = Generator(1), torch.zeros(BATCH, dtype=torch.long)
    data = MIXTURE.sample(2**16, generator.torch).split(BATCH)
    for step in range(steps):
        now, after = (Progress(count * BATCH, steps * BATCH) for count in (step, step + 1))
        draws = objective.draw(generator, Batch(data[step % len(data)], labels), now)
        adam.zero_grad()
        objective.loss(draws, networks).per_sample.mean().backward()
        adam.param_groups[0]["lr"] = case.rate * min(1, 2 * (1 - now.done))
        adam.step()
        follow(average, student, (step / (step + 1)) ** 12)
        if method.has_target:
            follow(target, student, objective.target_keep(now, after))
    return average


@torch.no_grad()
def follow(average: nn.Module, student: nn.Module, keep: float) -> None:
    if keep < 1:
        torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - keep)


class Truth:
    """The flow of some noise, from the largest time that a method learns, computed once."""

    def __init__(self):
        self.noise = SIGMA_DATA * torch.randn(POINTS, 2, 1, 1, generator=torch.Generator().manual_seed(7))
        self._mixture, self._ends = Mixture.example(), {}

    def end(self, start: float) -> Tensor:
        if start not in self._ends:
            self._ends[start] = self._mixture.flow_to_data(self.noise, start)
        return self._ends[start]

    def affine(self, start: float) -> float:
        return affine_residual(self.noise, self.end(start)) / self._mixture.variance

    @torch.no_grad()
    def error(self, name: str, network: Network) -> float:
        """Of the one-step map, over the variance of the data."""
        case = CASES[name]
        t = torch.full((POINTS,), case.start)
        F, _ = Parameterization(SIGMA_DATA, "t", case.method.anchor).of(network)(self.noise / SIGMA_DATA, t, None)
        x = denoise(self.noise, F, t, SIGMA_DATA)
        return (x - self.end(case.start)).square().mean().item() / self._mixture.variance


@pytest.fixture(scope="module")
def truth():
    return Truth()


@pytest.fixture(scope="module")
def trained():
    """`network(name, steps)`, from the method that comes before it, each once."""
    networks: dict[tuple[str, int], Network] = {}

    def network(name: str, steps: int) -> Network:
        if (name, steps) not in networks:
            before = CASES[name].after
            networks[name, steps] = train(name, steps, before and network(before, steps))
        return networks[name, steps]

    return network


ONE_STEP = [name for name in CASES if name != "trigflow"]


def test_no_affine_map_does_it(truth):
    for start in {case.start for case in CASES.values()}:
        affine = truth.affine(start)
        print(f"the best affine map from t = {start:.4f}: {affine:.3f}")
        assert affine >= 0.3


def test_the_truth_is_integrated_to_1e_minus_8(truth):
    finer = Mixture.example().flow_to_data(truth.noise[:64], steps=1000)
    torch.testing.assert_close(truth.end(T_MAX)[:64], finer, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ONE_STEP)
def test_one_step_map(truth, trained, name):
    """Within 600 steps; far from converged, and far from what a broken method reaches."""
    error = truth.error(name, trained(name, FEW))
    print(f"{name}: {error:.4f}")
    assert error < LOOSE


@pytest.mark.full
@pytest.mark.parametrize("name", ONE_STEP)
def test_one_step_map_converges(truth, trained, name):
    error = truth.error(name, trained(name, CASES[name].many))
    print(f"{name}: {error:.4f}")
    assert error < 0.05


def backwards(*arguments):
    """The tangent's sign."""
    outputs, t_F = single_pass(*arguments)
    return outputs, -t_F


def as_printed(network, primals, direction, *constants):
    """Sigma_d forgotten: the tangents (cos sin dx/dt, cos sin sigma_d) of the paper for a network of x / sigma_d."""
    return single_pass(network, primals, tuple(SIGMA_DATA * d for d in direction), *constants)


def with_draws(change):
    """A mutation of what an objective draws."""

    def changed(objective):
        class Changed(type(objective)):
            def draw(self, *arguments):
                return change(super().draw(*arguments))

        return Changed(**vars(objective))

    return changed


def swapped(objective):
    """The less noisy image learns from the noisier one, with the same positive weight."""
    weight = objective.weight
    swap = with_draws(lambda draws: replace(draws, t=draws.s, s=draws.t))
    return swap(replace(objective, weight=lambda t, s: weight(s, t)))


denoising = with_draws(lambda draws: replace(draws, s=torch.zeros_like(draws.t)))
cold = with_draws(lambda draws: replace(draws, r=0.0))
MUTATIONS = [
    *((name, {"engine": engine}) for name in ("sct", "scd") for engine in (backwards, as_printed)),
    *((name, {"changed": cold}) for name in ("sct", "scd")),
    *((name, {"changed": denoising}) for name in ("ict", "ect")),
    *((name, {"changed": swapped}) for name in ("cd", "ct", "ict", "ect", "lcm")),
]


@pytest.mark.full
@pytest.mark.parametrize(("name", "mutation"), MUTATIONS)
def test_a_broken_method_fails(truth, name, mutation):
    error = truth.error(name, train(name, FEW, **mutation))
    print(f"{name} {mutation}: {error:.3f}")
    assert not error < LOOSE
