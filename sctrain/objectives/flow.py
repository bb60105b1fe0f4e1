"""The direction in which a consistency function must not change: dx_t/dt of a teacher, or of the very sample."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from sctrain.objectives.base import Draws, Networks
from sctrain.objectives.drawing import Data
from sctrain.processes import per_sample, velocity


class Trajectory(NamedTuple):
    """A point of the trajectory, and what the network takes there with its direction of differentiation."""

    x_t: Tensor
    dx_dt: Tensor
    primals: tuple[Tensor, Tensor]  # u = x_t / sigma_data, and t
    direction: tuple[Tensor, Tensor]  # a factor (B,) of d/dt of them
    conditions: tuple[Any, ...]  # labels and what else the network is told; None where it is not


@runtime_checkable
class AlongTrajectory(Protocol):
    """An objective that differentiates the student along a direction, which can be verified before it is trusted."""

    def trajectory(self, draws: Draws, networks: Networks) -> Trajectory: ...


class FollowsFlow(Data):
    """What objectives share whose trajectory is the teacher's (`distill`) or cos t x0 + sin t z of each sample."""

    distill: bool

    def flow_velocity(self, draws: Draws, u: Tensor, networks: Networks) -> Tensor:
        """dx_t/dt: the teacher's sigma_d F, guided or not, or cos t z - sin t x0 of this very sample."""
        if not self.distill:
            return velocity(draws.x0, draws.z, draws.t)
        with torch.no_grad():
            F, _ = self.teacher(draws, networks)(u, draws.t, draws.labels)
        return self.sigma_data * F

    def trajectory_at(
        self, draws: Draws, x_t: Tensor, networks: Networks, angle: Tensor, conditions: tuple[Any, ...]
    ) -> Trajectory:
        """The point x_t and the direction cos a sin a d/dt, `angle` a (B,) being how far the consistency function goes.

        So no intermediate tangent grows near t = 0 or pi/2 (sCM section 4.1).
        """
        u = x_t / self.sigma_data
        dx_dt = self.flow_velocity(draws, u, networks)
        factor = angle.cos() * angle.sin()
        direction = (per_sample(factor, u) * dx_dt / self.sigma_data, factor)
        return Trajectory(x_t, dx_dt, (u, draws.t), direction, conditions)
