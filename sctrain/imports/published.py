"""From a file or folder of published weights to what a run of ours has to know of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data_pipeline.latents import CONVENTIONS, ConventionName
from models.registry import NetworkOptions
from sctrain.errors import UserError
from sctrain.imports.files import (
    StoredTensors,
    module_tensors,
    modules,
    read_file,
    read_safetensors,
    refused,
    tensors_of,
)
from sctrain.imports.inert import NotInertError, Recorded
from sctrain.imports.layouts import layout_of
from sctrain.imports.pipeline_folder import CD_LEVELS, read_folder
from sctrain.imports.torch_names import StoredTensor, as_array
from sctrain.imports.transformers import is_dit, read_authors
from sctrain.imports.weights import Published
from sctrain.parameterization import VP_BETA_MIN, VP_BETA_RISE, VP_STEPS

NVIDIA = "CC BY-NC-SA 4.0 (NVIDIA; non-commercial)"
OPENAI = "MIT (OpenAI)"
REPRODUCTION = "CC BY-NC-SA 4.0 (edm2_sCM, of NVIDIA's EDM2; non-commercial)"
_REPRODUCED = ("TrigFlowPrecond", "TrigFlowDDPMPPPrecond")
_SNAPSHOT = re.compile(r".*-(\d{6,8})-(\d\.\d{3})")  # EDM2's names: thousands of images, relative width of the EMA
_OPENAI_METHODS = ("cd", "ct", "edm")
_VP_CONSTANTS = {"beta_d": VP_BETA_RISE, "beta_min": VP_BETA_MIN, "M": VP_STEPS}


def read_published(
    source: Path, *, network: NetworkOptions | None = None, objective: str | None = None, key: str = "ema"
) -> Published:
    """What is published at `source`: a pickle of EDM's or EDM2's, a file of torch's, safetensors.

    `network` and `objective` say what a file does not; `key` is the part of a pickle that is wanted. UserError for
    anything else, with nothing of the file run.
    """
    if source.is_dir():
        return read_folder(source, objective)
    if source.suffix == ".safetensors":
        return _of_tensors(source, read_safetensors(source), network, objective)
    found = read_file(source)
    try:
        if isinstance(found, Recorded):
            return _of_module(source, found, {}, objective)
        if isinstance(found, dict) and isinstance(found.get(key), Recorded):
            return _of_module(source, found[key], found, objective)
        stored = _state(found)
    except NotInertError as error:
        raise refused(source, error) from error
    return _of_tensors(source, tensors_of(source, stored), network, objective)


def _state(found: Any) -> dict[str, StoredTensor]:
    """A dictionary of tensors."""
    names = isinstance(found, dict) and all(type(name) is str for name in found)
    if not names or not found or not all(isinstance(value, StoredTensor) for value in found.values()):
        raise NotInertError("it holds neither a network nor a dictionary of tensors")
    return found


def _of_tensors(
    source: Path, tensors: Mapping[str, Tensor], network: NetworkOptions | None, objective: str | None
) -> Published:
    if is_dit(tensors):
        return read_authors(source, tensors, network, objective)
    layout, openai = layout_of(tensors, network), "input_blocks.0.0.weight" in tensors
    if objective is None:
        prefix = source.name.partition("_")[0]
        objective = prefix if openai and prefix in _OPENAI_METHODS else "edm" if "unet.out_gain" in tensors else None
    if objective is None:
        raise UserError(f"{source} does not say how it was trained: name it by --objective, for example edm, cd or ct")
    ours = not openai and "unet.out_gain" not in tensors and not any(name.startswith("enc.") for name in tensors)
    told: dict[str, Any] = {"name": objective}
    if openai and objective == "cd":
        told["levels"] = CD_LEVELS  # it was trained at these alone
    space = {} if ours else {"noise_input": "log_sigma"}
    family, licence = ("OpenAI's consistency models", OPENAI) if openai else ("a state dictionary", "")
    return Published(source, family, layout, tensors, licence, not ours, told, space)


def _of_module(source: Path, net: Recorded, beside: Mapping[str, Any], objective: str | None) -> Published:
    """A pickled network behind its preconditioning, which is its outermost class."""
    tensors = tensors_of(source, module_tensors(net))
    if net.name in _REPRODUCED:
        return _reproduced(source, net, tensors, objective)
    if net.name == "Precond":
        images, width = _named(source)
        return Published(
            source,
            "EDM2",
            layout_of(tensors, head_channels=_head_channels(net)),
            tensors,
            NVIDIA,
            True,
            {"name": "edm", "learned_weighting": True},
            {"sigma_data": _number(net, "sigma_data"), "noise_input": "log_sigma"},
            _convention(source, beside.get("encoder")),
            images,
            width,
        )
    make = {"EDMPrecond": _edm, "VPPrecond": _vp}.get(net.name)
    if make is None:
        raise UserError(
            f"{source} is a {net.name}, whose preconditioning has no exact form here; EDMPrecond, VPPrecond"
        )
    return make(source, net, tensors.without_prefix("model."))


def _reproduced(source: Path, net: Recorded, tensors: StoredTensors, objective: str | None) -> Published:
    """Of edm2_sCM, the reproduction of sCM: f = cos t x - sin t sigma_d F(x / sigma_d, t), which is ours."""
    if objective is None:
        raise UserError(f"{source} does not say how it was trained: name it by --objective trigflow, sct or scd")
    if net.name == "TrigFlowDDPMPPPrecond":
        tensors = tensors.without_prefix("unet.")
    layout = layout_of(tensors, head_channels=_head_channels(net))
    told = {"name": objective}
    if objective == "trigflow":
        told |= {"augmentation": 0.12 if layout.augmented else 0.0, "label_dropout": 0.0}
    images, width = _named(source)
    space = {"sigma_data": _number(net, "sigma_data")}
    return Published(source, "edm2_sCM", layout, tensors, REPRODUCTION, False, told, space, None, images, width)


def _edm(source: Path, net: Recorded, tensors: Mapping[str, Tensor]) -> Published:
    space = {"sigma_data": _number(net, "sigma_data"), "noise_input": "log_sigma"}
    return _song(source, "EDM", net, tensors, space, turned=True)


def _vp(source: Path, net: Recorded, tensors: Mapping[str, Tensor]) -> Published:
    """D = x - sigma F(x / sqrt(sigma^2 + 1), 999 s): F is the noise, and sigma_data is 1 whatever the data's."""
    for name, value in _VP_CONSTANTS.items():
        if _number(net, name) != value:
            raise UserError(f"{source} has {name} {_number(net, name):g}, where 'noise_input' vp has {value:g}")
    space = {"sigma_data": 1.0, "noise_input": "vp", "network_output": "noise"}
    return _song(source, "VP", net, tensors, space, turned=False)


