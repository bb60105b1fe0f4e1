"""sctrain import: published networks become runs whose denoisers are the published ones, in float64."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preparing import write_photos
from published import dumped, legacy, persistent, tree
from published_edm2 import PublishedEDM2
from published_unet import PublishedUNet
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.description import read_description
from data_pipeline.sources.folder import prepare_folder
from models.dit_options import DiTOptions
from models.layers import Conditioning
from models.registry import build_network, free_form
from models.unet_options import ADMOptions
from sctrain.building import fresh_network, parameterization
from sctrain.cli import main
from sctrain.config.loading import load
from sctrain.config.schema import RunConfig, WeightsFrom
from sctrain.errors import UserError
from sctrain.imports.published import read_published
from sctrain.imports.run_folder import RETIME, described, write_run
from sctrain.processes import denoise, per_sample, time_of
from sctrain.snapshots import newest_images, open_weights, snapshot_config
from sctrain.sources import pinned, refuse_unfit_sources

SIDE, B = 8, 3
SIGMAS, LABELS = torch.tensor([0.01, 0.6, 40.0]).double(), torch.tensor([0, 1, 1])
ONE_HOT = torch.nn.functional.one_hot(LABELS, 2).double()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RGB images of 8x8 in two classes."""
    folder = tmp_path_factory.mktemp("data")
    prepare_folder(write_photos(folder / "photos"), folder / "rgb", SIDE)
    return folder / "rgb"


def drawn(model: Any, told: Tensor) -> dict[str, Tensor]:
    """Its weights, which are made as it is evaluated; fit for float32."""
    torch.manual_seed(0)
    function = model.F if isinstance(model, PublishedEDM2) else model
    function(torch.randn(B, 3, SIDE, SIDE).double(), told, ONE_HOT)
    if isinstance(model, PublishedEDM2):
        model.u(told)
    model.weights |= {name: tensor.float().double() for name, tensor in model.weights.items()}
    return {name: tensor.float() for name, tensor in model.weights.items()}


