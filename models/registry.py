"""Networks by name. A configuration names a family, never a dotted path."""

from torch import nn

from models.dit import DiT, DiTOptions
from models.execution import Execution
from models.layers import Conditioning

NetworkOptions = DiTOptions  # a union, told apart by `name`, once there are more families

_FAMILIES: dict[type, type[nn.Module]] = {DiTOptions: DiT}


def build_network(
    options: NetworkOptions,
    channels: int,
    height: int,
    width: int,
    told: Conditioning,
    execution: Execution = Execution(),  # noqa: B008  (frozen)
) -> nn.Module:
    """The named network for images of (channels, height, width). ValueError where the options do not fit them."""
    return _FAMILIES[type(options)](options, channels, height, width, told, execution)
