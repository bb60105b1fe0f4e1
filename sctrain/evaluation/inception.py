"""The Frechet Inception distance of published papers: Inception's features and reference statistics, from files.

The network is torch-fidelity's port of the one of 2015 that all papers use; its weights are a file of the user's
(weights-inception-2015-12-05-6726825d.pth of torch-fidelity's releases). Statistics are EDM's .npz and EDM2's .pkl.
"""

from __future__ import annotations

import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from sctrain.errors import UserError
from sctrain.evaluation.frechet import Moments
from sctrain.imports.files import read_file, read_tensors
from sctrain.imports.inert import NotInertError
from sctrain.imports.torch_names import as_array

FEATURES = 2048
_AT_ONCE = 64  # images


@dataclass(frozen=True)
class Inception:
    """uint8 RGB images (N, 3, H, W) -> features (N, 2048) float64 on the CPU."""

    model: FeatureExtractorInceptionV3
    device: torch.device

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        parts = [self.model(block.to(self.device))[0].cpu() for block in images.split(_AT_ONCE)]
        return torch.cat(parts).double()


def load_inception(path: Path, device: torch.device) -> Inception:
    """The network with the weights in `path`; UserError where they are not its.

    torch-fidelity unpickles whatever it is given, so it is given a copy of the tensors that were read inertly.
    """
    weights = read_tensors(path)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "inception.pth"
        torch.save(dict(weights), copy)
        try:
            model = FeatureExtractorInceptionV3("inception", [str(FEATURES)], feature_extractor_weights_path=str(copy))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} are not torch-fidelity's weights of Inception ({reason})") from error
    return Inception(model.to(device), device)


def read_statistics(path: Path) -> Moments:
    """Mean and covariance of features: `mu` and `sigma` of an .npz, or of `fid` in a .pkl. UserError if it has none."""
    try:
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                mean, covariance = arrays["mu"], arrays["sigma"]
        else:
            found = read_file(path)["fid"]
            mean, covariance = as_array(found["mu"]), as_array(found["sigma"])
    except (KeyError, TypeError, ValueError, OSError, zipfile.BadZipFile, NotInertError) as error:
        raise UserError(f"{path} holds no statistics of Inception's features ({error})") from error
    if mean.shape != (FEATURES,) or covariance.shape != (FEATURES, FEATURES):
        raise UserError(f"{path} holds statistics of another network: mu is {mean.shape}")
    mean, covariance = (torch.from_numpy(np.array(part, np.float64)) for part in (mean, covariance))
    return Moments(2, mean, covariance)  # of two, whose sum of squared deviations is the covariance
