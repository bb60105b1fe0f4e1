"""The files of a checkpoint, without DeepSpeed: ranks are Checkpointers side by side in one process."""

import itertools
import json
import math
import resource

import pytest
import torch

from sctrain.errors import UserError
from sctrain.runs import numbered
from sctrain.zero.checkpoint import Checkpointer, latest, load, read_record
from sctrain.zero.pieces import Piece, interval

WHOLE = {
    "master/a.weight": torch.arange(15.0).view(3, 5),
    "master/a.bias": torch.tensor([7.0]),
    "ema-0.05/a.weight": -torch.arange(15.0).view(3, 5),
}


def pieces(rank, world, whole=None):
    cut = {key: (tensor, *interval(tensor.numel(), rank, world)) for key, tensor in (whole or WHOLE).items()}
    return {key: Piece(t.flatten()[start:stop], tuple(t.shape), start) for key, (t, start, stop) in cut.items()}


def checkpointers(folder, world=2, keep=2, **options):
    return [Checkpointer(folder, keep, rank, world, **options) for rank in range(world)]


def save(ranks, images, record=None, whole=None):
    for checkpointer in ranks:
        checkpointer.save(images, pieces(checkpointer.rank, checkpointer.world, whole), record or {})


def finish(ranks):
    for checkpointer in reversed(ranks):
        checkpointer.wait()


def newest(folder):
    path = latest(folder)
    assert path is not None
    return path


def assert_holds(path, whole, world):
    for rank in range(world):
        wanted = pieces(rank, world, whole)
        read = dict(load(path, wanted))
        assert read.keys() == {key for key, piece in wanted.items() if piece.local.numel()}
        assert all(torch.equal(values, wanted[key].local) for key, values in read.items())


@pytest.mark.parametrize(("numel", "world"), [(15, 2), (1, 3), (5, 4), (12, 3)])
def test_intervals_cover_the_tensor_as_zero3_cuts_it(numel, world):
    cuts = [interval(numel, rank, world) for rank in range(world)]
    assert cuts[0][0] == 0 and cuts[-1][1] == numel
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(cuts))
    assert cuts[0][1] == math.ceil(numel / world)


@pytest.mark.parametrize("saved_on", [1, 2, 3])
@pytest.mark.parametrize("loaded_on", [1, 2, 3, 5])
def test_round_trip_on_any_number_of_ranks(tmp_path, saved_on, loaded_on):
    ranks = checkpointers(tmp_path / "run" / "checkpoints", saved_on)
    save(ranks, 32768, {"seed": 3, "config": {"name": "digits"}})
    finish(ranks)
    path = newest(tmp_path / "run" / "checkpoints")
    assert path.name == "000000032768"
    assert read_record(path) == {"seed": 3, "config": {"name": "digits"}}
    assert_holds(path, WHOLE, loaded_on)
    shards = {f"rank-{rank:05d}.safetensors" for rank in range(saved_on)}
    assert {file.name for file in path.iterdir()} == {"manifest.json", *shards}


def test_pieces_may_change_as_soon_as_save_returns(tmp_path):
    whole = {key: tensor.clone() for key, tensor in WHOLE.items()}
    ranks = checkpointers(tmp_path)
    save(ranks, 100, whole=whole)
    for tensor in whole.values():
        tensor.zero_()
    finish(ranks)
    assert_holds(newest(tmp_path), WHOLE, 2)


