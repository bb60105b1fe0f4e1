"""`sctrain plan`: what is counted on fake tensors is what real ones take, and what is suggested fits."""

import json
from dataclasses import replace

import pytest
import torch
from digits import tiny_config

from sctrain import cli
from sctrain.bench.memory import Watch
from sctrain.errors import UserError
from sctrain.planning import counting
from sctrain.planning.choice import fitting, plan
from sctrain.planning.counting import count
from sctrain.planning.flops import Flops
from sctrain.planning.memory import Layout, memory
from sctrain.planning.speed import UNMEASURED, Hardware
from sctrain.planning.zero3 import Zero3Gathering, Zero3Sizes
from sctrain.smoke.data import described

NETWORK = {"name": "dit", "width": 32, "depth": 1, "heads": 2}
ALL = {  # five networks, of which two are trained
    "teacher": {"run": "runs/none", "ema": 0.05},
    "guide": {"run": "runs/guide", "ema": 0.05},
    "method": {"guidance": {}, "vsd": {}},
}
KEEP_NOTHING = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}


def layout_of(tmp_path, name="sct", world=2, **keys):
    config = tiny_config(tmp_path / "run", name, **{"network": NETWORK, "batch": {"global_size": 8}, **keys})
    return Layout(config, described(config), world, "cpu")


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("sct", {}),
        ("sct", {"compute": {"checkpointing": True}}),
        ("sct", {"compute": {"tangent_engine": "two_pass"}, "precision": "bf16"}),
        ("scd", {"teacher": {"run": "runs/none", "ema": 0.05}}),
        ("ctm", {"teacher": {"run": "runs/none", "ema": 0.05}}),
        (
            "ctm",
            {"teacher": {"run": "runs/none", "ema": 0.05}, "method": {"adversary": {"after": 0.0}}},
        ),
        ("scd", ALL),
    ],
)
def test_fake_tensors_take_what_real_ones_take(tmp_path, name, keys, monkeypatch):
    layout = layout_of(tmp_path, name, **keys)
    arguments = (layout.config, layout.about, 4, None)
    faked = count(*arguments)
    real = []

    class Nothing:
        """In place of the mode that makes tensors fake."""

        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def from_tensor(self, x):
            return x

    def watched(*arguments):
        with Watch() as watch:
            made = step(*arguments)
        real.append(watch.peak)
        return made

    step = counting._step
    monkeypatch.setattr(counting, "FakeTensorMode", Nothing)
    monkeypatch.setattr(counting, "_step", watched)
    count(*arguments)
    assert faked.peak > 2**14 and faked.flops > 1e6
    assert faked.peak == pytest.approx(real[-1], rel=0.01)


def test_operations_are_counted_as_pytorch_counts_them():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    with Flops() as flops:
        torch.nn.functional.linear(x, weight).sum().backward()
    assert flops.total == 3 * 2 * 4 * 8 * 16
    q, k, v = torch.randn(3, 1, 2, 32, 16, requires_grad=True)
    with Flops() as flops:
        torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    assert flops.total == (2 + 5) * 2 * 2 * 32 * 32 * 16  # the backward makes the weights once more


def linear_network():
    return torch.nn.Sequential(*(torch.nn.Linear(100, 100, bias=False) for _ in range(3)))


def stepped(zero: dict) -> tuple[int, int]:
    """Peak bytes of a forward of three layers under ZeRO-3 on two ranks, and elements gathered in a step."""
    network = linear_network()
    gathering = Zero3Gathering(network, Zero3Sizes.of(zero | {"stage3_param_persistence_threshold": 0}, 2))
    for _ in range(2):
        x = torch.ones(1, 100, requires_grad=True)
        with Watch() as watch:
            out = network(x).sum()
            peak = watch.peak
            out.backward()
        gathered = gathering.gathered
        gathering.end_of_step()
        assert all(parameter.numel() == 0 and parameter.grad is None for parameter in network.parameters())
    return peak, gathered


def test_parameters_are_gathered_as_deepspeed_gathers_them():
    """40 kB each. What is kept for reuse is gathered once, else twice; autograd keeps all three after a forward.

    Two that are gathered ahead together lie in one buffer until the second of them was waited for, beside their copies.
    """
    kept, once = stepped({})
    released, twice = stepped(KEEP_NOTHING)
    assert (once, twice) == (3 * 100 * 100, 6 * 100 * 100)
    assert 3 * 40_000 < released < 3.1 * 40_000 and 5 * 40_000 < kept < 5.1 * 40_000


