"""`sctrain train`: as a rank where a launcher has made this process one, else it starts the local ranks itself."""

import argparse
import os
import sys

import torch

from launchers.local import run_ranks
from sctrain.building import open_split
from sctrain.config.deepspeed import derive_batch
from sctrain.config.loading import dump, load
from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.sources import pinned, refuse_unfit_sources


def run(args: argparse.Namespace) -> int:
    overrides = args.overrides + ([f"runtime.ranks={args.ranks}"] if args.ranks is not None else [])
    config = load(args.config, overrides)
    if args.print_config:
        print(dump(config), end="")
        return 0
    if "RANK" in os.environ:
        return _train(config)
    ranks = planned_ranks(config)
    derive_batch(config, ranks)  # these three refuse before any process starts
    open_split(config)
    refuse_unfit_sources(pinned(config))
    debug = ["--debug"] if args.debug else []
    return run_ranks([sys.executable, "-m", "sctrain", *debug, "train", args.config, *overrides], ranks, os.environ)


def planned_ranks(config: RunConfig) -> int:
    """How many ranks a plain `sctrain train` starts here: what the description says; else one per GPU, or 2 on a CPU.

    At most as many as divide the global batch.
    """
    gpus = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
    if config.runtime.ranks is None:
        size = config.batch.global_size
        return max(ranks for ranks in range(1, (gpus or 2) + 1) if size % ranks == 0)
    if 0 < gpus < config.runtime.ranks:
        raise UserError(f"runtime.ranks {config.runtime.ranks} exceeds the {gpus} GPUs here; one rank needs one GPU")
    return config.runtime.ranks


def _train(config: RunConfig) -> int:
    from sctrain.trainer import train  # imports DeepSpeed, which the process that only starts ranks need not

    return train(config)
