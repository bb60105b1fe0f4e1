"""A network of sctrain as a component of a diffusers pipeline. It needs the package sctrain."""

from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from pydantic import TypeAdapter
from torch import Tensor

from models.layers import Conditioning
from models.registry import NetworkOptions, build_network
from sctrain.parameterization import Parameterization


class ConsistencyNetwork(ModelMixin, ConfigMixin):
    """TrigFlow's F(x_t / sigma_d, t): the consistency function is cos t x_t - sin t sigma_d F."""

    @register_to_config
    def __init__(
        self,
        options: dict[str, Any],
        shape: tuple[int, int, int],
        told: dict[str, Any],
        sigma_data: float,
        noise_input: str = "t",
        anchor: float = 0.0,
        network_output: str = "velocity",
    ):
        super().__init__()
        checked = TypeAdapter(NetworkOptions).validate_python(dict(options))
        self.network = build_network(checked, *shape, Conditioning(**told))
        self._as_F = Parameterization(sigma_data, noise_input, anchor, network_output)  # pyright: ignore[reportArgumentType]

    def forward(self, u: Tensor, t: Tensor, labels: Tensor, guidance: Tensor | None = None) -> Tensor:
        """(B, C, H, W) of unit variance, times (B,) in [0, pi/2], labels (B,), scales (B,) -> F (B, C, H, W)."""
        told = (labels,) if guidance is None else (labels, guidance)
        return self._as_F.of(self.network)(u, t, *told)[0]
