"""Which network of ours published weights are for: read off the names and shapes of their tensors alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from models.dit_options import SHAPES, DiTSize
from models.edm2_options import EDM2Options, EDM2Size
from models.edm2_published import from_edm2
from models.registry import NetworkOptions, free_form
from models.unet_options import ADMOptions, ADMSize, UNetOptions
from models.unet_published import from_edm, from_openai
from sctrain.errors import UserError

OPENAI_TIME = 1000.0  # they are told 250 ln sigma, a thousand times EDM's c_noise
_PLACE = re.compile(r"enc\.(\d+)x\1_(conv|down|block(\d+))\.(.+)")
PERIOD = 10_000.0  # of edm2_sCM's embedding of time
_LEFT_BY_EDM2_SCM = re.compile(r"unet\.emb_pos\.freqs|logvar_pos\.freqs|logvar_linear\.weight")
_SEGMENTED = "networks that edm2_sCM trained over several segments are told of them as none here is"
Tensors = Mapping[str, Tensor]
Renaming = Callable[[Tensors, nn.Module, int], dict[str, Tensor]]


@dataclass(frozen=True)
class Layout:
    """A network by its options, and how its published weights get our names: (weights, network, side) -> ours."""

    options: NetworkOptions
    channels: int  # of the image
    side: int | None  # pixels; None: any that the network takes
    classes: int | None  # 0: not told of classes; None: those of the data
    renamed: Renaming
    unused: re.Pattern[str] = re.compile(r"(?!)")  # tensors of theirs that ours has as constants
    augmented: bool = False


def layout_of(tensors: Tensors, network: NetworkOptions | None = None, head_channels: int | None = None) -> Layout:
    """The layout of published tensors; UserError where no network here has it.

    `network` says which it is where names and shapes do not: OpenAI's, and those of our own names. `head_channels` are
    those of attention, 64 where nobody says; DDPM++ and NCSN++ have one head.
    """
    if "unet.out_gain" in tensors:
        return _edm2(tensors, head_channels or 64)
    if any(name.startswith("enc.") for name in tensors):
        return _edm(tensors, head_channels or 64)
    if "input_blocks.0.0.weight" in tensors:
        return _openai(tensors, network)
    if network is not None:
        embed = tensors.get("embed.weight")
        channels = 0 if embed is None or embed.ndim != 4 else embed.shape[1]
        # One by one: each is asked for. dict() of a dictionary would copy it unseen.
        same = lambda published, _, __: {name: published[name] for name in published}  # noqa: E731
        return Layout(network, channels, None, None, same)
    raise UserError("these are weights of no network that is known here; name it by --network '{name: ..., ...}'")


def sized(options: NetworkOptions) -> NetworkOptions:
    """The published size that is the same network, if there is one."""
    names = [f"edm2-{size}" for size in ("xs", "s", "m", "l", "xl", "xxl")]
    dits = [DiTSize(f"dit-zero-{size}") for size in SHAPES]  # type: ignore[arg-type]
    sizes = [*map(EDM2Size, names), ADMSize("adm-imagenet64"), ADMSize("adm-lsun256"), *dits]  # type: ignore[arg-type]
    return next((size for size in sizes if free_form(size) == options), options)


def _edm2(tensors: Tensors, head_channels: int) -> Layout:
    shape = _shape(tensors, "unet.", "conv_res0", "attn_qkv")
    if "unet.emb_t_k.weight" in tensors:
        raise UserError(_SEGMENTED)
    side, label = shape.pop("side"), tensors.get("unet.emb_label.weight")
    shape["told_classes"] = label is not None
    if any(name.endswith("emb_gain") for name in tensors):
        options = EDM2Options(name="edm2", head_channels=head_channels, **shape)
    else:  # edm2_sCM's
        told = {"whole_condition": True, "time_period": PERIOD}
        options = EDM2Options(name="edm2-scm", head_channels=head_channels, **shape, **told)
    image = tensors[f"unet.enc.{side}x{side}_conv.weight"].shape[1] - 1
    classes = 0 if label is None else label.shape[1]
    return Layout(sized(options), image, side, classes, with_sentences(from_edm2), _LEFT_BY_EDM2_SCM)


def _edm(tensors: Tensors, head_channels: int) -> Layout:
    shape = _shape(tensors, "", "conv0", "qkv")
    side = shape.pop("side")
    label = tensors.get("map_label.weight")
    filters = {tensors[name].shape[-1] for name in tensors if name.endswith("resample_filter")}
    if "out_norm.weight" in tensors:
        options: NetworkOptions = sized(ADMOptions(head_channels=head_channels, **shape))
    else:
        fourier, pyramid = "map_noise.freqs" in tensors, any("aux_residual" in name for name in tensors)
        if fourier != pyramid or (filters and filters != {4 if fourier else 2}):
            raise UserError("this mixture of DDPM++ and NCSN++ is no network here")
        if "map_t_k.weight" in tensors:
            raise UserError(_SEGMENTED)
        name = "ncsnpp" if fourier else "ddpmpp"
        options = UNetOptions(name=f"{name}-scm" if _is_doubly_normalised(tensors, side) else name, **shape)  # type: ignore[arg-type]
    return Layout(
        options,
        tensors[f"enc.{side}x{side}_conv.weight"].shape[1],
        side,
        0 if label is None else label.shape[1],
        with_sentences(from_edm),
        re.compile(r".*resample_filter|logvar_.*"),
        "map_augment.weight" in tensors,
    )


def _is_doubly_normalised(tensors: Tensors, side: int) -> bool:
    """Whether blocks of a DDPM++ are told a scale and a shift, as edm2_sCM's are, and not a shift alone."""
    block = f"enc.{side}x{side}_block0"
    return tensors[f"{block}.affine.weight"].shape[0] == 2 * tensors[f"{block}.conv0.weight"].shape[0]


