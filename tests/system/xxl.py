"""EDM2-XXL trains on a machine of 2 cores and 24 GB: `make test-xxl`, whose log is in docs/xxl.md.

One sCT step on two ranks with the moments and the EMA on the disk, a checkpoint, all ranks killed; the same command
goes on with the next step. SCTRAIN_XXL overrides keys of the description, as YAML: with a smaller network it is a
rehearsal.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
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
    "objective": {"name": "sct", "times": {"mean": -0.8, "std": 1.6}},
    "batch": {"global_size": BATCH},
    "budget_images": 100 * BATCH,  # never reached
    "cadence": {"status": BATCH, "snapshot": 1_000_000, "checkpoint": BATCH, "keep_checkpoints": 1},
    "optimizer": {"learning_rate": 1e-4, "eps": 1e-11},
    "compute": {"checkpointing": True},
    "guard": {"check_tangents": False},  # ten evaluations more, and memory for every layer's output
    "ema": {"widths": [0.1]},
    "offload": {"optimizer": "disk", "ema": "disk", "checkpoint_copy": False},
    "runtime": {"ranks": 2, "threads": 1, "timeout_seconds": 3600.0},
    "deepspeed": {
        "zero_optimization": {
            "sub_group_size": 10_000_000,
            "reduce_bucket_size": 20_000_000,
            "stage3_max_live_parameters": 50_000_000,
            "stage3_max_reuse_distance": 50_000_000,
            "stage3_prefetch_bucket_size": 10_000_000,
        }
    },
}


class Run:
    """One start of `sctrain train`, watched."""

    def __init__(self, config: Path):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-m", "sctrain", "train", str(config)]
        self._process = subprocess.Popen(command, env=environment, cwd=config.parent, start_new_session=True)
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

    def until(self, finished: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not finished():
            assert self._process.poll() is None and time.monotonic() < deadline, "it ended, or hangs"
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


def measured(config: Path, finished: Callable[[], bool]) -> list[dict]:
    """The reports of a start that is killed when `finished`."""
    begin, run = time.monotonic(), Run(config)
    try:
        run.until(finished)
    finally:
        run.kill()
        ranks = sorted(run.peaks.values(), key=lambda peak: peak["VmHWM"])[-2:]
        told = " and ".join(f"{peak['VmHWM']:.2f} ({peak['RssAnon']:.2f} of no file)" for peak in ranks)
        print(f"\nafter {time.monotonic() - begin:.0f} s: peak resident GB per rank {told};", end=" ")
        print(f"least memory available on the machine {run.least_free:.1f} GB")
    found = reports(config)
    for report in found:
        print({key: report[key] for key in ("images", "loss/all", "optimizer/grad_norm") if key in report})
    return found


def reports(config: Path) -> list[dict]:
    """Of every step so far."""
    path = config.parent / "run" / "stats.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_xxl_trains_and_resumes(config):
    checkpoint = config.parent / "run" / "checkpoints" / f"{BATCH:012d}"
    first = measured(config, checkpoint.is_dir)
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    print(f"checkpoint {size / 1e9:.2f} GB")
    second = measured(config, lambda: len(reports(config)) == 2)
    assert [report["images"] for report in second] == [BATCH, 2 * BATCH]
    assert second[0] == first[0] and all(math.isfinite(report["loss/all"]) for report in second)
    assert all(report["optimizer/grad_norm"] > 0 and report["guard/skipped"] == 0 for report in second)
