"""Networks by name. A configuration names a family or a published size, never a dotted path.

Every family has one free form, whose width and depth are keys. A published size is a name of its own with hardly any
keys; its `free` says what it stands for.
"""

from torch import nn

from models.dit import DiT
from models.dit_options import DiTOptions, DiTSize
from models.edm2 import EDM2
from models.edm2_options import EDM2Options, EDM2Size
from models.execution import Execution
from models.layers import Conditioning
from models.unet import UNet
from models.unet_options import ADMOptions, ADMSize, UNetOptions

FreeOptions = DiTOptions | EDM2Options | UNetOptions | ADMOptions
SizeOptions = DiTSize | EDM2Size | ADMSize
NetworkOptions = FreeOptions | SizeOptions  # told apart by `name`
UNNAMED = "dit"  # what a description without a name means

_FAMILIES: dict[type, type[nn.Module]] = {DiTOptions: DiT, EDM2Options: EDM2, UNetOptions: UNet, ADMOptions: UNet}


def free_form(options: NetworkOptions) -> FreeOptions:
    """The same network by width and depth."""
    return options if isinstance(options, FreeOptions) else options.free


def build_network(
    options: NetworkOptions,
    channels: int,
    height: int,
    width: int,
    told: Conditioning,
    execution: Execution = Execution(),  # noqa: B008  (frozen)
) -> nn.Module:
    """The named network for images of (channels, height, width). ValueError where the options do not fit them."""
    free = free_form(options)
    return _FAMILIES[type(free)](free, channels, height, width, told, execution)
