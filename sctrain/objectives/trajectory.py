"""Consistency trajectory models (CTM, Kim et al. 2023): jumps from any time t to any earlier one s.

The network is told both, F = F(x_t / sigma_d, t, end=s), and in EDM's variables x / cos t, sigma = sigma_d tan t

    g(x, t, s) = cos t x_t - sin t sigma_d F                       an image without noise
    G(x, t, s) = (sigma_s / sigma_t) x + (1 - sigma_s / sigma_t) g                                    (CTM eq. 8)

is `processes.jump`: G(x, t, 0) is a consistency function, and g(x, t, t) the denoiser, whose slope is the flow's.
A jump from t to s must end where the teacher's trajectory from t to u, and a jump from there, ends:

    L_CTM = d( G_theta-(G_theta(x_t, t, s), s, 0), G_theta-(G_sg(x_u, u, s), s, 0) )         s <= u < t (CTM eq. 10)

compared among clean images, where the target network's jump to 0 takes both; it is frozen, but gradients pass it. With
L_DSM = ||x0 - g(x_t, t, t)||^2, weighted as EDM does, and, after a while, the hinge loss L_GAN of a discriminator that
sees the first of the two images beside x0, the loss is L_CTM + lambda_DSM L_DSM + lambda_GAN L_GAN.

Departures. The paper's lambda = ||dL_CTM/dW|| / (||dL_DSM/dW|| + 1e-4), detached, has the gradients with respect to the
last layer's weights W, of which a rank of ZeRO-3 holds a part. Here they are those with respect to the network's
output F, root mean squares over the samples of all ranks; with W the noise of samples partly cancels, with F it does
not, so our lambda is smaller: `denoising` multiplies it. Where batches are accumulated, each part has a lambda of its
own. The lowest time is 0 and not sigma_min.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from models.tangent.randomness import RandomState
from sctrain.objectives.adversarial import judgement, realism
from sctrain.objectives.base import Batch, Draws, Loss, Networks, Progress
from sctrain.objectives.drawing import Data, is_finite, kept, mean_square
from sctrain.objectives.levels import FromData
from sctrain.objectives.metrics import Metric
from sctrain.processes import T_MAX, denoise, diffuse, jump, time_at, time_of, velocity
from sctrain.randomness import SampleGenerator
from sctrain.solvers import ode_step

UPPER_PART = 0.7  # of the grid, from the top: half of the denoising term's times
TRUST = (0.01, 10.0)  # bounds of lambda_GAN
LEAST_NORM = 1e-4  # beside which a gradient of the denoising term counts
Inputs = tuple[Tensor, Tensor, Tensor, None, Tensor]  # of a network: u, t, labels, no guidance, the jump's end


@dataclass(frozen=True, kw_only=True)
class TrajectoryDraws(Draws):
    """With `s`, where the jump ends, and the teacher's way from t to u; the denoising term has a noise of its own."""

    path: Tensor  # (h + 1, B), from t down to u
    denoising_t: Tensor  # (B,)
    denoising_z: Tensor  # (B, C, H, W)
    judged: bool = False  # whether the discriminator takes part


