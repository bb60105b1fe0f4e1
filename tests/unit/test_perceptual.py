"""LPIPS: what its network is shown, what it computes, and what is said where something is missing."""

import builtins
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sctrain.config.objectives import Distance
from sctrain.errors import UserError
from sctrain.objectives.metrics import Images, build_metric
from sctrain.objectives.perceptual import Perceptual
from sctrain.processes import ModelSpace

SPACE = ModelSpace((0.3,), (0.4,), 0.5)


class Recorder(nn.Module):
    """Mean square difference of what it is shown; stands for LPIPS where only its input is asked about."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.shown = x, y
        return (x - y).square().mean(dim=(1, 2, 3))


def in_model_space(signed: Tensor) -> Tensor:
    """Of pixels in [-1, 1]."""
    return ((signed + 1) / 2 - 0.3) * 0.5 / 0.4


@pytest.mark.parametrize(("channels", "side", "seen"), [(1, 8, 224), (3, 32, 224), (3, 255, 224), (3, 256, 256)])
def test_images_are_shown_in_colour_between_minus_one_and_one_and_large(channels: int, side: int, seen: int):
    network = Recorder()
    signed = torch.rand(2, channels, side, side) * 2 - 1
    distance = Perceptual(network, SPACE)(in_model_space(signed), in_model_space(-signed))
    assert distance.shape == (2,)
    expected = signed.repeat(1, 3 // channels, 1, 1)
    if side < 256:
        expected = F.interpolate(expected, size=(224, 224), mode="bilinear")
    assert network.shown[0].shape == (2, 3, seen, seen)
    torch.testing.assert_close(network.shown, (expected, -expected), atol=1e-5, rtol=0)


def test_the_map_to_signed_pixels_is_that_of_the_data():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    torch.testing.assert_close(SPACE.to_signed(SPACE.from_pixels(pixels)), pixels / 127.5 - 1, atol=1e-5, rtol=0)


def test_the_gradient_passes_beyond_white_and_black():
    x = in_model_space(torch.full((1, 1, 8, 8), 3.0)).requires_grad_()
    Perceptual(Recorder(), SPACE)(x, torch.zeros_like(x)).sum().backward()
    assert x.grad is not None and x.grad.min() > 0


def metric(weights: Path | str, shape: tuple[int, ...] = (3, 16, 16)) -> Perceptual:
    made = build_metric(Distance(name="lpips", weights=str(weights)), Images(shape, SPACE))
    assert isinstance(made, Perceptual)
    return made


def refusal(weights: Path | str, shape: tuple[int, ...] = (3, 16, 16)) -> str:
    with pytest.raises(UserError) as caught:
        metric(weights, shape)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_latents_are_refused():
    assert "these have 4 channels" in refusal("vgg16.pth", (4, 16, 16))


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    found = builtins.__import__

    def without_lpips(name: str, *arguments):
        if name == "lpips":
            raise ModuleNotFoundError("No module named 'lpips'")
        return found(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_lpips)
    assert refusal("vgg16.pth") == (
        "'objective.metric' lpips: No module named 'lpips'; install it by pip install 'sctrain[lpips]'"
    )


class Trap:
    """Code that a pickle would run."""

    def __reduce__(self):
        return print, ("executed",)


def test_files_that_do_not_hold_the_weights_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("lpips")
    contents = {"text.pth": None, "list.pth": [1], "other.pth": {"weight": torch.zeros(3)}, "trap.pth": Trap()}
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text.pth").write_text("not a file of tensors")
    (tmp_path / "empty.pth").touch()
    torch.save({"features.0.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "narrow.pth")
    for name, reason in {
        "absent.pth": "cannot be read (No such file or directory)",
        "text.pth": "cannot be read (",
        "empty.pth": "cannot be read (",
        "trap.pth": "cannot be read (",
        "list.pth": "holds no named tensors",
        "other.pth": "features.0.weight is missing",
        "narrow.pth": "features.0.weight is (8, 3, 3, 3), not (64, 3, 3, 3)",
    }.items():
        sentence = refusal(tmp_path / name)
        assert sentence.startswith(f"{tmp_path / name}") and reason in sentence and "torchvision's VGG16" in sentence
    assert "executed" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torchvision's, with random weights: the convolutions alone, 59 MB."""
    torch.manual_seed(0)
    channels, at, state, before = [64, 64, 0, 128, 128, 0, 256, 256, 256, 0, *(512, 512, 512, 0) * 2], 0, {}, 3
    for width in channels:
        if width:
            state[f"features.{at}.weight"] = torch.randn(width, before, 3, 3) * (2 / (9 * before)) ** 0.5
            state[f"features.{at}.bias"] = 0.1 * torch.randn(width)
            before = width
        at += 2 if width else 1
    file = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, file)
    return file


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*weight.*:UserWarning", "ignore:.*pretrained.*:UserWarning")  # of torchvision
def test_the_distance_is_that_of_the_package(vgg16: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("lpips")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("a download"))
    before = torch.get_rng_state()
    ours = metric(vgg16)
    assert torch.equal(torch.get_rng_state(), before), "no random number of the run is used"
    x, y = (in_model_space(torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_() for _ in range(2))
    distance = ours(x, y)
    package = _package()
    theirs = package.LPIPS(net="vgg", pnet_rand=True, verbose=False)  # heads as it loads them itself, features random
    state = torch.load(vgg16, weights_only=True)
    theirs.net.load_state_dict({f"slice{_slice(k)}.{k.removeprefix('features.')}": v for k, v in state.items()})
    torch.testing.assert_close(distance, theirs(ours.seen(x), ours.seen(y)).flatten())
    assert distance.min() > 0.01 and ours(x, x).abs().max() == 0
    x_grad, y_grad = torch.autograd.grad(distance.sum(), (x, y))
    assert x_grad.abs().max() > 0 and y_grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in ours._network.parameters())


def _slice(name: str) -> int:
    """The package's slice that holds `features.N.weight`."""
    return 1 + sum(int(name.split(".")[1]) >= first for first in (4, 9, 16, 23))


def _package():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lpips
    return lpips
