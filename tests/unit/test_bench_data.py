"""`sctrain bench data` on a tiny set: what it says, and that it can be true."""

import json
from pathlib import Path

import pytest

from sctrain import cli

TINY = ["--batch", "8", "--workers", "1", "--rounds", "1", "--rate", "50", "--seconds", "0.5"]


@pytest.mark.full
def test_its_figures_are_there_and_can_be_true(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    url = str(tmp_path / "latents")
    assert cli.main(["bench", "data", url, "--generate", "4MiB", *TINY, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    found = said[0] if isinstance(said, list) else said
    assert {"ratio_webdataset", "ratio_raw", "wait_share", "first_batch_s", "index_mb"} <= found.keys()
    assert set(found["rates"]) == {"ours", "webdataset", "raw"}
    assert all(len(rates) == 1 and rates[0] > 0 for rates in found["rates"].values())
    for other in ("webdataset", "raw"):
        ratio = found["rates"]["ours"][0] / found["rates"][other][0]
        assert found[f"ratio_{other}"] == pytest.approx(ratio)
    assert 0 <= found["wait_share"] <= 1 and 0 < found["first_batch_s"] < 60 and 0 <= found["index_mb"] < 300
    assert found["samples"] == 4 * 2**20 // 34_304
    shards = sorted((tmp_path / "latents").glob("*.tar"))
    assert len(shards) == 8 and sum(shard.stat().st_size for shard in shards) > found["payload_bytes"] > 3.9 * 2**20


def test_there_must_be_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", "data", str(tmp_path / "none"), *TINY]) == 2
    assert "none/dataset.json does not exist" in capsys.readouterr().err
