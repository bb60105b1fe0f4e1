"""The feature extractor of a data set: a small classifier trained on its training split, kept with the data.

`extractor.safetensors` holds the weights; `extractor.json`, written last, what they were trained on and how well they
do on the test split.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor

from data_pipeline.storage import exists, join_url, open_url, write_object
from models.classifier import FEATURES, Classifier
from sctrain.errors import UserError
from sctrain.evaluation.images import RealImages, in_memory, open_pictures
from sctrain.evaluation.metrics import class_agreement

WEIGHTS, ABOUT = "extractor.safetensors", "extractor.json"
BATCH = 128
MIN_STEPS, MAX_STEPS, EPOCHS = 600, 4000, 20
PEAK_RATE = 3e-3
SEED = 0


@dataclass(frozen=True)
class Extractor:
    """uint8 images (N, C, H, W) -> features and classes."""

    model: Classifier
    device: torch.device
    fingerprint: str  # of the weights

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 64) float64 and predicted classes (N,), both on the CPU."""
        parts = [self.model(_scaled(block.to(self.device))) for block in images.split(1024)]
        features, logits = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        return features.double(), logits.argmax(dim=1)

    def features(self, images: Tensor) -> Tensor:
        return self(images)[0]

    def predict(self, images: Tensor) -> Tensor:
        return self(images)[1]


def train_extractor(url: str, vae: Path | None = None) -> dict[str, Any]:
    """Train the extractor of the data folder `url`, unless it is there already; the content of `extractor.json`.

    `vae` is the folder of the decoder of latents.
    """
    train, test = (open_pictures(url, split, vae) for split in ("train", "test"))
    recipe, about = _recipe(train), _read_about(url)
    if about is not None and about["recipe"] == recipe and exists(join_url(url, WEIGHTS)):
        return about
    if min(recipe["height"], recipe["width"]) < 8:
        raise UserError(f"images of {url} are smaller than 8x8; prepare it with a larger size")
    model = _fit(_build(recipe), *in_memory(train), steps=recipe["steps"])
    weights = save(model.state_dict())
    fingerprint = hashlib.sha256(weights).hexdigest()
    images, labels = in_memory(test)
    accuracy = class_agreement(Extractor(model, torch.device("cpu"), fingerprint).predict(images), labels)
    about = {
        "recipe": recipe,
        "weights_sha256": fingerprint,
        "held_out_accuracy": accuracy,
        "train_images": len(train),
        "test_images": len(test),
    }
    write_object(join_url(url, WEIGHTS), weights)
    write_object(join_url(url, ABOUT), json.dumps(about, indent=2).encode())
    return about


def load_extractor(url: str, device: torch.device | str = "cpu") -> Extractor:
    """The extractor in the data folder `url`. UserError where it is missing or damaged."""
    about, file = _read_about(url), join_url(url, WEIGHTS)
    if about is None or not exists(file):
        raise UserError(f"{url} has no {ABOUT} and {WEIGHTS} to score images with; run `sctrain prepare` on it again")
    with open_url(file) as stored:
        weights = stored.read()
    fingerprint = hashlib.sha256(weights).hexdigest()
    if fingerprint != about["weights_sha256"]:
        raise UserError(f"{file} is damaged; delete it and run `sctrain prepare` again")
    model = _build(about["recipe"])
    model.load_state_dict(load(weights))
    return Extractor(model.to(device).eval(), torch.device(device), fingerprint)


def _read_about(url: str) -> dict[str, Any] | None:
    file = join_url(url, ABOUT)
    if not exists(file):
        return None
    with open_url(file) as stored:
        text = stored.read()
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{file} is not JSON; delete it and run `sctrain prepare` again") from error


def _recipe(train: RealImages) -> dict[str, Any]:
    """All that decides the weights."""
    about = train.description
    return {
        "architecture": "models.classifier.Classifier",
        "channels": about.channels,
        "height": about.height,
        "width": about.width,
        "num_classes": len(about.classes),
        "features": FEATURES,
        "seed": SEED,
        "steps": min(max(MIN_STEPS, EPOCHS * len(train) // BATCH), MAX_STEPS),
        "split_fingerprint": about.splits["train"].fingerprint,
    }


def _build(recipe: dict[str, Any]) -> Classifier:
    return Classifier(recipe["channels"], recipe["height"], recipe["width"], recipe["num_classes"], recipe["seed"])


def _fit(model: Classifier, images: Tensor, labels: Tensor, steps: int) -> Classifier:
    """Cross entropy with small shifts, AdamW, one-cycle learning rate."""
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        _, logits = model(_scaled(shifted(images[chosen], generator)))
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to an eighth of its size, borders repeated: uint8 (B, C, H, W)."""
    B, _, H, W = images.shape
    rows, columns = (_moved(size, B, generator) for size in (H, W))
    return images[torch.arange(B)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _moved(size: int, batch: int, generator: torch.Generator) -> Tensor:
    """Indices (B, size) along one axis after a random shift."""
    reach = max(1, size // 8)
    shift = torch.randint(-reach, reach + 1, (batch, 1), generator=generator)
    return (torch.arange(size) + shift).clamp(0, size - 1)


def _scaled(images: Tensor) -> Tensor:
    """uint8 -> [-1, 1]."""
    return images.float() / 127.5 - 1
