"""sctrain verify-published on files of the same structure, small, with an Inception of random weights."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from published import dumped
from published_unet import PublishedUNet
from test_import import SIGMAS, drawn, pickled
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from sctrain.cli import main
from sctrain.commands import verify_published
from sctrain.errors import UserError
from sctrain.evaluation import inception as inception_module
from sctrain.evaluation.catalog import Entry, entries, level_time
from sctrain.evaluation.inception import load_inception, read_statistics
from sctrain.evaluation.published import INCEPTION

ENTRY = Entry("edm-tiny.pkl", "https://example.org/", "tiny.npz", 8, 3, 2, "heun", 2, 1.5)


def statistics() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(2048), np.eye(2048)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    weights = drawn(PublishedUNet(song=True, labels=2), SIGMAS.log() / 4)
    pickled(folder / ENTRY.file, "EDMPrecond", weights, 4, "model.", sigma_data=0.5)
    (folder / "fid-refs").mkdir()
    mean, covariance = statistics()
    np.savez(folder / "fid-refs" / "tiny.npz", mu=mean, sigma=covariance)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "load", lambda *_, **__: {})
        patched.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        model = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path="none")
    torch.save(model.state_dict(), folder / INCEPTION)
    return folder


def test_what_is_missing_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verify-published", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(entries())) >= 20
    assert all("not run: missing " in line for line in lines)
    assert "missing edm2-img512-xxl-0939524-0.070.pkl, fid-refs/img512.pkl, weights-inception" in "\n".join(lines)
    assert "sd-vae-ft-mse" in "\n".join(lines)


def test_a_figure(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The distance is that of the images that the network draws, whatever the batch."""
    monkeypatch.setattr(verify_published, "entries", lambda: iter([ENTRY]))
    found = []
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)  # the least that it takes, for speed
    for batch in ("4", "3"):
        assert main(["verify-published", str(folder), "--samples", "4", "--batch", batch, "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        found.append(row)
    assert found[0]["evaluations"] == 3 and found[0]["published"] == 1.5
    assert found[0]["measured"] == pytest.approx(found[1]["measured"], rel=1e-4)
    assert found[0]["measured"] > 1000, "four images of noise are far from a standard Gaussian of 2048 features"
    assert main(["verify-published", str(folder), "--samples", "4", "--only", "nothing"]) == 2


def test_statistics_of_both_kinds_and_of_neither(folder: Path, tmp_path: Path):
    mean, covariance = statistics()
    (tmp_path / "stats.pkl").write_bytes(dumped({"fid": {"mu": mean + 1, "sigma": covariance}}))
    moments = read_statistics(tmp_path / "stats.pkl")
    assert torch.equal(moments.mean, torch.ones(2048).double())
    assert torch.equal(moments.covariance, torch.eye(2048).double())
    assert torch.equal(read_statistics(folder / "fid-refs" / "tiny.npz").covariance, moments.covariance)
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match=r"of another network"):
        read_statistics(tmp_path / "other.npz")
    np.savez(tmp_path / "none.npz", x=mean)
    with pytest.raises(UserError, match=r"holds no statistics"):
        read_statistics(tmp_path / "none.npz")
    (tmp_path / "evil.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"holds no statistics"):
        read_statistics(tmp_path / "evil.npz")


def test_inception_is_read_inertly(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = []
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda path, **rest: loaded.append(str(path)) or real(path, **rest))
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)
    extractor = load_inception(folder / INCEPTION, torch.device("cpu"))
    assert loaded and not any(str(folder) in path for path in loaded), "only our own copy is unpickled"
    features = extractor.features(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert features.shape == (2, inception_module.FEATURES) and features.dtype == torch.float64
    torch.save({"x": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"are not torch-fidelity's weights"):
        load_inception(tmp_path / "other.pth", torch.device("cpu"))


def test_levels_of_a_second_step():
    """Index 22 of 40 levels from 80 down, as `--ts 0,22,39` of the commands of CM 2023 says it."""
    grid = (80 ** (1 / 7) + np.arange(40) / 39 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert math.tan(level_time(22, 40)) * 0.5 == pytest.approx(grid[22])
    assert level_time(0, 40) == pytest.approx(math.atan(160))