@dataclass(frozen=True)
class ConsistencyTrajectory(Data):
    """CTM on the N + 1 times 0, sigma_1 .. sigma_N."""

    label_dropout: float
    grid: FromData
    levels: int  # N
    most_steps: int  # of the teacher, at most N
    matching: Literal["soft", "global", "local"]
    jump_by: Literal["student", "target"]  # who jumps from u to s
    metric: Metric
    keep: float  # of the target network
    denoising: float
    time_mean: float  # of ln sigma, for the other half of the denoising term's times
    time_std: float
    adversary_after: float | None = None  # this part of the budget; None: no discriminator

    def draw(self, generator: SampleGenerator, batch: Batch, progress: Progress) -> TrajectoryDraws:
        """h steps of the teacher, t among the times that leave room for them, u where they end, s in [0, u].

        All samples of a step have one h, as in the paper's code: then every rank evaluates its teacher equally often.
        """
        steps = self.teacher_steps(generator, progress)
        start = steps + _below(generator.uniform(), torch.tensor(self.levels + 1 - steps))
        until = start - steps
        end = until if self.matching == "global" else _below(generator.uniform(), until + 1)
        times = self.times().to(start.device, batch.x0.dtype)
        path = times[torch.stack([start - step for step in range(steps + 1)])]
        z, labels = self.noise(generator, batch), self.labels(generator, batch, self.label_dropout)
        return TrajectoryDraws(
            *(batch.x0, z, path[0], labels),
            s=times[end],
            path=path,
            denoising_t=self.denoising_times(generator).to(batch.x0.dtype),
            denoising_z=self.noise(generator, batch),
            judged=self.adversary_after is not None and progress.done >= self.adversary_after,
        )

    def times(self) -> Tensor:
        """0 and the grid, ascending: (N + 1,) float64."""
        return time_of(self.grid.levels(self.levels + 1), self.sigma_data)

    def teacher_steps(self, generator: SampleGenerator, progress: Progress) -> int:
        """h: 1 for local matching, else U{1 .. most_steps}."""
        return 1 if self.matching == "local" else 1 + int(generator.of_batch(progress.images) * self.most_steps)

    def denoising_times(self, generator: SampleGenerator) -> Tensor:
        """Half of them ln sigma ~ N(mean, std^2), half even in sigma^(1/rho) over the grid's upper 70%: (B,)."""
        lower = (self.time_mean + self.time_std * generator.normal().double()).exp()
        upper = self.grid.at(1 - UPPER_PART * generator.uniform().double())
        sigma = torch.where(generator.uniform() < 0.5, lower, upper)
        return time_of(sigma, self.sigma_data).clamp(max=T_MAX)

    def loss(self, draws: Draws, networks: Networks) -> Loss:
        assert isinstance(draws, TrajectoryDraws)
        x_t = diffuse(draws.x0, draws.z, draws.t)
        x_u = self.solve(x_t, draws, networks)
        F, F_denoising, F_u, finite = self.outputs(x_t, x_u, draws, networks)
        matched, matched_square, reached = self.matching_term(x_t, x_u, F, F_u, draws, networks)
        sound = finite & reached
        diagnostics, total = {"distance": matched.detach()}, matched
        if self.denoising:
            denoised, denoised_square = self.denoising_term(F_denoising, draws)
            balance = gradient_ratio(matched_square.where(sound, 0), denoised_square, networks)
            total = matched + self.denoising * balance * denoised
            diagnostics |= {"velocity_error": denoised.detach(), "balance": balance.expand_as(matched)}
        judgements = None
        if draws.judged:
            looks, looks_square, judgements = self.adversarial_term(x_t, F, draws, networks)
            trust = gradient_ratio(matched_square.where(sound, 0), looks_square, networks).clamp(*TRUST)
            total = total + trust * looks
            diagnostics |= {"adversarial": looks.detach(), "adversarial_balance": trust.expand_as(matched)}
            diagnostics |= {"discriminator": judgements.detach()}
        times = {"velocity_error": draws.denoising_t}
        return Loss(total.where(sound, 0), diagnostics, ~sound, times=times, beside=judgements)

    def outputs(
        self, x_t: Tensor, x_u: Tensor, draws: TrajectoryDraws, networks: Networks
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """F of the student at (x_t, t, s) and where it denoises, and of whoever jumps from u at (x_u, u, s).

        And whether the student's are finite (B,); where they are not they are 0.
        The student is traversed once, for ZeRO-3 reduces a parameter's gradient once per backward. So that the other
        draws the same dropout masks its batch is as large, and the second half of what it says is for nothing.
        """
        assert draws.s is not None
        count = len(x_t)
        at, at_u = (self._at(x, t, draws, draws.s) for x, t in ((x_t, draws.t), (x_u, draws.path[-1])))
        if self.denoising:
            t = draws.denoising_t
            noisy = self._at(diffuse(draws.x0, draws.denoising_z, t), t, draws, t)
            at, at_u = _joined(at, noisy), _joined(at_u, noisy)
        jumpers = networks if self.jump_by == "target" else replace(networks, target=None)
        (F, _), F_u = jumpers.pair(at, at_u)
        finite = is_finite(F).reshape(-1, count).all(dim=0)
        F = kept(F, finite.repeat(len(F) // count))
        return F[:count], F[count:], F_u[:count], finite

    def matching_term(
        self, x_t: Tensor, x_u: Tensor, F: Tensor, F_u: Tensor, draws: TrajectoryDraws, networks: Networks
    ) -> tuple[Tensor, Tensor, Tensor]:
        """L_CTM and ||dL_CTM/dF||^2 per sample, and whether the goal was finite: (B,) each."""
        assert draws.s is not None
        t, u, s = draws.t, draws.path[-1], draws.s
        randomness = RandomState(x_t.device)  # the target network's two jumps to 0 draw the same dropout masks too
        with torch.no_grad():
            goal = self.to_data(jump(x_u, F_u, u, s, self.sigma_data), draws, networks)
        sound = is_finite(goal)
        goal = kept(goal, sound)

        def distance(F: Tensor) -> Tensor:
            with randomness.replayed():
                return self.metric(self.to_data(jump(x_t, F, t, s, self.sigma_data), draws, networks), goal)

        return *differentiated(distance, F), sound

    def denoising_term(self, F: Tensor, draws: TrajectoryDraws) -> tuple[Tensor, Tensor]:
        """L_DSM, which with EDM's weight is the error of the velocity, and ||dL_DSM/dF||^2 per sample: (B,) each."""
        v = velocity(draws.x0, draws.denoising_z, draws.denoising_t)
        return differentiated(lambda F: mean_square(F - v / self.sigma_data), F)

    def adversarial_term(
        self, x_t: Tensor, F: Tensor, draws: TrajectoryDraws, networks: Networks
    ) -> tuple[Tensor, Tensor, Tensor]:
        """L_GAN and ||dL_GAN/dF||^2 per sample, and the discriminator's own losses: (B,) each."""
        assert draws.s is not None and networks.adversary is not None, "an adversary was asked for"
        (judge, trained), s, fakes = networks.adversary, draws.s, []

        def looks(F: Tensor) -> Tensor:
            fake = self.to_data(jump(x_t, F, draws.t, s, self.sigma_data), draws, networks) / self.sigma_data
            fakes.append(fake.detach())
            return realism(judge, fake, draws.labels)

        return *differentiated(looks, F), judgement(trained, draws.x0 / self.sigma_data, fakes[0], draws.labels)

    @torch.no_grad()
    def solve(self, x: Tensor, draws: TrajectoryDraws, networks: Networks) -> Tensor:
        """x_u, by Heun's steps of the teacher along the path."""
        teacher = self.teacher(draws, networks)
        for now, then in zip(draws.path[:-1], draws.path[1:], strict=True):
            x = ode_step(teacher, x, now, then, (draws.labels,), self.sigma_data)
        return x

    def to_data(self, x: Tensor, draws: TrajectoryDraws, networks: Networks) -> Tensor:
        """G_theta-(x, s, 0); x itself where s is 0."""
        assert draws.s is not None and networks.target is not None, "CTM needs a target network"
        F, _ = networks.target(*self._at(x, draws.s, draws, torch.zeros_like(draws.s)))
        return denoise(x, F, draws.s, self.sigma_data)

    def _at(self, x: Tensor, t: Tensor, draws: Draws, end: Tensor) -> Inputs:
        """A network's inputs. At t = 0 any finite F will do, so it is told the grid's least time: ln 0 is none."""
        least = time_at(self.grid.sigma_min, self.sigma_data)
        return x / self.sigma_data, t.clamp_min(least), draws.labels, None, end

    def target_keep(self, before: Progress, after: Progress) -> float | None:
        return self.keep


def differentiated(loss: Callable[[Tensor], Tensor], F: Tensor) -> tuple[Tensor, Tensor]:
    """Loss(F) per sample, its gradient with respect to F already taken, and that gradient's squared norm: (B,) each.

    `loss` gets F without its graph, so what it evaluates is differentiated and freed here, with respect to F alone, and
    the weights of networks within it get no gradients. The losses that return have the graph of F only.
    """
    leaf = F.detach().requires_grad_()
    losses = loss(leaf)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    linear = (gradient * (F - F.detach())).flatten(1).sum(dim=1)  # zero, with this gradient
    return losses.detach() + linear, gradient.flatten(1).square().sum(dim=1)


def gradient_ratio(matched_square: Tensor, other_square: Tensor, networks: Networks) -> Tensor:
    """lambda = ||dL_CTM/dF|| / (||dL/dF|| + 1e-4), from squared norms per sample (B,) here to one for all ranks: ()."""
    norms = networks.mean(torch.stack([matched_square, other_square]).mean(dim=1)).sqrt()
    return norms[0] / (norms[1] + LEAST_NORM)


def _below(uniform: Tensor, count: Tensor) -> Tensor:
    """U{0 .. count - 1} out of uniforms on [0, 1): (B,)."""
    count = count.to(uniform.device)
    return torch.minimum((uniform * count).long(), count - 1)


def _joined(first: Inputs, second: Inputs) -> Inputs:
    """Two batches as one."""
    (u, t, labels, _, end), (u_2, t_2, labels_2, _, end_2) = first, second
    return torch.cat([u, u_2]), torch.cat([t, t_2]), torch.cat([labels, labels_2]), None, torch.cat([end, end_2])