def _openai(tensors: Tensors, network: NetworkOptions | None) -> Layout:
    """Their names do not say where resolutions change, so the network is one of those that they have published."""
    label = tensors.get("label_emb.weight")
    if network is None:
        name = "adm-lsun256" if label is None else "adm-imagenet64"
        network = ADMSize(name, time_scale=OPENAI_TIME)
    side = {"adm-lsun256": 256, "adm-imagenet64": 64}.get(network.name)
    channels, classes = tensors["input_blocks.0.0.weight"].shape[1], 0 if label is None else label.shape[0]
    return Layout(network, channels, side, classes, with_sentences(from_openai, sided=False))


def with_sentences(renamed: Callable[..., dict[str, Tensor]], *, sided: bool = True) -> Renaming:
    """The same, but that a tensor that is not there is the user's mistake; not `sided`: no size of images matters."""
    return partial(_renamed, renamed, sided)


def _renamed(
    function: Callable[..., dict[str, Tensor]], sided: bool, published: Tensors, network: nn.Module, side: int
) -> dict[str, Tensor]:
    try:
        return function(published, network, side) if sided else function(published, network)
    except KeyError as error:
        raise UserError(f"there is no tensor {error} in it: it is cut short, or of another network") from error


def _shape(tensors: Tensors, prefix: str, first: str, attention: str) -> dict[str, Any]:
    """Side in pixels, channels, multipliers, blocks and resolutions of attention, of EDM's and EDM2's encoders."""
    widths: dict[int, int] = {}
    blocks: dict[int, int] = {}
    attends: set[int] = set()
    side = channels = 0
    for name in tensors:
        found = _PLACE.fullmatch(name.removeprefix(prefix))
        if found is None:
            continue
        tensor = tensors[name]
        resolution = int(found[1])
        if found[2] == "conv":
            side, channels = resolution, tensor.shape[0]
        elif found[3] is not None:
            blocks[resolution] = max(blocks.get(resolution, 0), int(found[3]) + 1)
            if found[4] == f"{first}.weight":
                widths[resolution] = tensor.shape[0]
            elif found[4] == f"{attention}.weight":
                attends.add(resolution)
    levels = sorted(widths, reverse=True)
    even = bool(levels) and levels == [side >> level for level in range(len(levels))] and len(set(blocks.values())) == 1
    if not even or not channels or any(width % channels for width in widths.values()):
        raise UserError("the encoder of these weights is not laid out as EDM's or EDM2's")
    return {
        "side": side,
        "channels": channels,
        "multipliers": tuple(widths[level] // channels for level in levels),
        "blocks": blocks[side],
        "attention": tuple(sorted(attends, reverse=True)),
    }
