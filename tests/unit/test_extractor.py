"""The extractor of the real digits: accuracy, features fit for a Frechet distance, and its files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from digits import prepared

from data_pipeline.dataset import open_dataset
from models.classifier import FEATURES, Classifier
from sctrain.errors import UserError
from sctrain.evaluation import extractor
from sctrain.evaluation.extractor import load_extractor, shifted, train_extractor
from sctrain.evaluation.reference import load_reference


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(prepared(), tmp_path / "digits")


def images(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    data = open_dataset(prepared(), split)
    return data.read(np.arange(len(data)))


def test_held_out_accuracy_is_high_and_recorded():
    pixels, labels = images("test")
    accuracy = (load_extractor(prepared()).predict(pixels) == labels).double().mean().item()
    about = json.loads((Path(prepared()) / "extractor.json").read_text())
    assert accuracy >= 0.98
    assert about["held_out_accuracy"] == pytest.approx(accuracy)
    assert (about["train_images"], about["test_images"]) == (1438, 359)


def test_features_are_float64_and_of_full_rank():
    features = load_extractor(prepared()).features(images("train")[0])
    assert features.shape == (1438, FEATURES) and features.dtype == torch.float64
    spectrum = torch.linalg.eigvalsh(features.T.cov())
    assert spectrum[0] > 1e-6 * spectrum[-1]
    assert (features < 0).any(dim=0).all(), "taken before the activation"


def test_training_again_keeps_what_matches_and_replaces_what_does_not(folder: Path, monkeypatch):
    weights = folder / "extractor.safetensors"
    before = weights.read_bytes()
    about = train_extractor(str(folder))
    assert weights.read_bytes() == before
    assert about["recipe"]["split_fingerprint"] == open_dataset(str(folder), "train").index.fingerprint
    monkeypatch.setattr(extractor, "MIN_STEPS", 3)
    monkeypatch.setattr(extractor, "EPOCHS", 0)
    again = train_extractor(str(folder))
    assert again["recipe"]["steps"] == 3 and weights.read_bytes() != before
    load_extractor(str(folder))


def test_missing_or_damaged_extractor_is_named(folder: Path):
    weights = folder / "extractor.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(
        UserError, match=r"extractor\.safetensors is damaged; delete it and run `sctrain prepare` again"
    ):
        load_extractor(str(folder))
    weights.unlink()
    with pytest.raises(UserError, match=r"has no extractor\.json and extractor\.safetensors"):
        load_extractor(str(folder))


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (3, 9, 14), (3, 64, 48)])
def test_classifier_takes_any_size_and_is_the_same_every_time(channels: int, height: int, width: int):
    x = torch.randn(2, channels, height, width)
    before = torch.get_rng_state()
    first, second = (Classifier(channels, height, width, num_classes=5)(x) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first[0].shape == (2, FEATURES) and first[1].shape == (2, 5)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_shift_moves_whole_images_and_repeats_the_border():
    ramp = torch.arange(8, dtype=torch.uint8).expand(64, 1, 8, 8)
    moved = shifted(ramp, torch.Generator().manual_seed(0))
    assert moved.shape == ramp.shape
    rows = {tuple(image[0, 3].tolist()) for image in moved}
    assert rows == {(0, 0, 1, 2, 3, 4, 5, 6), tuple(range(8)), (1, 2, 3, 4, 5, 6, 7, 7)}


def test_reference_figures_of_real_images_are_near_perfect_and_kept(tmp_path: Path):
    judge = load_extractor(prepared())
    reference = load_reference(prepared(), judge, 5000, tmp_path)
    figures = reference.figures
    assert 0 < figures["fd_resample"] < figures["fd_test"]
    assert figures["agreement_test"] >= 0.98 and figures["recall_test"] > 0.7 and figures["nn_test"] > 0
    kept = (tmp_path / "reference.safetensors").stat().st_mtime_ns
    again = load_reference(prepared(), judge, 5000, tmp_path)
    assert again.figures == figures and (tmp_path / "reference.safetensors").stat().st_mtime_ns == kept
    assert torch.equal(again.moments.scatter, reference.moments.scatter)
    assert torch.equal(again.manifold.radii, reference.manifold.radii)
    assert load_reference(prepared(), judge, 100, tmp_path).figures["fd_resample"] > figures["fd_resample"]


def test_score_tells_copies_from_new_images_and_from_noise(tmp_path: Path):
    judge = load_extractor(prepared())
    reference = load_reference(prepared(), judge, 359, tmp_path)
    copies, new = (reference.score(*images(split), judge) for split in ("train", "test"))
    assert copies["fd"] < 1e-6 and copies["nn_ratio"] < 1e-6 and copies["recall"] == 1
    assert new["fd"] == pytest.approx(reference.figures["fd_test"]) and new["nn_ratio"] == pytest.approx(1)
    noise = torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8)
    junk = reference.score(noise, torch.arange(200) % 10, judge)
    assert junk["fd"] > 10 * new["fd"] and junk["agreement"] < 0.3 and junk["recall"] < 0.3 and junk["nn_ratio"] > 2
