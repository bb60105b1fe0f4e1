"""Folders of diffusers: what their JSON says of a network and of the process that it was trained for.

    FOLDER/unet/config.json            UNet2DModel, where it is an ADM
    FOLDER/transformer/config.json     or a DiT
    FOLDER/.../diffusion_pytorch_model.safetensors, or .bin
    FOLDER/scheduler/scheduler_config.json
    FOLDER/vae/config.json             of latents: how they are scaled
    FOLDER/README.md                   its licence

diffusers itself is not needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.registry import NetworkOptions
from models.unet_diffusers import from_diffusers
from models.unet_options import ADMOptions
from sctrain.errors import UserError
from sctrain.imports.files import StoredTensors, read_safetensors, read_tensors
from sctrain.imports.layouts import OPENAI_TIME, Layout, sized, with_sentences
from sctrain.imports.transformers import folder_latents, folder_layout, told
from sctrain.imports.weights import Published
from sctrain.parameterization import DDPM_BETAS, VP_STEPS

CD_LEVELS = 40  # of CM 2023 on ImageNet-64 and LSUN: it was trained at these alone
WEIGHTS = "diffusion_pytorch_model"
_ADM_FORM = {
    "act_fn": "silu",
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "class_embed_type": None,
    "add_attention": True,
}
_DEFAULTS = {"freq_shift": 0, "flip_sin_to_cos": True, "mid_block_scale_factor": 1, "act_fn": "silu"} | {
    **{"add_attention": True, "class_embed_type": None, "center_input_sample": False, "norm_eps": 1e-5},
    **{"downsample_type": "conv", "upsample_type": "conv", "norm_num_groups": 32, "time_embedding_type": "positional"},
    **{"resnet_time_scale_shift": "default"},
}
_DIT = ("DiTTransformer2DModel", "Transformer2DModel")  # the second is its older name
_MODULATIONS = {"scale_shift": "scale_shift", "default": "shift"}
_DDPM = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler")


def read_folder(folder: Path, objective: str | None) -> Published:
    """The network in a folder of diffusers'; UserError where there is none that has an exact form here."""
    inner = next((folder / part for part in ("unet", "transformer") if (folder / part).is_dir()), folder)
    config = _json(inner / "config.json")
    kind = config.get("_class_name")
    if kind == "UNet2DModel":
        return _unet(folder, inner, _DEFAULTS | config, objective)
    if kind in _DIT:
        return _dit(folder, inner, config, objective)
    raise UserError(f"{inner} holds a {kind}, and only UNet2DModel and {_DIT[0]} have an exact form here")


def _dit(folder: Path, inner: Path, config: Mapping[str, Any], objective: str | None) -> Published:
    space, objective, _ = _process(folder, objective)
    if space["noise_input"] != "ddpm":
        raise UserError(f"{folder} is a DiT with the scheduler of a consistency model, which has no exact form here")
    tensors, vae = _tensors(inner), folder / "vae" / "config.json"
    layout = folder_layout(inner, config, tensors)
    latents = folder_latents(vae.parent, _json(vae) if vae.parent.is_dir() else None)
    return Published(folder, "DiT", layout, tensors, _licence(folder), False, told(objective), space, latents)


def _unet(folder: Path, inner: Path, config: Mapping[str, Any], objective: str | None) -> Published:
    space, objective, scale = _process(folder, objective)
    tensors = _tensors(inner)
    layout = Layout(
        _options(inner, config, scale),
        int(config["in_channels"]),
        int(config["sample_size"]),
        int(config.get("num_class_embeds") or 0),
        with_sentences(from_diffusers, sided=False),
    )
    method = {"name": objective, **({"levels": CD_LEVELS} if objective == "cd" else {})}
    turned = space["noise_input"] == "log_sigma"
    return Published(folder, "UNet2DModel", layout, tensors, _licence(folder), turned, method, space)


def _options(folder: Path, config: Mapping[str, Any], time_scale: float | None) -> NetworkOptions:
    for key, value in _ADM_FORM.items():
        if config.get(key) != value:
            raise UserError(f"{folder} has {key} {config.get(key)}, and no network here: an ADM has {value}")
    groups = config.get("attn_norm_num_groups")  # diffusers' middle attention has no normalisation without it
    if groups != 32 and not (groups is None and config["resnet_time_scale_shift"] == "default"):
        raise UserError(f"{folder} has attn_norm_num_groups {groups}, and no network here: an ADM has 32")
    widths, side = list(config["block_out_channels"]), int(config["sample_size"])
    down, up = (list(config[f"{way}_block_types"]) for way in ("down", "up"))
    attends = [kind.startswith("Attn") for kind in down]
    known = {"AttnDownBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D"}
    if [kind.startswith("Attn") for kind in reversed(up)] != attends or not set(down) <= known:
        raise UserError(f"{folder} has blocks {down} and {up}, which no network here has")
    if any(width % widths[0] for width in widths):
        raise UserError(f"{folder} has widths {widths}, which are no multiples of the first")
    modulation = _MODULATIONS.get(config["resnet_time_scale_shift"])
    if modulation is None:
        raise UserError(f"{folder} has resnet_time_scale_shift {config['resnet_time_scale_shift']}, unknown here")
    options = ADMOptions(
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=int(config["layers_per_block"]),
        attention=tuple(side >> level for level, attended in enumerate(attends) if attended),
        head_channels=int(config.get("attention_head_dim") or 8),
        modulation=modulation,  # type: ignore[arg-type]
        time_scale=time_scale,
    )
    return sized(options)


def _process(folder: Path, objective: str | None) -> tuple[dict[str, Any], str, float | None]:
    """What the scheduler says: (space of the run, objective, scale of the time that the network is told)."""
    path = folder / "scheduler" / "scheduler_config.json"
    about = _json(path)
    kind = about.get("_class_name")
    if kind == "CMStochasticIterativeScheduler":
        if objective is None:
            raise UserError(f"{folder} is a consistency model: say how it was trained, by --objective cd or ct")
        return {"sigma_data": float(about.get("sigma_data", 0.5)), "noise_input": "log_sigma"}, objective, OPENAI_TIME
    betas = (about.get("beta_start", DDPM_BETAS[0]), about.get("beta_end", DDPM_BETAS[1]))
    linear = about.get("beta_schedule", "linear") == "linear" and about.get("trained_betas") is None
    steps = about.get("num_train_timesteps", VP_STEPS)
    if kind not in _DDPM or not linear or betas != DDPM_BETAS or steps != VP_STEPS:
        raise UserError(f"{path}: {kind} with betas {betas} over {steps} steps has no exact form here")
    output = {"epsilon": "noise", "v_prediction": "velocity"}.get(about.get("prediction_type", "epsilon"))
    if output is None:
        raise UserError(f"{path}: prediction_type {about.get('prediction_type')} has no exact form here")
    return {"sigma_data": 1.0, "noise_input": "ddpm", "network_output": output}, objective or "edm", None


def _tensors(folder: Path) -> StoredTensors:
    path = folder / f"{WEIGHTS}.safetensors"
    if path.is_file():
        return read_safetensors(path)
    return read_tensors(path.with_suffix(".bin"))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): name a folder of diffusers'") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is no description of a network: name a folder of diffusers'")
    return found


def _licence(folder: Path) -> str:
    """What the front matter of the README says; empty where it says nothing."""
    path = folder / "README.md"
    found = re.search(r"^license:\s*(\S.*)$", path.read_text(), re.MULTILINE) if path.is_file() else None
    return "" if found is None else found[1].strip()
