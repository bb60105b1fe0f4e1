"""LPIPS (Zhang et al. 2018): the distance of two images in the features of VGG16, weighed by how people judge.

The package lpips brings the architecture and its small linear heads; the features' weights are a file of the user's,
torchvision's VGG16. Nothing is downloaded. CM 2023 computed LPIPS by another port (piq, with `replace_pooling`: average
pooling where VGG has maximum pooling), so its values are near ours and not the same.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sctrain.errors import UserError
from sctrain.processes import ModelSpace

_WANTED = "'objective.metric.weights' must be the state of torchvision's VGG16, saved by torch.save"
_SIDE, _LARGE = 224, 256  # images below the second are resized to the first (CM 2023 appendix C)


class Perceptual:
    """LPIPS of images in model space, (B, C, H, W) x 2 -> (B,), in float32; the gradient reaches both images."""

    def __init__(self, network: nn.Module, space: ModelSpace):
        """`network` compares images (B, 3, H, W) in [-1, 1], (B, 1, 1, 1); it follows them to their device."""
        self._network, self._space = network, space

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self._network.to(x.device)(self.seen(x), self.seen(y)).flatten()

    def seen(self, x: Tensor) -> Tensor:
        """What the network is shown: [-1, 1] without clipping, which would stop gradients; three channels; large."""
        x = self._space.to_signed(x.float())
        if min(x.shape[-2:]) < _LARGE:
            x = F.interpolate(x, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)
        return x.expand(-1, 3, -1, -1)


def build_perceptual(weights: str, shape: tuple[int, ...], space: ModelSpace) -> Perceptual:
    """LPIPS with the VGG16 in the file `weights` for images (C, H, W). UserError names what is missing or misfits."""
    if shape[0] not in (1, 3):
        raise UserError(f"'objective.metric' lpips compares grey or RGB images, these have {shape[0]} channels; use l2")
    return Perceptual(_package(Path(weights)), space)


def _package(file: Path) -> nn.Module:
    """The package's own network with its heads and the features of `file`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torchvision, about how the package calls it
            import lpips

            with torch.device("meta"):  # no weights are drawn, so none of a run's random numbers are used up
                network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    except ImportError as error:
        raise UserError(f"'objective.metric' lpips: {error}; install it by pip install 'sctrain[lpips]'") from error
    lpips.normalize_tensor = _of_unit_length
    heads = _read(Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth")
    state = _features(network.net, _read(file), file)
    network.load_state_dict(heads | state, strict=False, assign=True)
    assert not any(tensor.is_meta for tensor in network.state_dict().values()), "every weight was in one of the files"
    return network.requires_grad_(False).eval()


def _of_unit_length(x: Tensor, eps: float = 1e-10) -> Tensor:
    """(B, C, H, W) over its norm along C. The package's own has no gradient (nan) where all channels are 0."""
    return x / (x.square().sum(dim=1, keepdim=True) + eps**2).sqrt()


def _features(net: nn.Module, found: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """torchvision's `features.10.weight` as the package's `net.slice3.10.weight`; classifiers are left out."""
    state = {}
    for name, wanted in net.state_dict().items():
        key = f"features.{name.partition('.')[2]}"
        tensor = found.get(key)
        if tensor is None or tensor.shape != wanted.shape:
            what = "is missing" if tensor is None else f"is {tuple(tensor.shape)}, not {tuple(wanted.shape)}"
            raise UserError(f"{file}: {key} {what}; {_WANTED}")
        state[f"net.{name}"] = tensor.float()
    return state


def _read(file: Path) -> dict[str, Tensor]:
    """Named tensors, and nothing else: no code of the file is run."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} cannot be read ({reason}); {_WANTED}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} holds no named tensors; {_WANTED}")
    return dict(state)
