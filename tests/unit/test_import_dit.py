"""DiT: the imported denoiser is that of diffusers' own network, and of its authors' names; tangents pass it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from test_import import LABELS, B, denoised
from torch import Tensor

from data_pipeline.description import DESCRIPTION_FILE
from data_pipeline.generated import write_latents
from models.dit_options import DiTOptions
from models.layers import Conditioning
from models.registry import build_network
from sctrain.bench.memory import Watch
from sctrain.cli import main
from sctrain.errors import UserError
from sctrain.imports.published import read_published
from sctrain.imports.run_folder import RETIME, write_run
from sctrain.parameterization import ddpm_levels
from sctrain.processes import per_sample
from sctrain.snapshots import snapshot_config

SIDE, CLASSES, HEADS, WIDTH, DEPTH, PATCH = 8, 2, 2, 32, 2, 2
STEPS = torch.tensor([0, 500, 990])


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of 8x8 in two classes, in Stable Diffusion's convention."""
    return described(tmp_path_factory.mktemp("latents"), "sd")


def described(folder: Path, convention: str) -> Path:
    """What an import reads of a data set: its description."""
    write_latents(str(folder), samples=2, shards=1)
    path = folder / DESCRIPTION_FILE
    about = json.loads(path.read_text())
    about |= {"height": SIDE, "width": SIDE, "classes": ["a", "b"]}
    about["latents"]["convention"] = convention
    path.write_text(json.dumps(about))
    return folder


def diffusers_dit(folder: Path, prediction: str = "epsilon") -> DiTTransformer2DModel:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        out_channels=8,
        num_layers=DEPTH,
        sample_size=SIDE,
        num_embeds_ada_norm=CLASSES,
    ).eval()
    shared = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(shared)  # as the published ones were converted
    model.save_pretrained(folder / "transformer")
    DDIMScheduler(prediction_type=prediction).save_pretrained(folder / "scheduler")
    AutoencoderKL(block_out_channels=(32,), latent_channels=4, sample_size=SIDE).save_pretrained(folder / "vae")
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    return model.double()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_folder_of_diffusers(tmp_path: Path, latents: Path, prediction: str):
    model = diffusers_dit(tmp_path, prediction)
    run = tmp_path / "run"
    assert main(["import", str(tmp_path), "--to", str(run), "--data", str(latents)]) == 0
    config = snapshot_config(run, 1)
    assert (config.licence, config.data.latents, config.network.name) == ("cc-by-nc-4.0", "sd", "dit-zero")
    assert (run / RETIME).exists() and config.objective.label_dropout == 0.1
    sigma, x = ddpm_levels()[STEPS], torch.randn(B, 4, SIDE, SIDE).double()
    cos, sin = (per_sample(part, x) for part in ((1 + sigma**2).rsqrt(), sigma * (1 + sigma**2).rsqrt()))
    with torch.no_grad():
        out = model(cos * x, STEPS, LABELS).sample[:, :4]
    expected = (cos * x - sin * out) / cos if prediction == "epsilon" else cos * (cos * x) - sin * out
    torch.testing.assert_close(denoised(run, x, sigma), expected, rtol=2e-4, atol=2e-4)  # its times are float32


