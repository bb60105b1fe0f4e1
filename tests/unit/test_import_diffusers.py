"""Folders of diffusers: the imported denoiser is that of the package's own network, for all that these predict."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, DDPMScheduler, UNet2DModel
from test_import import LABELS, SIDE, SIGMAS, B, data, denoised  # noqa: F401  (a fixture)

from sctrain.cli import main
from sctrain.errors import UserError
from sctrain.imports.published import read_published
from sctrain.imports.run_folder import RETIME
from sctrain.parameterization import ddpm_levels
from sctrain.processes import per_sample
from sctrain.snapshots import snapshot_config

FORM = dict(
    sample_size=SIDE,
    block_out_channels=(128, 128),
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    layers_per_block=1,
    attention_head_dim=32,
    downsample_type="resnet",
    upsample_type="resnet",
    num_class_embeds=2,
    attn_norm_num_groups=32,
)


def write(folder: Path, scheduler: Any, **changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    model = UNet2DModel(**(FORM | changes)).eval()
    model.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return model.double()


@pytest.mark.parametrize("modulation", ["scale_shift", "default"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddpm(tmp_path: Path, data: Path, modulation: str, prediction: str):  # noqa: F811
    scheduler = DDPMScheduler(prediction_type=prediction)
    model = write(tmp_path, scheduler, resnet_time_scale_shift=modulation)
    run = tmp_path / "run"
    assert main(["import", str(tmp_path), "--to", str(run), "--data", str(data)]) == 0
    config = snapshot_config(run, 1)
    assert (config.licence, config.noise_input, config.network.name) == ("mit", "ddpm", "adm")
    steps = torch.tensor([0, 500, 990])
    sigma, x = ddpm_levels()[steps], torch.randn(B, 3, SIDE, SIDE).double()
    kept = per_sample(scheduler.alphas_cumprod.double()[steps], x)  # diffusers' are float32
    noisy = per_sample((1 + sigma**2).rsqrt(), x) * x
    with torch.no_grad():
        out = model(noisy, steps, LABELS).sample
    if prediction == "epsilon":
        expected = (noisy - (1 - kept).sqrt() * out) / kept.sqrt()
    else:
        expected = kept.sqrt() * noisy - (1 - kept).sqrt() * out
    torch.testing.assert_close(denoised(run, x, sigma), expected, rtol=1e-3, atol=1e-3)


def test_a_consistency_model(tmp_path: Path, data: Path):  # noqa: F811
    model = write(tmp_path, CMStochasticIterativeScheduler(), resnet_time_scale_shift="scale_shift")
    with pytest.raises(UserError, match=r"--objective cd or ct"):
        read_published(tmp_path)
    run = tmp_path / "run"
    assert main(["import", str(tmp_path), "--to", str(run), "--data", str(data), "--objective", "cd"]) == 0
    assert not (run / RETIME).exists()
    x, e, d = torch.randn(B, 3, SIDE, SIDE).double(), 0.002, 0.5
    c_skip = d**2 / ((SIGMAS - e) ** 2 + d**2)
    c_out, c_in = (SIGMAS - e) * d / (SIGMAS**2 + d**2).sqrt(), (SIGMAS**2 + d**2).rsqrt()
    with torch.no_grad():
        out = model(per_sample(c_in, x) * x, 250 * SIGMAS.log(), LABELS).sample
    expected = per_sample(c_skip, x) * x + per_sample(c_out, x) * out
    torch.testing.assert_close(denoised(run, x, SIGMAS), expected, rtol=1e-4, atol=1e-4)


def test_old_weights_are_read_inertly(tmp_path: Path, data: Path):  # noqa: F811
    write(tmp_path, DDPMScheduler(), resnet_time_scale_shift="default")
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    expected = read_published(tmp_path).tensors
    torch.save(dict(expected), path.with_suffix(".bin"))
    path.unlink()
    found = read_published(tmp_path).tensors
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "holds a UNet2DConditionModel"),
        ("unet/config.json", {"downsample_type": "conv"}, "has downsample_type conv"),
        ("unet/config.json", {"norm_num_groups": 16}, "has norm_num_groups 16"),
        ("unet/config.json", {"up_block_types": ["AttnUpBlock2D"] * 2}, "which no network here has"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "scaled_linear"}, "has no exact form here"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type sample"),
        ("scheduler/scheduler_config.json", {"_class_name": "HeunDiscreteScheduler"}, "has no exact form here"),
    ],
)
def test_what_is_no_network_here_is_refused(tmp_path: Path, file: str, changes: dict[str, Any], sentence: str):
    write(tmp_path, DDPMScheduler(), resnet_time_scale_shift="default")
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=sentence):
        read_published(tmp_path)


def test_a_folder_of_something_else(tmp_path: Path):
    with pytest.raises(UserError, match=r"name a folder of diffusers'"):
        read_published(tmp_path)
