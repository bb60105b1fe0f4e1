"""EDM2-XXL trains on a small machine: `make test-xxl`. An hour, 20 GB of memory, 50 GB of disk; docs/xxl.md has its log.

Three sCT steps on two ranks with what is not needed for the forward on the disk, a checkpoint after the second, all
ranks killed; the same command resumes, and repeats the third step's loss bit for bit. SCTRAIN_XXL overrides keys of the
description, as YAML: with a smaller network this is a rehearsal.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil
import pytest
import yaml

from data_pipeline.generated import write_latents
from sctrain.config.yaml_text import merged

BATCH = 2
PATIENCE = 7200  # seconds per start
DESCRIPTION = {
    "name": "xxl",
    "network": {"name": "edm2-scm-xxl"},
    "objective": {"name": "sct", "times": {"mean": -0.8, "std": 1.6}, "tangent_warmup_images": BATCH},
    "batch": {"global_size": BATCH},
    "budget_images": 100 * BATCH,  # never reached
    "cadence": {"status": BATCH, "snapshot": 1_000_000, "checkpoint": 2 * BATCH, "keep_checkpoints": 1},
    "optimizer": {"learning_rate": 1e-4, "eps": 1e-11},
    "compute": {"checkpointing": True},
    "ema": {"widths": [0.1]},
    "offload": {"optimizer": "disk", "ema": "disk", "checkpoint_copy": False},
    "runtime": {"ranks": 2, "threads": 1, "timeout_seconds": 3600.0},
    "deepspeed": {
        "zero_optimization": {
            "sub_group_size": 50_000_000,
            "reduce_bucket_size": 20_000_000,
            "stage3_max_live_parameters": 50_000_000,
            "stage3_max_reuse_distance": 50_000_000,
            "stage3_prefetch_bucket_size": 10_000_000,
        }
    },
}


class Run:
    """One start of `sctrain train`, watched."""

    def __init__(self, config: Path, folder: Path):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-m", "sctrain", "train", str(config)]
        self._process = subprocess.Popen(command, env=environment, cwd=config.parent, start_new_session=True)
        self._stats = folder / "stats.jsonl"
        self.peaks: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))  # of each process, GB
        self.least_free = float("inf")
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """Peaks of resident memory: all of it, and what no file backs and the system could not take back."""
        while self._process.poll() is None:
            for process in psutil.Process(self._process.pid).children(recursive=True):
                try:
                    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                except OSError:
                    continue
                sizes = {
                    line.split(":")[0]: int(line.split()[1]) * 1024 / 1e9 for line in lines if line.endswith(" kB")
                }
                peak = self.peaks[process.pid]
                for key in ("VmHWM", "RssAnon"):
                    peak[key] = max(peak[key], sizes.get(key, 0.0))
            self.least_free = min(self.least_free, psutil.virtual_memory().available / 1e9)
            time.sleep(0.2)

    def until(self, steps: int) -> list[dict]:
        """Reports of the first so many steps, once they are there."""
        deadline = time.monotonic() + PATIENCE
        while True:
            assert self._process.poll() is None and time.monotonic() < deadline, "it ended, or hangs"
            lines = self._stats.read_text().splitlines() if self._stats.exists() else []
            if len(lines) >= steps:
                return [json.loads(line) for line in lines[:steps]]
            time.sleep(0.2)

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("xxl")
    write_latents(str(folder / "data"), samples=64, shards=1)
    wanted = DESCRIPTION | {"run_dir": str(folder / "run"), "data": {"url": str(folder / "data"), "std": [1.0]}}
    path = folder / "xxl.yaml"
    path.write_text(yaml.safe_dump(merged(wanted, yaml.safe_load(os.environ.get("SCTRAIN_XXL", "{}")))))
    return path


def measured(config: Path, steps: int) -> tuple[list[dict], Run]:
    """The reports of a start that is killed after so many steps in all."""
    begin, run = time.monotonic(), Run(config, config.parent / "run")
    try:
        reports = run.until(steps)
    finally:
        run.kill()
    ranks = sorted(run.peaks.values(), key=lambda peak: peak["VmHWM"])[-2:]
    told = " and ".join(f"{peak['VmHWM']:.2f} ({peak['RssAnon']:.2f} of no file)" for peak in ranks)
    print(f"\nafter {time.monotonic() - begin:.0f} s: peak resident GB per rank {told};", end=" ")
    print(f"least memory available on the machine {run.least_free:.1f} GB")
    for report in reports:
        print(
            {key: report[key] for key in ("images", "loss/all", "optimizer/grad_norm", "wall_seconds") if key in report}
        )
    return reports, run


def test_xxl_trains_and_resumes(config):
    first, _ = measured(config, 3)
    checkpoints = [path.name for path in (config.parent / "run" / "checkpoints").iterdir() if path.name[0] != "."]
    assert checkpoints == [f"{2 * BATCH:012d}"]
    size = sum(file.stat().st_size for file in (config.parent / "run" / "checkpoints").rglob("*") if file.is_file())
    print(f"checkpoint {size / 1e9:.2f} GB")
    (config.parent / "run" / "stats.jsonl").unlink()
    second, _ = measured(config, 1)
    losses = [report["loss/all"] for report in first]
    assert all(loss is not None and abs(loss) < 1e6 for loss in losses)
    assert second[0]["images"] == 3 * BATCH and second[0]["loss/all"] == losses[2]
