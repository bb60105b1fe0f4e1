"""`sctrain doctor`: will a run start here? One line per question, each bad one with its mend."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from data_pipeline.description import read_description
from data_pipeline.errors import DataError
from data_pipeline.parallel import cores
from launchers.local import run_ranks
from sctrain import SIBLINGS, package_folder
from sctrain.building import use_storage
from sctrain.commands.train import planned_ranks
from sctrain.config.deepspeed import derive_batch
from sctrain.config.loading import load
from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.reporting.console import say

_OLDEST = {"torch": (2, 11), "deepspeed": (0, 19, 8)}
_SHARED_MEMORY = 2**30  # bytes; what NCCL and data workers pass goes through it, and containers default to 64 MiB


class Finding(NamedTuple):
    """`mend` is empty where all is well; `doubt` is why that could not be found out."""

    what: str
    mend: str = ""
    doubt: str = ""

    def __str__(self) -> str:
        if self.mend:
            return f"[!!] {self.what}: {self.mend}"
        return f"[??] {self.what}: {self.doubt}" if self.doubt else f"[ok] {self.what}"


def run(args: argparse.Namespace) -> int:
    """Print the findings; 2 if any of them needs a mend. Tangents are looked at where all else is well."""
    if args.verdict is not None:  # as one of the ranks that `_tangents` starts
        from sctrain.checkup import check_tangents

        check_tangents(load(args.config, args.overrides), args.verdict)
        return 0
    healthy = True
    for finding in _findings(args):
        healthy = _show(finding) and healthy
    if healthy and args.config:
        for finding in _tangents(args, load(args.config, args.overrides)):
            healthy = _show(finding) and healthy
    return 0 if healthy else 2


def _show(finding: Finding) -> bool:
    print(finding, flush=True)
    return not finding.mend


def _findings(args: argparse.Namespace) -> Iterator[Finding]:
    yield Finding(f"Python {platform.python_version()} at {sys.executable}")
    yield from (_library(name) for name in _OLDEST)
    yield from (Finding(f"package {name} from {package_folder(name)}") for name in ("sctrain", *SIBLINGS))
    yield Finding(f"accelerator: {_accelerator()}")
    yield Finding(f"{cores()} CPU cores")
    yield _compiler()
    yield _headers()
    yield _extensions_folder()
    try:
        config = load(args.config, args.overrides) if args.config else None
    except UserError as error:
        yield from (Finding("run description", sentence) for sentence in str(error).splitlines())
        return
    yield _shared_memory(config)
    if config is not None:
        yield Finding(f"run description {args.config}")
        yield from (_data(config), _batch(config), _run_folder(config))
        yield Finding(f"memory and speed elsewhere: see `sctrain plan {args.config} --gpus N --gpu-memory 80GB`")


def _library(name: str) -> Finding:
    oldest = ".".join(map(str, _OLDEST[name]))
    mend = f"run `pip install '{name}>={oldest}'`"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(f"{name} is not installed", mend)
    numbers = tuple(int(part) for part in found.split("+")[0].split(".") if part.isdigit())
    return Finding(f"{name} {found}", mend if numbers < _OLDEST[name] else "")


def _accelerator() -> str:
    if not torch.cuda.is_available():
        return "none, runs use the CPU"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def _compiler() -> Finding:
    name = os.environ.get("CXX", "c++")
    found = shutil.which(name)
    if found is None:
        return Finding(f"no C++ compiler '{name}'", "install one (Debian: `apt install g++`)")
    return Finding(f"C++ compiler {found}")


def _headers() -> Finding:
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    mend = "" if header.is_file() else "missing; install them (Debian: `apt install python3-dev`)"
    return Finding(f"Python headers at {header}", mend)


def _extensions_folder() -> Finding:
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
    mend = "" if _writable(folder) else "cannot be written; set TORCH_EXTENSIONS_DIR to a folder of your own"
    return Finding(f"folder {folder} for compiled extensions", mend)


def _shared_memory(config: RunConfig | None) -> Finding:
    """Only several GPUs and data workers need much of it."""
    if not os.path.isdir("/dev/shm"):
        return Finding("no /dev/shm on this system")
    free = shutil.disk_usage("/dev/shm").free
    needed = torch.cuda.device_count() > 1 or (config is not None and config.data.workers > 0)
    mend = "give at least 1 GiB, with docker --shm-size=1g, or set data.workers=0 on a CPU"
    return Finding(f"{free / 2**30:.1f} GiB free in /dev/shm", mend if needed and free < _SHARED_MEMORY else "")


def _data(config: RunConfig) -> Finding:
    use_storage(config)
    try:
        description = read_description(config.data.url)
    except DataError as error:
        return Finding("data", str(error))
    return Finding(f"data {config.data.url}: {description.name}, {len(description.classes)} classes")


def _batch(config: RunConfig) -> Finding:
    ranks = planned_ranks(config)
    try:
        micro, accumulation = derive_batch(config, ranks)
    except UserError as error:
        return Finding("batch", str(error))
    return Finding(f"batch {config.batch.global_size} = {ranks} ranks x {accumulation} micro-batches x {micro} images")


def _run_folder(config: RunConfig) -> Finding:
    mend = "" if _writable(config.run_dir) else "cannot be written; set run_dir to a folder of your own"
    return Finding(f"run folder {config.run_dir.absolute()}", mend)


def _writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, or in the nearest folder around it where it does not exist yet."""
    folder = folder.absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return True
    except OSError:
        return False


def _tangents(args: argparse.Namespace, config: RunConfig) -> Iterator[Finding]:
    """Of the networks as they would run here, against central differences; see self_check.py."""
    if not config.objective.has_tangents:
        return
    ranks = planned_ranks(config)
    say(f"verifying tangents on {ranks} rank{'s' * (ranks > 1)}, half a minute or more")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "verdict.json"
        command = [sys.executable, "-m", "sctrain", "doctor", args.config, *args.overrides, "--verdict", str(file)]
        if run_ranks(command, ranks, os.environ):
            yield Finding("tangents", "the ranks ended early; their own message above says why")
            return
        verdict = json.loads(file.read_text())
    yield Finding(verdict["method"])
    state = f"at {verdict['images']:,} images" if verdict["images"] else "before the first step"
    limits = (
        ("blocks", "against central differences", config.guard.tangent_error, "compute.attention to reference"),
        ("running", "against float32", config.guard.precision_error, "compute.tangent_precision or precision to fp32"),
    )
    for kind, against, limit, mend in limits:
        for name, error in verdict[kind].items():
            what = f"tangent of {name} {state}"
            if error is None:
                yield Finding(what, doubt="not verified, it is zero (gates that are fresh)")
            else:
                far = f"the limit is {limit:g}; try to set {mend}" if error > limit else ""
                yield Finding(f"{what}: error {error:.1e} {against}", far)
