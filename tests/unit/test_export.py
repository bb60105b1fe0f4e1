"""Exported models: weights in bounded memory, complete or absent, and the same images out of every format."""

import json
import weakref

import pytest
import torch
from diffusers import DiffusionPipeline
from digits import publish_random, tiny_config
from safetensors.torch import load_file

from sctrain import cli, snapshots
from sctrain.bench.memory import footprint
from sctrain.evaluation.generation import Generator
from sctrain.evaluation.method import Method
from sctrain.evaluation.source import Source
from sctrain.exports import read_export
from sctrain.runs import RunFolder
from sctrain.snapshots import open_weights, publish
from sctrain.tensor_file import write_tensors

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """An sCT run with snapshots at 16 and 32 images."""
    config = tiny_config(tmp_path_factory.mktemp("runs") / "student", "sct")
    publish_random(config, 16, 32)
    return config


@pytest.fixture(scope="module")
def plain(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "plain"
    assert cli.main(["export", str(student.run_dir), "--to", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def pipeline_folder(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "pipeline"
    command = ["export", str(student.run_dir), "--format", "diffusers", "--ema", "0.07", "--to", str(folder)]
    assert cli.main(command) == 0
    return folder


def load(folder):
    return DiffusionPipeline.from_pretrained(str(folder), custom_pipeline=str(folder), trust_remote_code=True)


def drawn(place, steps=1, count=12, ema=None, seed=3):
    generator = Generator.from_source(Source.of(place, ema), CPU)
    return generator.draw(Method("consistency", steps), seed, count).x


def test_the_writer_writes_what_safetensors_reads(tmp_path):
    tensors = {
        "b": torch.randn(3, 5),
        "a.weight": torch.randn(7),
        "scalar": torch.tensor(2.0),
        "none": torch.ones(0, 2),
    }
    write_tensors(tmp_path / "x.safetensors", {name: t.shape for name, t in tensors.items()}, tensors.items())
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], t) for name, t in tensors.items())


@pytest.mark.parametrize("width", [0.05, 0.07])
def test_the_largest_tensor_is_all_that_export_holds(tmp_path, monkeypatch, width):
    """20 tensors of 1 MiB: never much more than one of them lives."""
    monkeypatch.setattr(snapshots, "_AT_ONCE", 2**14)
    for images in (100, 200):
        tracks = {w: [(str(i), torch.randn(64, 4096)) for i in range(20)] for w in (0.05, 0.1)}
        publish(tmp_path, images, tracks, {}, {str(i): (64, 4096) for i in range(20)})
    weights = open_weights(tmp_path, None, width)
    peak = footprint(lambda: write_tensors(tmp_path / "out.safetensors", weights.shapes, weights)).peak_bytes
    # The tensor, the same in a mapped file, and some rows in float64: of a network of 20 MiB.
    assert 2**20 <= peak <= 2 * 2**20 + 32 * snapshots._AT_ONCE
    assert len(weights._terms) == (1 if width == 0.05 else 4)
    exact = dict(open_weights(tmp_path, None, width))
    read = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in exact.items())


def test_tensors_are_let_go_one_by_one(tmp_path):
    shapes = {str(i): (8,) for i in range(5)}
    publish(tmp_path, 10, {0.05: [(name, torch.randn(8)) for name in shapes]}, {}, shapes)
    alive = []
    for _, tensor in open_weights(tmp_path, None, 0.05):
        alive.append(weakref.ref(tensor))
        del tensor
        assert sum(ref() is not None for ref in alive) <= 1


def test_an_export_draws_what_the_run_draws(student, plain):
    assert torch.equal(drawn(plain, 2), drawn(student.run_dir, 2))
    assert sorted(path.name for path in plain.iterdir()) == ["README.md", "manifest.json", "model.safetensors"]
    assert read_export(plain).images == 32


def test_an_older_snapshot(student, tmp_path):
    assert cli.main(["export", str(student.run_dir), "--images", "16", "--to", str(tmp_path / "old")]) == 0
    expected = Generator.from_source(Source.of(student.run_dir, None, 16), CPU).draw(Method("consistency", 1), 3, 12).x
    assert torch.equal(drawn(tmp_path / "old"), expected)


def test_sample_reads_an_export(plain, tmp_path, capsys):
    out = tmp_path / "grid.png"
    assert cli.main(["sample", str(plain), "--count", "4", "--out", str(out)]) == 0 and out.is_file()
    assert cli.main(["sample", str(plain), "--ema", "0.1", "--out", str(out)]) == 2
    assert "holds the EMA of width 0.05 alone" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_pipeline_draws_what_sample_draws(student, pipeline_folder, steps):
    pipe, expected = load(pipeline_folder), drawn(student.run_dir, steps, ema=0.07)
    x = pipe(num_images=12, num_inference_steps=steps, seed=3, output_type="latent").images
    assert expected.std() > 0.05
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn(pipeline_folder, steps), expected, rtol=0, atol=0)  # sctrain reads it too