def test_items_add_up_and_shrink_with_ranks(tmp_path):
    zero = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    two, eight = (memory(layout_of(tmp_path, world=world, deepspeed=zero)) for world in (2, 8))
    parameters = layout_of(tmp_path).parameters
    assert two.held["moments"] == pytest.approx(4 * parameters, rel=0.01)
    assert two.held["moments"] == pytest.approx(4 * eight.held["moments"], rel=0.05)
    assert two.held["reduce bucket"] == 4 * 500_000_000 and two.held["masters"] == 0
    assert two.micro_batch.keys() == {"activations", "tangent workspace", "gather buffers"}
    assert all(size > 0 for size in two.micro_batch.values())
    assert two.peak == sum(two.held.values()) + max(sum(two.micro_batch.values()), two.optimizer)


def test_every_network_of_a_run_is_counted(tmp_path):
    keys = {"precision": "bf16", "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
    one, all_ = layout_of(tmp_path, "sct", **keys), layout_of(tmp_path, "scd", **keys, **ALL)
    assert list(all_.numels) == ["student", "teacher", "guide", "fake score"]
    alone, together = (memory(layout, itemised=False) for layout in (one, all_))
    assert together.held["teacher"] == together.held["guide"] > 0
    for item in ("parameters", "masters", "moments", "gradients"):
        assert together.held[f"fake score's {item}"] > together.held[item] >= alone.held[item] > 0
    more = together.elsewhere["checkpoint staging (host)"] / alone.elsewhere["checkpoint staging (host)"]
    assert 1.5 < more < 1.8, "three copies more beside five"
    gone = memory(layout_of(tmp_path, "scd", **keys, **ALL, offload={"optimizer": "cpu"}), itemised=False)
    assert gone.elsewhere["fake score's moments (host)"] == together.held["fake score's moments"]
    assert all_.trained_parameters == sum(all_.numels["student"]) + sum(all_.numels["fake score"])


def test_what_is_offloaded_is_elsewhere(tmp_path):
    here = memory(layout_of(tmp_path, precision="bf16"), itemised=False)
    gone = memory(layout_of(tmp_path, precision="bf16", offload={"optimizer": "cpu", "ema": "disk"}), itemised=False)
    assert not {"moments", "masters", "EMA tracks", "gradients"} & gone.held.keys()
    assert gone.elsewhere["moments (host)"] == here.held["moments"]
    assert gone.elsewhere["EMA tracks (disk)"] == here.held["EMA tracks"]


def test_the_suggestion_fits_and_more_memory_is_left_alone(tmp_path):
    zero = {"zero_optimization": {"reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 1000}}
    layout = layout_of(tmp_path, batch={"global_size": 64}, deepspeed=zero)
    hardware = Hardware.assumed(layout.config, 1)
    whole = plan(layout, hardware)
    room = 0.6 * whole.memory.peak
    found = fitting(layout, hardware, room)
    assert found is not None and found.fits(room) and not whole.fits(room)
    assert found.layout.micro < layout.micro and f"batch.micro_limit={found.layout.micro}" in found.changes
    assert fitting(layout, hardware, 1000) is None
    assert whole.speed.source == UNMEASURED
    assert whole.speed.images_per_second == pytest.approx(64 / whole.speed.seconds)


def test_a_bench_file_replaces_the_model(tmp_path):
    layout = layout_of(tmp_path)
    file = tmp_path / "bench.json"
    rates = {"device": "a machine", "precision": "fp32", "flops_per_second": 1e9, "bytes_per_second": 1e12}
    file.write_text(json.dumps(rates))
    hardware = Hardware.read(file, layout.config)
    found = plan(layout, hardware)
    assert found.speed.seconds == pytest.approx(found.counted.flops / 1e9) and "a machine" in found.speed.source
    for bad in ("{}", "[", json.dumps(rates | {"precision": "bf16"}), json.dumps(rates | {"flops_per_second": 0})):
        file.write_text(bad)
        with pytest.raises(UserError, match=r"bench\.json"):
            Hardware.read(file, layout.config)


def test_communication_counts_gathers_and_the_reduction(tmp_path):
    layout = layout_of(tmp_path)
    parameters = layout.parameters
    found = plan(layout, Hardware(1e9, 1e9, ""))
    assert found.speed.sent == round(0.5 * 4 * (found.counted.gathered + parameters))
    copied = replace(layout, config=layout_of(tmp_path, deepspeed={"zero_optimization": {"stage": 0}}).config)
    assert plan(copied, Hardware(1e9, 1e9, "")).speed.sent == 4 * parameters


def test_the_command(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(layout_of(tmp_path).config.model_dump(mode="json")))
    assert cli.main(["plan", str(config), "--gpus", "2", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["plans"]
    assert found["fits"] and found["speed_source"] == UNMEASURED and found["micro_batch"] == 4
    assert cli.main(["plan", str(config), "--gpus", "2", "--gpu-memory", "1MB"]) == 2
    said = capsys.readouterr()
    assert "DOES NOT FIT" in said.out and "does not fit on 2 GPUs of 1.0 MB" in said.err
    assert cli.main(["plan", str(config), "--gpus", "3"]) == 2
    assert "does not divide among 3 ranks" in capsys.readouterr().err
