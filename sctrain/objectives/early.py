"""The continuous-time losses of the first consistency paper (CM 2023, appendix B), for its l2.

With sigma = tau(u), u ~ U[0, 1] and tau EDM's grid of infinitely many levels, neighbours at 1 / (N - 1) differ by
df = f(x_t, t) - f(x_s, s) -> tau'(u) / (N - 1) df/dsigma along the trajectory. The discrete loss ||df||^2 / D tends, as
N grows, to

    (N - 1)^2 L   -> tau'^2 ||df/dsigma||^2 / D,                         theta- = theta      (theorem 3)
    (N - 1) dL    -> d[ 2 tau' <f, sg(df/dsigma)> / D ],                 theta- = sg(theta)  (theorems 5 and 6)

f is the identity at sigma_min, and df/dsigma = cos t / sigma_d x (cos t df/dt), of which the bracket is sCM's tangent.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sctrain.objectives.base import Batch, Draws, Loss, Networks, Progress
from sctrain.objectives.continuous import consistency_tangent
from sctrain.objectives.drawing import is_finite, kept, l2_norm, mean_square
from sctrain.objectives.flow import FollowsFlow, Trajectory
from sctrain.objectives.levels import Grid
from sctrain.processes import denoise, diffuse, per_sample, sigma_of, time_of
from sctrain.randomness import SampleGenerator


@dataclass(frozen=True)
class EarlyContinuous(FollowsFlow):
    """`ct_continuous` where there is no teacher, `cd_continuous` where there is one; lambda = 1.

    `full` is theorem 3's loss: networks.tangent must record its tangents. It is for a teacher's velocity only, for with
    the sample's own the square of df/dsigma has another minimum.
    """

    label_dropout: float
    distill: bool
    grid: Grid
    full: bool = False

    def draw(self, generator: SampleGenerator, batch: Batch, progress: Progress) -> Draws:
        """u ~ U[0, 1), t = arctan(tau(u) / sigma_d), noise and labels."""
        sigma = self.grid.at(generator.uniform().double())
        t = time_of(sigma, self.sigma_data).to(batch.x0.dtype)
        return Draws(batch.x0, self.noise(generator, batch), t, self.labels(generator, batch, self.label_dropout))

    def loss(self, draws: Draws, networks: Networks) -> Loss:
        """Theorem 3's value; without `full` its gradient is that of theorems 5 and 6, whose own value means nothing."""
        f, df_dsigma = self.evaluate(draws, networks)
        slope = self.grid.slope(sigma_of(draws.t.double(), self.sigma_data)).to(f.dtype)
        step = per_sample(slope, f) * df_dsigma
        if not self.full:
            step = f - f.detach() + step
        sound = is_finite(step)
        error = mean_square(kept(step, sound))
        diagnostics = {"tangent_norm": l2_norm(df_dsigma.detach()), "step": l2_norm(step.detach())}
        return Loss(error, diagnostics, dropped=~sound)

    def evaluate(self, draws: Draws, networks: Networks) -> tuple[Tensor, Tensor]:
        """f with its graph, and df/dsigma along the trajectory, whose graph is that of the engine's tangents."""
        at, sigma_data = self.trajectory(draws, networks), self.sigma_data
        (F, _), t_F = networks.tangent(networks.student, at.primals, at.direction, *at.conditions)
        assert t_F.requires_grad or not (self.full and F.requires_grad), "theorem 3 needs tangents with a graph"
        value = F if self.full else F.detach()
        g = consistency_tangent(at.x_t, at.dx_dt, value, t_F, draws.t, 1.0, sigma_data)
        return denoise(at.x_t, F, draws.t, sigma_data), per_sample(draws.t.cos() / sigma_data, g) * g

    def trajectory(self, draws: Draws, networks: Networks) -> Trajectory:
        """Where the student is evaluated, and the direction of its tangent."""
        return self.trajectory_at(draws, diffuse(draws.x0, draws.z, draws.t), networks, draws.t, draws.conditions)