def test_the_pipeline_as_its_users_call_it(pipeline_folder):
    pipe = load(pipeline_folder)
    state = torch.get_rng_state()
    image = pipe(class_labels=7, num_images=2, num_inference_steps=2).images[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert image.size == (8, 8) and pipe.scheduler.config.sigma_data == 0.5
    assert pipe(class_labels=[1, 2, 3], output_type="np").images.shape == (3, 8, 8, 1)
    with pytest.raises(ValueError, match="num_inference_steps 9"):
        pipe(num_inference_steps=9)
    with pytest.raises(ValueError, match="not told of guidance"):
        pipe(guidance_scale=2.0)


def test_a_guided_student_in_the_pipeline(tmp_path):
    keys = {"objective": {"name": "lcm", "guidance": {"low": 1.0, "high": 3.0}}}
    config = tiny_config(tmp_path / "lcm", "lcm").model_copy(update={})
    config = type(config).model_validate(config.model_dump() | keys)
    publish_random(config, 16)
    assert cli.main(["export", str(config.run_dir), "--format", "diffusers", "--to", str(tmp_path / "pipe")]) == 0
    pipe = load(tmp_path / "pipe")
    for scale in (1.0, 2.5):
        generator = Generator.from_source(Source.of(config.run_dir), CPU, scale)
        expected = generator.draw(Method("consistency", 2), 0, 6).x
        x = pipe(num_images=6, num_inference_steps=2, guidance_scale=scale, output_type="latent").images
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)


def test_a_student_that_says_the_noise_in_the_pipeline(tmp_path):
    keys = {"noise_input": "ddpm", "network_output": "noise", "sigma_data": 1.0}
    config = tiny_config(tmp_path / "ict", "ict", **keys)
    publish_random(config, 16)
    assert cli.main(["export", str(config.run_dir), "--format", "diffusers", "--to", str(tmp_path / "pipe")]) == 0
    x = load(tmp_path / "pipe")(num_images=6, num_inference_steps=2, seed=3, output_type="latent").images
    torch.testing.assert_close(x, drawn(config.run_dir, 2, 6), rtol=0, atol=1e-5)


def test_nothing_is_overwritten_and_nothing_left_half_done(student, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    assert cli.main(["export", str(student.run_dir), "--to", str(tmp_path / "mine")]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sctrain.exporting.writing.write_tensors", full)
    assert cli.main(["export", str(student.run_dir), "--to", str(tmp_path / "new")]) == 2
    assert "make room" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_damage_is_named(plain, tmp_path, capsys):
    file = plain / "model.safetensors"
    content = bytearray(file.read_bytes())
    try:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert cli.main(["sample", str(plain), "--out", str(tmp_path / "x.png")]) == 2
        assert "model.safetensors is corrupt" in capsys.readouterr().err
    finally:
        file.write_bytes(content)


def test_what_scm_cannot_step_is_refused(tmp_path, capsys):
    config = tiny_config(tmp_path / "teacher", "trigflow")
    publish_random(config, 16)
    command = ["export", str(config.run_dir), "--to", str(tmp_path / "pipe"), "--format"]
    assert cli.main([*command, "diffusers"]) == 2
    assert "use --format safetensors" in capsys.readouterr().err and not (tmp_path / "pipe").exists()
    assert cli.main([*command, "safetensors"]) == 0


def test_the_card_says_what_is_known(student, tmp_path, plain):
    card = (plain / "README.md").read_text()
    assert "have not been scored" in card and "name: sct" in card and "CC BY 4.0" in card
    assert "None is recorded for the weights" in card and "commit" in card
    run = RunFolder(student.run_dir)
    line = {"images": 32, "ema": 0.05, "seed": 0, "sampler": "consistency", "steps": 2, "nfe": 2, "fd": 3.25}
    other = line | {"images": 16, "fd": 9.75}
    manifest = run.snapshots / "000000000032" / "manifest.json"
    before = manifest.read_text()
    try:
        run.metrics.write_text("".join(json.dumps(each) + "\n" for each in (line, line | {"fd": 3.75}, other)))
        assert cli.main(["export", str(student.run_dir), "--to", str(tmp_path / "scored")]) == 0
    finally:
        run.metrics.unlink()
        manifest.write_text(before)
    card = (tmp_path / "scored" / "README.md").read_text()
    assert "| consistency, 2 | 2 | 3.5 |" in card and "9.75" not in card