def test_keeps_the_newest_and_replaces_nothing(tmp_path):
    ranks = checkpointers(tmp_path, keep=2)
    for images in (100, 200, 300):
        save(ranks, images, {"images": images})
    save(ranks, 300, {"images": "again"})
    finish(ranks)
    assert [images for images, _ in numbered(tmp_path)] == [200, 300]
    resumed = checkpointers(tmp_path, keep=1)
    save(resumed, 300, {"images": "again"})
    finish(resumed)
    assert read_record(newest(tmp_path)) == {"images": 300}
    save(resumed, 400)
    finish(resumed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000400"]


def test_start_removes_what_an_interrupted_run_left(tmp_path):
    (tmp_path / ".000000000100.partial").mkdir()
    (tmp_path / ".000000000100.partial" / "rank-00000.safetensors").write_bytes(b"half")
    checkpointers(tmp_path)
    assert latest(tmp_path) is None and not list(tmp_path.iterdir())


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit_manifest(path):
    path.write_text(path.read_text().replace('"images": 200', '"images": 201'))


@pytest.mark.parametrize(
    ("name", "damage", "complaint"),
    [
        ("rank-00001.safetensors", flip_a_bit, "is corrupt"),
        ("rank-00001.safetensors", lambda path: path.unlink(), "cannot be read"),
        ("rank-00000.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-4]), "is corrupt"),
        ("manifest.json", edit_manifest, "is corrupt"),
        ("manifest.json", lambda path: path.write_text("{"), "cannot be read"),
        ("manifest.json", lambda path: path.unlink(), "cannot be read"),
    ],
)
def test_damage_is_named_with_its_mend(tmp_path, name, damage, complaint):
    ranks = checkpointers(tmp_path)
    save(ranks, 100)
    save(ranks, 200)
    finish(ranks)
    path = newest(tmp_path)
    damage(path / name)
    with pytest.raises(UserError) as caught:
        load(path, pieces(0, 1))
    assert all(part in str(caught.value) for part in (f"{path / name}", complaint, f"delete the folder {path}"))
    assert "fall back on 000000000100" in str(caught.value)
    assert_holds(tmp_path / "000000000100", WHOLE, 1)


def test_damage_of_the_only_checkpoint_offers_no_older_one(tmp_path):
    ranks = checkpointers(tmp_path)
    save(ranks, 100)
    finish(ranks)
    flip_a_bit(newest(tmp_path) / "rank-00000.safetensors")
    with pytest.raises(UserError, match="start anew"):
        load(newest(tmp_path), pieces(0, 2))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda whole: whole | {"master/a.bias": torch.zeros(2)}, "its master/a.bias has shape"),
        (lambda whole: whole | {"ema-0.07/a.weight": torch.zeros(3, 5)}, "ema-0.07/a.weight is only in the run"),
        (lambda whole: {"master/a.bias": torch.zeros(1)}, "master/a.weight is only in the checkpoint"),
    ],
)
def test_checkpoint_of_another_network(tmp_path, change, complaint):
    ranks = checkpointers(tmp_path)
    save(ranks, 100)
    finish(ranks)
    with pytest.raises(UserError, match=complaint):
        load(newest(tmp_path), pieces(0, 1, change(WHOLE)))


def test_unwritable_folder(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="checkpoints cannot be written"):
        Checkpointer(tmp_path / "checkpoints", 2, 0, 1)


@pytest.fixture
def small_file_limit():
    """The system refuses to let any file grow beyond 1 MB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_the_file(tmp_path, small_file_limit):
    ranks = checkpointers(tmp_path)
    save(ranks, 100)
    save(ranks, 200, whole={"master/large": torch.zeros(2**20)})
    for checkpointer in ranks:
        with pytest.raises(UserError, match=r"000000000200 could not be saved .* make room"):
            checkpointer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000100"]
    assert_holds(newest(tmp_path), WHOLE, 2)
    save(ranks, 300)
    finish(ranks)
    assert newest(tmp_path).name == "000000000300"


def test_failure_of_another_rank_is_told_at_once(tmp_path, monkeypatch):
    ranks = checkpointers(tmp_path)
    save(ranks, 100)
    finish(ranks)

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(ranks[1], "_write_shard", fail)
    ranks[0].save(200, pieces(0, 2), {})
    while not (tmp_path / ".000000000200.partial").exists():
        pass
    ranks[1].save(200, pieces(1, 2), {})
    with pytest.raises(UserError, match="No space left"):
        ranks[1].save(300, pieces(1, 2), {})
    with pytest.raises(UserError, match="rank 1 could not write its part"):
        ranks[0].save(300, pieces(0, 2), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000100"]


def test_folder_lost_during_the_run(tmp_path):
    (checkpointer,) = checkpointers(tmp_path / "checkpoints", world=1)
    (tmp_path / "checkpoints").rmdir()
    save([checkpointer], 100)
    with pytest.raises(UserError, match="000000000100 could not be saved"):
        checkpointer.wait()
    checkpointer.wait()  # told once


def test_manifest_states_shapes_and_cuts(tmp_path):
    ranks = checkpointers(tmp_path, world=3)
    save(ranks, 100)
    finish(ranks)
    manifest = json.loads((newest(tmp_path) / "manifest.json").read_text())["content"]
    assert manifest["world"] == 3 and manifest["images"] == 100
    assert manifest["tensors"]["master/a.weight"] == {"shape": [3, 5], "cuts": [0, 5, 10, 15]}
    assert manifest["tensors"]["master/a.bias"] == {"shape": [1], "cuts": [0, 1, 1, 1]}
