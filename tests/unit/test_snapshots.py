"""Published EMA weights: what readers get, reconstruction of other widths, damage."""

import pytest
import torch

from sctrain import snapshots
from sctrain.errors import UserError
from sctrain.power_ema import decay, gamma_from_width
from sctrain.snapshots import newest, open_weights, read_config, snapshot_config

WIDTHS = (0.05, 0.1)
CONFIG = {"name": "digits", "sigma_data": 0.5, "network": {"depth": 2}}


def publish(folder, images, tracks, config, w=2):
    shapes = {"weight": (3, 5), "bias": (1,)} if w is None else {"w": (w,)}
    return snapshots.publish(folder, images, tracks, config, shapes)


def network(step):
    """Weights that drift and wander, as a function of the step."""
    generator = torch.Generator().manual_seed(step)
    noise = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    return {
        "weight": torch.full((3, 5), step / 400.0, dtype=torch.float64) + 0.1 * noise,
        "bias": torch.ones(1).double(),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """400 steps of 10 images, published every 40 steps; and the true average of width 0.07 at each snapshot."""
    folder = tmp_path_factory.mktemp("run") / "snapshots"
    tracks, truth = {width: network(0) for width in (*WIDTHS, 0.07)}, {}
    for step in range(400):
        for width, track in tracks.items():
            keep = decay(10 * step, 10 * (step + 1), gamma_from_width(width))
            tracks[width] = {name: value + keep * (track[name] - value) for name, value in network(step).items()}
        if (step + 1) % 40 == 0:
            truth[10 * (step + 1)] = dict(tracks)
            published = {width: ((name, t.float()) for name, t in tracks[width].items()) for width in WIDTHS}
            publish(folder, 10 * (step + 1), published, CONFIG, w=None)
    return folder, truth


@pytest.mark.parametrize("images", [400, 4000, None])
@pytest.mark.parametrize("width", WIDTHS)
def test_stored_tracks_come_back_exactly(run, images, width):
    folder, truth = run
    weights = dict(open_weights(folder, images, width))
    assert weights.keys() == {"weight", "bias"}
    assert all(torch.equal(weights[name], t.float()) for name, t in truth[images or 4000][width].items())


@pytest.mark.parametrize("images", [2000, None])
def test_another_width_is_reconstructed(run, images):
    folder, truth = run
    weights, expected = dict(open_weights(folder, images, 0.07)), truth[images or 4000]
    between = (expected[0.05]["weight"] - expected[0.1]["weight"]).abs().mean()
    error = (weights["weight"] - expected[0.07]["weight"]).abs().mean()
    assert weights["weight"].dtype == torch.float32
    assert error < 0.05 * between
    torch.testing.assert_close(weights["bias"], torch.ones(1))


@pytest.mark.parametrize("width", [0.05, 0.07])
def test_pieces_are_those_of_the_whole(run, width):
    folder, _ = run
    weights, whole = open_weights(folder, None, width), dict(open_weights(folder, None, width))
    for name, tensor in whole.items():
        flat = tensor.flatten()
        for start in range(len(flat) + 1):
            for stop in range(start, len(flat) + 1):
                assert torch.equal(weights.read(name, start, stop), flat[start:stop])


def test_newest_and_its_description(run):
    folder, _ = run
    path = newest(folder)
    assert path is not None and path.name == "000000004000"
    assert read_config(path) == CONFIG
    assert newest(folder / "absent") is None


def test_a_description_of_another_version_is_named(run):
    folder, _ = run
    with pytest.raises(UserError, match=r"000000004000 was published by another version .* differs at '.+': use that"):
        snapshot_config(folder.parent, 4000)


def test_republishing_consumes_the_tracks_and_changes_nothing(tmp_path):
    publish(tmp_path, 10, {0.05: [("w", torch.zeros(2))]}, CONFIG)
    gathered = iter([("w", torch.ones(2))])
    assert publish(tmp_path, 10, {0.05: gathered}, {}) == tmp_path / "000000000010"
    assert next(gathered, None) is None
    assert torch.equal(dict(open_weights(tmp_path, 10, 0.05))["w"], torch.zeros(2))
    assert [path.name for path in tmp_path.iterdir()] == ["000000000010"]


def test_an_interrupted_publication_is_replaced(tmp_path):
    (tmp_path / ".000000000010.partial").mkdir()
    (tmp_path / ".000000000010.partial" / "ema-0.1.safetensors").write_bytes(b"half")
    assert newest(tmp_path) is None
    path = publish(tmp_path, 10, {0.05: [("w", torch.zeros(2))]}, CONFIG)
    assert {file.name for file in path.iterdir()} == {"ema-0.05.safetensors", "manifest.json"}


@pytest.mark.parametrize("width", [0.05, 0.03])
def test_damage_is_named_with_its_mend(tmp_path, width):
    for images in (10, 20):
        publish(tmp_path, images, {w: [("w", torch.randn(2))] for w in WIDTHS}, CONFIG)
    file = tmp_path / "000000000020" / "ema-0.05.safetensors"
    assert dict(open_weights(tmp_path, None, width)), "sound so far, which is remembered of this very file alone"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        dict(open_weights(tmp_path, None, width))
    assert f"{file} is corrupt" in str(caught.value) and f"delete the folder {file.parent}" in str(caught.value)
    file.unlink()
    with pytest.raises(UserError, match=r"ema-0.05.safetensors cannot be read"):
        dict(open_weights(tmp_path, None, width))
    assert dict(open_weights(tmp_path, 10, width)).keys() == {"w"}


def test_absent_snapshots(tmp_path):
    with pytest.raises(UserError, match="holds no snapshot"):
        dict(open_weights(tmp_path / "snapshots", None, 0.05))
    publish(tmp_path, 10, {0.05: [("w", torch.zeros(2))]}, CONFIG)
    with pytest.raises(UserError, match=r"no snapshot at 20 images: choose one of \[10\]"):
        dict(open_weights(tmp_path, 20, 0.05))


def test_snapshots_of_different_networks_are_not_mixed(tmp_path):
    publish(tmp_path, 10, {0.05: [("w", torch.zeros(2))]}, CONFIG)
    publish(tmp_path, 20, {0.05: [("w", torch.zeros(3))]}, CONFIG, w=3)
    with pytest.raises(UserError, match="different networks"):
        dict(open_weights(tmp_path, None, 0.07))


def test_unwritable_folder(tmp_path):
    """The tracks are consumed all the same: other ranks are gathering them."""
    (tmp_path / "snapshots").write_text("a file where the folder should be")
    gathered = iter([("w", torch.ones(2))])
    with pytest.raises(UserError, match="could not be written"):
        publish(tmp_path / "snapshots", 10, {0.05: gathered}, CONFIG)
    assert next(gathered, None) is None