def _song(
    source: Path, family: str, net: Recorded, tensors: Mapping[str, Tensor], space: Mapping[str, Any], *, turned: bool
) -> Published:
    layout = layout_of(tensors, head_channels=_head_channels(net))
    objective = {"name": "edm", "augmentation": 0.12 if layout.augmented else 0.0}
    return Published(source, family, layout, tensors, NVIDIA, turned, objective, space)


def _number(net: Recorded, name: str) -> float:
    value = net.state.get(name) if isinstance(net.state, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NotInertError(f"the network does not say its {name}")
    return float(value)


def _head_channels(net: Recorded) -> int | None:
    """Channels of a head of attention in the first block that has it; None where no block does."""
    for _, state in modules(net):
        heads, channels = state.get("num_heads"), state.get("out_channels")
        if type(heads) is int and type(channels) is int and heads > 0:
            return channels // heads
    return None


def _named(source: Path) -> tuple[int | None, float | None]:
    """(images, relative width) in the names of EDM2's snapshots."""
    found = _SNAPSHOT.fullmatch(source.stem)
    return (None, None) if found is None else (int(found[1]) * 1000, float(found[2]))


def _convention(source: Path, encoder: Any) -> ConventionName | None:
    """Of the encoder that is pickled beside EDM2's networks; None for one of pixels."""
    name = encoder.name if isinstance(encoder, Recorded) else "StandardRGBEncoder"
    if name == "StandardRGBEncoder":
        return None
    known = CONVENTIONS["edm2"]
    if name == "StabilityVAEEncoder":
        scale, bias = (as_array(encoder.state.get(part)) for part in ("scale", "bias"))
        std, mean = 0.5 / scale, -bias / scale
        if np.allclose(std, known.std, atol=1e-3) and np.allclose(mean, known.mean, atol=1e-3):
            return "edm2"
    raise UserError(f"{source} was trained on latents of no known convention ({name})")
