"""What generated images are compared with: the training split, and the same figures for real images beside it.

Computed once per (data, extractor, number of samples) and kept beside the evaluations: `reference.safetensors` for the
worker, `reference.json` for readers.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from sctrain.errors import UserError
from sctrain.evaluation.extractor import Extractor
from sctrain.evaluation.frechet import Moments, frechet_distance
from sctrain.evaluation.images import RealImages, blocks, evenly_spaced, in_memory, open_pictures
from sctrain.evaluation.metrics import Manifold, class_agreement, nearest_distance
from sctrain.files import write_bytes, write_json

FEATURE_POINTS = 5000  # of each side in precision and recall
SEED = 0
TENSORS, FIGURES = "reference.safetensors", "reference.json"


@dataclass(frozen=True)
class Reference:
    """The training split as the metrics see it."""

    moments: Moments
    manifold: Manifold  # of at most 5000 features
    images: Tensor  # uint8 (N, C, H, W): all, or as many as fit
    figures: dict[str, float]  # fd_resample, fd_test, agreement_test, precision_test, recall_test, nn_test

    def score(self, images: Tensor, labels: Tensor, extractor: Extractor) -> dict[str, float]:
        """The figures of generated images: uint8 (N, C, H, W), N >= 2, with the labels asked for."""
        features, predicted = extractor(images)
        thin = thinned(features)
        return {
            "fd": frechet_distance(Moments.of(features), self.moments),
            "agreement": class_agreement(predicted, labels),
            "precision": self.manifold.share_inside(thin),
            "recall": Manifold.of(thin).share_inside(self.manifold.points),
            "nn_ratio": nearest_distance(images, self.images) / self.figures["nn_test"],
        }


def thinned(features: Tensor) -> Tensor:
    """At most 5000 of (N, D), evenly spaced."""
    return features[torch.from_numpy(evenly_spaced(len(features), FEATURE_POINTS))]


def load_reference(url: str, extractor: Extractor, samples: int, folder: Path, vae: Path | None = None) -> Reference:
    """The reference for `samples` generated images: kept in `folder`, computed where missing or of other data."""
    train, test = (open_pictures(url, split, vae) for split in ("train", "test"))
    fingerprint = _fingerprint(train, test, extractor, samples)
    images, _ = in_memory(train)
    kept = _kept(folder, fingerprint)
    if kept is not None:
        moments, manifold, figures = kept
        return Reference(moments, manifold, images, figures)
    reference = _computed(train, test, images, extractor, samples)
    moments, manifold = reference.moments, reference.manifold
    tensors = {"count": torch.tensor(moments.count), "mean": moments.mean, "scatter": moments.scatter}
    tensors |= {"features": manifold.points.contiguous(), "radii": manifold.radii}
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / TENSORS, save(tensors, {"fingerprint": fingerprint}))
    write_json(folder / FIGURES, {"fingerprint": fingerprint, "samples": samples, **reference.figures})
    return reference


def _kept(folder: Path, fingerprint: str) -> tuple[Moments, Manifold, dict[str, float]] | None:
    if not (folder / TENSORS).is_file() or not (folder / FIGURES).is_file():
        return None
    figures = json.loads((folder / FIGURES).read_text())
    with safe_open(folder / TENSORS, "pt") as file:
        if {file.metadata()["fingerprint"], figures.pop("fingerprint")} != {fingerprint}:
            return None
        tensors = {name: file.get_tensor(name) for name in ("count", "mean", "scatter", "features", "radii")}
    figures.pop("samples")
    moments = Moments(int(tensors["count"]), tensors["mean"], tensors["scatter"])
    return moments, Manifold(tensors["features"], tensors["radii"]), figures


def _computed(train: RealImages, test: RealImages, images: Tensor, extractor: Extractor, samples: int) -> Reference:
    moments = Moments.over(extractor.features(block) for block in blocks(train))
    resample = Moments.over(_resampled(train, extractor, samples))
    manifold = Manifold.of(extractor.features(in_memory(train, FEATURE_POINTS)[0]))
    test_images, test_labels = in_memory(test, FEATURE_POINTS)
    test_features, predicted = extractor(test_images)
    figures = {
        "fd_resample": frechet_distance(resample, moments),
        "fd_test": frechet_distance(Moments.over(extractor.features(block) for block in blocks(test)), moments),
        "agreement_test": class_agreement(predicted, test_labels),
        "precision_test": manifold.share_inside(test_features),
        "recall_test": Manifold.of(test_features).share_inside(manifold.points),
        "nn_test": nearest_distance(test_images, images),
    }
    if figures["nn_test"] == 0:
        raise UserError(f"every test image of {train.url} is also a training image; prepare it from distinct images")
    return Reference(moments, manifold, images, figures)


def _resampled(train: RealImages, extractor: Extractor, samples: int) -> Iterator[Tensor]:
    """Features of `samples` training images drawn with replacement, block by block."""
    drawn = torch.randint(len(train), (samples,), generator=torch.Generator().manual_seed(SEED))
    times = torch.bincount(drawn, minlength=len(train))
    start = 0
    for block in blocks(train):
        yield extractor.features(block).repeat_interleave(times[start : start + len(block)], dim=0)
        start += len(block)


def _fingerprint(train: RealImages, test: RealImages, extractor: Extractor, samples: int) -> str:
    splits = train.description.splits
    parts = [splits["train"].fingerprint, splits["test"].fingerprint, extractor.fingerprint, str(samples)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