def pickled(path: Path, outer: str, weights: dict[str, Tensor], heads: int, prefix: str, **state: Any) -> Path:
    """The file of a network of class `outer`, with the state of EDM's classes."""
    net = tree(outer, {prefix + name: tensor for name, tensor in weights.items()}, {}, label_dim=2, **state)
    net.add_module("block", persistent("UNetBlock", {}, num_heads=8 // heads, out_channels=8))
    path.write_bytes(dumped({"ema": net, "encoder": persistent("StandardRGBEncoder", {})}))
    return path


def stored(source: WeightsFrom) -> dict[str, Tensor]:
    return dict(open_weights(source.run / "snapshots", source.images, source.ema))


def denoised(run: Path, x: Tensor, sigma: Tensor) -> Tensor:
    """D(x, sigma) of an imported run, through snapshot, network and parameterization, in float64."""
    images = newest_images(run)
    config = snapshot_config(run, images)
    network = fresh_network(config, read_description(config.data.url))
    source = WeightsFrom(run=run, images=images, ema=config.ema.widths[0])
    network.load_state_dict(stored(source))
    F = parameterization(config).of(network.double().eval())
    t = time_of(sigma, config.sigma_data)
    x_t = per_sample(t.cos(), x) * x
    with torch.no_grad():
        return denoise(x_t, F(x_t / config.sigma_data, t, LABELS)[0], t, config.sigma_data)


def edm_denoised(F: Any, x: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """EDM table 1, the column of EDM."""
    total = (sigma**2 + sigma_data**2).sqrt()
    c_skip, c_out, c_in = sigma_data**2 / total**2, sigma * sigma_data / total, 1 / total
    inner = F(per_sample(c_in, x) * x, sigma.log() / 4, ONE_HOT)
    return per_sample(c_skip, x) * x + per_sample(c_out, x) * inner


SONG = {
    "ddpmpp": PublishedUNet(song=True, labels=2),
    "ncsnpp": PublishedUNet(song=True, taps=(1, 3, 3, 1), labels=2),
    "adm": PublishedUNet(song=False, labels=2),
}


@pytest.mark.parametrize("family", SONG)
def test_edm(tmp_path: Path, data: Path, family: str):
    model = SONG[family]
    weights = drawn(model, SIGMAS.log() / 4)
    path = pickled(tmp_path / "edm.pkl", "EDMPrecond", weights, 4, "model.", sigma_data=0.5)
    run = tmp_path / "teacher"
    assert main(["import", str(path), "--to", str(run), "--data", str(data)]) == 0
    assert snapshot_config(run, 1).network.name == family
    x = torch.randn(B, 3, SIDE, SIDE).double() * per_sample(SIGMAS + 0.5, torch.empty(B, 1, 1, 1))
    torch.testing.assert_close(denoised(run, x, SIGMAS), edm_denoised(model, x, SIGMAS), rtol=1e-6, atol=1e-6)


def test_vp(tmp_path: Path, data: Path):
    """D = x - sigma F(x / sqrt(sigma^2 + 1), 999 s(sigma))."""
    model = PublishedUNet(song=True, labels=2)
    s = torch.tensor([0.01, 0.3, 0.9]).double()
    sigma = ((0.5 * 19.9 * s**2 + 0.1 * s).exp() - 1).sqrt()
    weights = drawn(model, 999 * s)
    path = pickled(tmp_path / "vp.pkl", "VPPrecond", weights, 4, "model.", beta_d=19.9, beta_min=0.1, M=1000)
    run = tmp_path / "teacher"
    write_run(read_published(path), run, str(data))
    x = torch.randn(B, 3, SIDE, SIDE).double() * per_sample(sigma + 0.5, torch.empty(B, 1, 1, 1))
    expected = x - per_sample(sigma, x) * model(per_sample((sigma**2 + 1).rsqrt(), x) * x, 999 * s, ONE_HOT)
    torch.testing.assert_close(denoised(run, x, sigma), expected, rtol=1e-5, atol=1e-5)
    assert snapshot_config(run, 1).data.std == (0.5,), "the data keep their size, [-1, 1]"


def edm2_file(folder: Path, labels: int = 2) -> tuple[PublishedEDM2, Path]:
    name = "edm2-img8-s-2147483-0.130.pkl"
    model = PublishedEDM2(multipliers=(1, 4), labels=labels, image=3)
    weights = drawn(model, SIGMAS.log() / 4)
    return model, pickled(folder / name, "Precond", weights, 4, "", sigma_data=0.5)


@pytest.mark.parametrize("labels", [2, 0])
def test_edm2(tmp_path: Path, data: Path, labels: int):
    model, path = edm2_file(tmp_path, labels)
    run = tmp_path / "teacher"
    write_run(read_published(path), run, str(data))
    images = newest_images(run)
    config = snapshot_config(run, images)
    assert (images, config.ema.widths, config.network.name) == (2_147_483_000, (0.13,), "edm2")
    x = torch.randn(B, 3, SIDE, SIDE).double() * per_sample(SIGMAS + 0.5, torch.empty(B, 1, 1, 1))
    expected = edm_denoised(model.F, x, SIGMAS)
    torch.testing.assert_close(denoised(run, x, SIGMAS), expected, rtol=1e-5, atol=1e-5)
    network = fresh_network(config, read_description(str(data)))
    network.load_state_dict(stored(WeightsFrom(run=run, images=images, ema=0.13)))
    w = network.double()(x, SIGMAS.log() / 4, LABELS)[1]
    torch.testing.assert_close(w, -model.u(SIGMAS.log() / 4), rtol=1e-5, atol=1e-5)


def trigflow_denoised(F: Any, x: Tensor, sigma: Tensor) -> Tensor:
    """f = cos t x_t - sin t sigma_d F(x_t / sigma_d, t), at x_t = cos t x."""
    t = (sigma / 0.5).atan()
    x_t = per_sample(t.cos(), x) * x
    return per_sample(t.cos(), x) * x_t - per_sample(t.sin(), x) * 0.5 * F(x_t / 0.5, t, ONE_HOT)


@pytest.mark.parametrize(
    ("outer", "model"),
    [
        ("TrigFlowPrecond", PublishedEDM2(multipliers=(1, 4), labels=2, image=3, scm=True)),
        ("TrigFlowDDPMPPPrecond", PublishedUNet(song=True, labels=2, scm=True)),
    ],
)
def test_the_reproduction_of_scm(
    tmp_path: Path, data: Path, outer: str, model: Any, capsys: pytest.CaptureFixture[str]
):
    weights = drawn(model, SIGMAS)
    edm2 = isinstance(model, PublishedEDM2)
    path = pickled(tmp_path / "phema-0203423-0.075.pkl", outer, weights, 4, "" if edm2 else "unet.", sigma_data=0.5)
    assert "--objective trigflow, sct or scd" in refusal(path, data, capsys)
    run = tmp_path / "run"
    assert main(["import", str(path), "--to", str(run), "--data", str(data), "--objective", "sct"]) == 0
    assert not (run / RETIME).exists(), "it is told t as it is"
    config = snapshot_config(run, newest_images(run))
    assert (config.network.name, config.ema.widths) == ("edm2-scm" if edm2 else "ddpmpp-scm", (0.075,))
    x = torch.randn(B, 3, SIDE, SIDE).double() * per_sample(SIGMAS + 0.5, torch.empty(B, 1, 1, 1))
    expected = trigflow_denoised(model.F if edm2 else model, x, SIGMAS)
    torch.testing.assert_close(denoised(run, x, SIGMAS), expected, rtol=1e-4, atol=1e-4)
    segmented = weights | {("unet.emb_t_k.weight" if edm2 else "map_t_k.weight"): torch.ones(1)}
    pickled(path, outer, segmented, 4, "" if edm2 else "unet.", sigma_data=0.5)
    assert "several segments" in refusal(path, data, capsys, "--objective", "scd")


def test_a_published_size_is_known_by_its_name():
    from models.edm2_options import EDM2Size
    from sctrain.imports.layouts import sized

    for size in ("edm2-xs", "edm2-xxl"):
        assert sized(free_form(EDM2Size(size))) == EDM2Size(size)  # type: ignore[arg-type]


def test_a_state_dictionary_and_its_objective(tmp_path: Path, data: Path):
    """EDM's own names in torch's file, not a pickle of classes."""
    model = PublishedUNet(song=True, labels=2)
    path = tmp_path / "weights.pt"
    path.write_bytes(legacy(drawn(model, SIGMAS.log() / 4)))
    with pytest.raises(UserError, match=r"name it by --objective"):
        read_published(path)
    published = replace(read_published(path, objective="edm"), licence="mine")
    write_run(published, tmp_path / "run", str(data))
    x = torch.randn(B, 3, SIDE, SIDE).double()
    torch.testing.assert_close(
        denoised(tmp_path / "run", x, SIGMAS), edm_denoised(model, x, SIGMAS), rtol=1e-6, atol=1e-6
    )


def test_weights_of_our_own_names(tmp_path: Path, data: Path):
    network = DiTOptions(width=16, depth=1, heads=2)
    weights = build_network(network, 3, SIDE, SIDE, Conditioning(2)).state_dict()
    save_file(weights, tmp_path / "ours.safetensors")
    published = replace(
        read_published(tmp_path / "ours.safetensors", network=network, objective="trigflow"), licence="mine"
    )
    write_run(published, tmp_path / "run", str(data))
    images = newest_images(tmp_path / "run")
    found = stored(WeightsFrom(run=tmp_path / "run", images=images, ema=0.05))
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
    save_file(weights | {"more.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    more = read_published(tmp_path / "more.safetensors", network=network, objective="trigflow")
    with pytest.raises(UserError, match=r"more\.weight is absent"):
        write_run(replace(more, licence="mine"), tmp_path / "other", str(data))


def test_retiming_is_a_description_that_trains(tmp_path: Path, data: Path):
    _, path = edm2_file(tmp_path)
    run = tmp_path / "teacher"
    write_run(read_published(path), run, str(data))
    config = pinned(load(run / RETIME))
    refuse_unfit_sources(config)
    assert (config.noise_input, config.objective.name) == ("t", "trigflow")
    assert config.start_from is not None and config.start_from.images == 2_147_483_000
    with pytest.raises(UserError, match=r"'start_from.relearns' true"):
        refuse_unfit_sources(pinned(load(run / RETIME, ["start_from.relearns=false"])))


def test_the_licence_goes_with_all_that_is_made_of_it(tmp_path: Path, data: Path):
    _, path = edm2_file(tmp_path)
    run = tmp_path / "teacher"
    write_run(read_published(path), run, str(data))
    taught = snapshot_config(run, newest_images(run))
    assert "CC BY-NC-SA 4.0" in taught.licence
    assert pinned(load(run / RETIME)).licence == taught.licence
    own = pinned(load(run / RETIME, ["licence=mine"]))
    assert own.licence == f"mine; {taught.licence}"
    assert pinned(own).licence == own.licence


def test_sampling_an_imported_run(tmp_path: Path, data: Path):
    _, path = edm2_file(tmp_path)
    assert main(["import", str(path), "--to", str(tmp_path / "run"), "--data", str(data)]) == 0
    out = tmp_path / "grid.png"
    assert main(["sample", str(tmp_path / "run"), "--steps", "2", "--count", "4", "--out", str(out)]) == 0
    assert out.is_file()


def refusal(path: Path, data: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    capsys.readouterr()
    assert main(["import", str(path), "--to", str(path.parent / "refused"), "--data", str(data), *flags]) == 2
    assert not (path.parent / "refused").exists()
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    return said


def test_what_does_not_fit_is_refused(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]):
    model = PublishedUNet(song=True, labels=2)
    weights = drawn(model, SIGMAS.log() / 4)

    def file(outer: str = "EDMPrecond", weights: dict[str, Tensor] = weights, **state: Any) -> Path:
        return pickled(tmp_path / "edm.pkl", outer, weights, 4, "model.", **({"sigma_data": 0.5} | state))

    assert "is a VEPrecond, whose preconditioning has no exact form here" in refusal(file("VEPrecond"), data, capsys)
    assert "does not say its beta_d" in refusal(file("VPPrecond"), data, capsys)
    assert "has beta_d 10" in refusal(file("VPPrecond", beta_d=10.0, beta_min=0.1, M=1000), data, capsys)
    more = weights | {"enc.8x8_block0.extra.weight": torch.ones(2)}
    assert "no part of 'ddpmpp' is for: enc.8x8_block0.extra.weight" in refusal(file(weights=more), data, capsys)
    less = {name: tensor for name, tensor in weights.items() if name != "dec.4x4_in0.conv1.bias"}
    assert "there is no tensor 'dec.4x4_in0.conv1.bias'" in refusal(file(weights=less), data, capsys)
    wrong = weights | {"map_layer1.bias": torch.ones(7)}
    assert "condition.out.bias is (32,) and (7,) in 'ddpmpp'" in refusal(file(weights=wrong), data, capsys)
    odd = {name.replace("enc.8x8_conv", "enc.16x16_conv"): tensor for name, tensor in weights.items()}
    assert "not laid out as EDM's" in refusal(file(weights=odd), data, capsys)
    latents = tmp_path / "latents.pkl"
    _, path = edm2_file(tmp_path)
    strange = persistent("StabilityVAEEncoder", {})
    strange.scale, strange.bias = np.ones(4, np.float32), np.zeros(4, np.float32)
    net = tree("Precond", drawn(PublishedEDM2(multipliers=(1, 4), labels=2, image=3), SIGMAS), {}, sigma_data=0.5)
    latents.write_bytes(dumped({"ema": net, "encoder": strange}))
    assert "latents of no known convention" in refusal(latents, data, capsys)
    (tmp_path / "net.pkl").write_bytes(dumped({"ema": 1}))
    assert "neither a network nor a dictionary of tensors" in refusal(tmp_path / "net.pkl", data, capsys)
    assert "'--network'" not in refusal(path, data, capsys, "--network", "{name: nothing}")


def test_edm2_on_latents_has_its_convention(tmp_path: Path, data: Path):
    scale = np.float32(0.5) / np.float32([4.17, 4.62, 3.71, 3.28])
    encoder = persistent("StabilityVAEEncoder", {})
    encoder.scale, encoder.bias = scale, -np.float32([5.81, 3.25, 0.12, -2.15]) * scale
    model = PublishedEDM2(multipliers=(1, 4), labels=2, image=4)
    torch.manual_seed(0)
    model.F(torch.randn(B, 4, SIDE, SIDE).double(), SIGMAS, ONE_HOT)
    model.u(SIGMAS)
    net = tree("Precond", {name: tensor.half() for name, tensor in model.weights.items()}, {}, sigma_data=0.5)
    path = tmp_path / "edm2-img512-s-2147483-0.130.pkl"
    path.write_bytes(dumped({"ema": net, "encoder": encoder}))
    published = read_published(path)
    assert published.latents == "edm2"
    about = read_description(str(data)).model_copy(update={"channels": 4})
    config = described(published, tmp_path / "run", str(data), about)
    assert config.data.latents == "edm2" and config.data.mean == (5.81, 3.25, 0.12, -2.15)
    with pytest.raises(UserError, match=r"holds images: remove it"):
        write_run(replace(published, layout=replace(published.layout, channels=3)), tmp_path / "run", str(data))


def test_a_hostile_file_is_one_sentence(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]):
    path, mark = tmp_path / "net.pkl", tmp_path / "mark"
    path.write_bytes(f"cos\nsystem\n(S'touch {mark}'\ntR.".encode())
    assert "it names os.system, which no network needs" in refusal(path, data, capsys)
    assert not mark.exists()


def test_a_run_is_never_overwritten(tmp_path: Path, data: Path):
    _, path = edm2_file(tmp_path)
    write_run(read_published(path), tmp_path / "run", str(data))
    with pytest.raises(UserError, match=r"is a run already"):
        write_run(read_published(path), tmp_path / "run", str(data))


def test_openai(tmp_path: Path, data: Path):
    """A consistency model by CM 2023: f = c_skip x + c_out F(c_in x, 250 ln sigma), F by OpenAI's names."""
    from safetensors.torch import save_file

    options = ADMOptions(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=4, time_scale=1000.0)
    config = RunConfig.model_validate(
        {"name": "x", "run_dir": "x", "data": {"url": str(data)}, "network": options, "objective": {"name": "ct"},
         "batch": {"global_size": 1}, "budget_images": 1}
    )  # fmt: skip
    network = fresh_network(config, read_description(str(data)))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs = in_openai_names(network)
    path = tmp_path / "ct_images8.safetensors"
    save_file(theirs, path)
    name = (
        "{name: adm, channels: 8, multipliers: [1, 2], blocks: 1, attention: [4], head_channels: 4, time_scale: 1000}"
    )
    run = tmp_path / "run"
    assert main(["import", str(path), "--to", str(run), "--data", str(data), "--network", name]) == 0
    assert snapshot_config(run, 1).objective.name == "ct" and not (run / RETIME).exists()
    assert snapshot_config(run, 1).licence == "MIT (OpenAI)"
    x, e, d = torch.randn(B, 3, SIDE, SIDE).double(), 0.002, 0.5
    c_skip = d**2 / ((SIGMAS - e) ** 2 + d**2)
    c_out, c_in = (SIGMAS - e) * d / (SIGMAS**2 + d**2).sqrt(), (SIGMAS**2 + d**2).rsqrt()
    inner = network.double().eval()(per_sample(c_in, x) * x, SIGMAS.log() / 4, LABELS)[0]
    expected = per_sample(c_skip, x) * x + per_sample(c_out, x) * inner
    torch.testing.assert_close(denoised(run, x, SIGMAS), expected, rtol=1e-6, atol=1e-6)


def in_openai_names(network: torch.nn.Module) -> dict[str, Tensor]:
    from models.unet_published import _openai_names

    own = network.state_dict()
    found = {
        f"{theirs}.{part}": own[f"{ours}.{part}"]
        for ours, theirs in _openai_names(network)
        for part in ("weight", "bias")
    }
    return {**found, "label_emb.weight": own["condition.label.weight"][:-1].clone()}
