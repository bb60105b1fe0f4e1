"""DiT (Peebles & Xie 2023): which network a file of its authors' or a folder of diffusers' holds, in what space.

It says the noise in DDPM's linear betas, of latents that are 0.18215 of what Stable Diffusion's auto-encoder gives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data_pipeline.latents import ConventionName
from models.dit_options import SHAPES, DiTOptions
from models.dit_published import from_diffusers_dit, from_dit
from models.registry import NetworkOptions
from sctrain.errors import UserError
from sctrain.imports.layouts import Layout, Tensors, sized, with_sentences
from sctrain.imports.weights import Published

META = "CC BY-NC 4.0 (Meta's DiT; non-commercial)"
SPACE = {"sigma_data": 1.0, "noise_input": "ddpm", "network_output": "noise"}
LATENTS: ConventionName = "sd"
SCALING = 0.18215  # of diffusers' descriptions of auto-encoders
_PERIOD = 10_000.0  # of the embedding of time; the authors' is a little shorter
_FORM = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
_DEFAULTS = _FORM | {"norm_eps": 1e-5, "patch_size": 2, "num_embeds_ada_norm": 1000}
_EMBEDDING = re.compile(r"transformer_blocks\.\d+\.norm1\.emb\.(.+)")


def is_dit(tensors: Tensors) -> bool:
    """Whether they have the names of DiT's authors."""
    return "x_embedder.proj.weight" in tensors


def told(objective: str | None) -> dict[str, Any]:
    """What it was trained for, classes left out of every tenth image."""
    name = objective or "edm"
    return {"name": name, "label_dropout": 0.1} if name == "edm" else {"name": name}


def read_authors(source: Path, tensors: Tensors, network: NetworkOptions | None, objective: str | None) -> Published:
    """Their file: a dictionary of tensors. UserError where it is cut short.

    `network` says how many heads there are where width and depth are not of a published size.
    """
    layout = _authors_layout(tensors, network)
    latents: ConventionName | None = LATENTS if layout.channels == 4 else None
    return Published(source, "DiT", layout, tensors, META, False, told(objective), SPACE, latents)


def _authors_layout(tensors: Tensors, network: NetworkOptions | None) -> Layout:
    places = tensors.get("pos_embed")
    patches, classes = tensors["x_embedder.proj.weight"], tensors.get("y_embedder.embedding_table.weight")
    if places is None or classes is None or patches.ndim != 4:
        raise UserError("these weights have the names of DiT, and not all of them: the file is cut short")
    width, channels, patch = patches.shape[:3]
    depth = 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")), default=0)
    heads = next((heads for *shape, heads in SHAPES.values() if shape == [width, depth]), None)
    if isinstance(network, DiTOptions):
        heads = network.heads
    if heads is None:
        raise UserError(
            f"a DiT of width {width} and depth {depth} is none of the published: give --network "
            "'{name: dit-zero, heads: ...}'"
        )
    return Layout(
        sized(DiTOptions("dit-zero", width, depth, heads, patch)),
        channels,
        math.isqrt(places.shape[1]) * patch,
        classes.shape[0] - 1,
        with_sentences(from_dit, sided=False),
        re.compile("pos_embed"),
    )


def folder_layout(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Layout:
    """Of diffusers' DiTTransformer2DModel, by its config.json; UserError where it has no exact form here."""
    config = _DEFAULTS | dict(config)
    for key, value in _FORM.items():
        if config[key] != value:
            raise UserError(f"{folder} has {key} {config[key]}, and no network here: a DiT has {value}")
    _refuse_several_embeddings(folder, tensors)
    heads = int(config["num_attention_heads"])
    shape = (heads * int(config["attention_head_dim"]), int(config["num_layers"]), heads, int(config["patch_size"]))
    return Layout(
        DiTOptions("dit-zero", *shape, time_period=_PERIOD, mlp_eps=float(config["norm_eps"])),
        int(config["in_channels"]),
        int(config["sample_size"]),
        int(config["num_embeds_ada_norm"]),
        with_sentences(from_diffusers_dit, sided=False),
        re.compile(rf"pos_embed\.pos_embed|{_EMBEDDING.pattern}"),
    )


def _refuse_several_embeddings(folder: Path, tensors: Tensors) -> None:
    """diffusers gives every block an embedding of the condition; the published ones are copies of one."""
    firsts = {name: tensors[name] for name in tensors if name.startswith("transformer_blocks.0.norm1.emb.")}
    for name in tensors:
        found = _EMBEDDING.fullmatch(name)
        first = found and firsts.get(f"transformer_blocks.0.norm1.emb.{found[1]}")
        if first is not None and not torch.equal(first, tensors[name]):
            raise UserError(f"{folder} has another {name} than its first block has; a DiT has one embedding for all")


def folder_latents(folder: Path, about: Mapping[str, Any] | None) -> ConventionName | None:
    """The convention of latents beside which the network lies; None where there is no auto-encoder."""
    if about is None:
        return None
    if about.get("scaling_factor", SCALING) != SCALING:
        raise UserError(
            f"{folder} scales latents by {about['scaling_factor']}, which is no known convention; known is {SCALING}"
        )
    return LATENTS