def authors_dit(weight: Callable[..., Tensor], x: Tensor, steps: Tensor, labels: Tensor) -> Tensor:
    """The noise that DiT says, written from the paper (section 3.2, appendix A) by the names of its published files."""

    def linear(name: str, x: Tensor, outputs: int) -> Tensor:
        return x @ weight(f"{name}.weight", outputs, x.shape[-1]).T + weight(f"{name}.bias", outputs)

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return norm(x) * (1 + scale[:, None]) + shift[:, None]

    batch, channels, side, _ = x.shape
    count = side // PATCH
    patches = weight("x_embedder.proj.weight", WIDTH, channels, PATCH, PATCH)
    h = F.conv2d(x, patches, weight("x_embedder.proj.bias", WIDTH), stride=PATCH).flatten(2).transpose(1, 2)
    omega = 10_000.0 ** -(torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH / 4))
    along = lambda place: [(place * omega).sin(), (place * omega).cos()]  # noqa: E731
    places = [torch.cat(along(column) + along(row)) for row in range(count) for column in range(count)]
    h = h + weight("pos_embed", value=torch.stack(places)[None])
    angles = steps[:, None] * torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / 128)
    c = linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1), WIDTH)
    c = linear("t_embedder.mlp.2", F.silu(c), WIDTH)
    c = F.silu(c + weight("y_embedder.embedding_table.weight", CLASSES + 1, WIDTH)[labels])
    for number in range(DEPTH):
        name = f"blocks.{number}"
        modulation = linear(f"{name}.adaLN_modulation.1", c, 6 * WIDTH)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6, 1)
        qkv = linear(f"{name}.attn.qkv", modulated(h, shift, scale), 3 * WIDTH)
        q, k, v = (part.reshape(batch, -1, HEADS, WIDTH // HEADS).transpose(1, 2) for part in qkv.chunk(3, -1))
        mixed = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1) @ v
        h = h + gate[:, None] * linear(f"{name}.attn.proj", mixed.transpose(1, 2).flatten(2), WIDTH)
        y = F.gelu(linear(f"{name}.mlp.fc1", modulated(h, mlp_shift, mlp_scale), 4 * WIDTH), approximate="tanh")
        h = h + mlp_gate[:, None] * linear(f"{name}.mlp.fc2", y, WIDTH)
    shift, scale = linear("final_layer.adaLN_modulation.1", c, 2 * WIDTH).chunk(2, 1)
    out = linear("final_layer.linear", modulated(h, shift, scale), PATCH * PATCH * 2 * channels)
    out = out.reshape(batch, count, count, PATCH, PATCH, 2 * channels).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(batch, 2 * channels, side, side)[:, :channels]


def test_the_authors_file(tmp_path: Path, latents: Path):
    weights: dict[str, Tensor] = {}

    def weight(name: str, *shape: int, value: Tensor | None = None) -> Tensor:
        if name not in weights:
            made = torch.randn(shape).double() / math.sqrt(max(math.prod(shape[1:]), 4)) if value is None else value
            weights[name] = made.float().double()
        return weights[name]

    torch.manual_seed(0)
    sigma, x = ddpm_levels()[STEPS], torch.randn(B, 4, SIDE, SIDE).double()
    cos, sin = (per_sample(part, x) for part in ((1 + sigma**2).rsqrt(), sigma * (1 + sigma**2).rsqrt()))
    out = authors_dit(weight, cos * x, STEPS, LABELS)
    path = tmp_path / "DiT.pt"
    torch.save({name: tensor.float() for name, tensor in weights.items()}, path)
    with pytest.raises(UserError, match=r"width 32 and depth 2 is none of the published"):
        read_published(path)
    told = "{name: dit-zero, heads: 2}"
    assert main(["import", str(path), "--to", str(tmp_path / "run"), "--data", str(latents), "--network", told]) == 0
    expected = (cos * x - sin * out) / cos
    torch.testing.assert_close(denoised(tmp_path / "run", x, sigma), expected, rtol=1e-5, atol=1e-5)
    torch.save({name: tensor.half() for name, tensor in weights.items()}, path)
    published = read_published(path, network=DiTOptions("dit-zero", heads=HEADS))
    network = build_network(published.layout.options, 4, SIDE, SIDE, Conditioning(CLASSES))
    with Watch() as watch:
        made = published.weights(network, SIDE)
    sizes = [tensor.nbytes for tensor in made.values()]
    assert sum(sizes) <= watch.peak <= 1.2 * (sum(sizes) + max(sizes)), "never two copies"
    save_file({name: weights[name].float() for name in list(weights)[:5]}, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match="cut short"):
        read_published(tmp_path / "short.safetensors")


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("transformer/config.json", {"norm_type": "layer_norm"}, "has norm_type layer_norm"),
        ("transformer/config.json", {"activation_fn": "geglu"}, "has activation_fn geglu"),
        ("vae/config.json", {"scaling_factor": 0.13025}, "scales latents by 0.13025"),
        ("scheduler/scheduler_config.json", {"_class_name": "CMStochasticIterativeScheduler"}, "consistency model"),
    ],
)
def test_what_is_no_dit_of_theirs_is_refused(tmp_path: Path, file: str, changes: dict[str, Any], sentence: str):
    diffusers_dit(tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=sentence):
        read_published(tmp_path, objective="cd")


def test_blocks_with_embeddings_of_their_own_are_refused(tmp_path: Path):
    diffusers_dit(tmp_path)
    path = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name] + 1}, path)
    with pytest.raises(UserError, match=r"one embedding for all"):
        read_published(tmp_path)


def test_images_in_another_convention_are_refused(tmp_path: Path):
    diffusers_dit(tmp_path)
    other = described(tmp_path, "scm")
    with pytest.raises(UserError, match=r"convention scm"):
        write_run(read_published(tmp_path), tmp_path / "run", str(other))


def test_it_starts_silent_and_takes_a_scale_of_guidance():
    network = build_network(DiTOptions("dit-zero", WIDTH, DEPTH, HEADS), 4, SIDE, SIDE, Conditioning(2, guided=True))
    u, t = torch.randn(B, 4, SIDE, SIDE), torch.rand(B)
    assert not network(u, t, LABELS, torch.ones(B))[0].any()
    with pytest.raises(ValueError, match=r"network\.mlp_eps is for dit-zero"):
        DiTOptions(mlp_eps=1e-5)
