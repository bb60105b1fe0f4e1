"""Real commands on the digits, with a network small enough for seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_pipeline.digits import prepare_digits

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))  # the prepared digits in digits.py

BASE = {
    "name": "test",
    "data": {"mean": [0.3], "std": [0.37]},
    "network": {"name": "dit", "width": 32, "depth": 2, "heads": 2, "patch_size": 2},
    "objective": {"name": "sct"},
    "batch": {"global_size": 48, "micro_limit": 12},
    "budget_images": 48 * 20,
    "cadence": {"status": 48, "snapshot": 48 * 20, "checkpoint": 48 * 5},
    "optimizer": {"learning_rate": 1e-3},
}


class Sctrain:
    """Writes run descriptions and runs the command line as a user would."""

    def __init__(self, folder: Path, data: Path):
        self.folder, self.data = folder, data

    def config(self, run: str = "run", **changes) -> Path:
        """A description file in this test's folder; changes replace top-level keys."""
        description = {**BASE, "run_dir": str(self.folder / run), **changes}
        description["data"] = {"url": str(self.data), **description["data"]}
        path = self.folder / f"{run}.yaml"
        path.write_text(yaml.safe_dump(description))
        return path

    def start(
        self, *arguments: object, launcher: tuple[str, ...] = (sys.executable, "-m", "sctrain")
    ) -> subprocess.Popen:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        environment.pop("OMP_NUM_THREADS", None)
        command = [*launcher, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, cwd=self.folder, text=True, **pipes)

    def __call__(self, *arguments: object, code: int = 0, **options) -> subprocess.CompletedProcess:
        """Run to the end and check the exit code."""
        process = self.start(*arguments, **options)
        try:
            out, err = process.communicate(timeout=150)
        finally:
            process.kill()
        assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(arguments, code, out, err)

    def losses(self, run: str = "run") -> dict[int, float]:
        """Mean loss of each step by images seen."""
        lines = (self.folder / run / "stats.jsonl").read_text().splitlines()
        return {line["images"]: line["loss/all"] for line in map(json.loads, lines)}


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(folder)
    return folder


@pytest.fixture(scope="module")
def sctrain(tmp_path_factory, digits) -> Sctrain:
    return Sctrain(tmp_path_factory.mktemp("runs"), digits)
