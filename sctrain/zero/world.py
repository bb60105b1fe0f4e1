"""The processes of one run: rank, device, threads, and the few collectives the trainer itself needs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor

from data_pipeline.parallel import cores
from sctrain.config.schema import RuntimeConfig
from sctrain.errors import UserError
from sctrain.zero.internals import check_deepspeed, set_default_timeout, without_compiled_muon, without_shared_memory_op

_PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among its peers, as the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK) says."""

    rank: int
    size: int
    device: torch.device
    nodes: int = 1  # machines

    @classmethod
    def start(cls, runtime: RuntimeConfig) -> World:
        """Join the process group: NCCL where there are GPUs, gloo elsewhere."""
        os.dup2(2, 1)  # DeepSpeed logs to stdout; a training process has nothing to say there
        deepspeed_logger.setLevel("WARNING")
        if missing := [name for name in _PLACE if name not in os.environ]:
            raise UserError(f"RANK is set but {missing[0]} is not: start with sctrain, deepspeed or torchrun")
        local_rank, cuda = int(os.environ["LOCAL_RANK"]), os.environ.get("DS_ACCELERATOR") != "cpu"
        device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])
        torch.set_num_threads(runtime.threads or max(1, cores() // local_size))
        _join("nccl" if cuda else "gloo", timedelta(seconds=runtime.timeout_seconds))
        return cls(dist.get_rank(), dist.get_world_size(), device, -(-dist.get_world_size() // local_size))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks of a tensor of equal shape everywhere."""
        values = values.to(self.device, copy=True)
        dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Mean over all ranks of a tensor of equal shape everywhere."""
        return self.sum(values) / self.size

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank: how ranks agree to stop at the same step."""
        return bool(self.sum(torch.tensor([float(flag)])).item())

    def barrier(self) -> None:
        self.sum(torch.zeros(1))

    def stop(self) -> None:
        dist.destroy_process_group()


def _join(backend: str, timeout: timedelta) -> None:
    check_deepspeed()
    set_default_timeout(timeout)
    without_shared_memory_op()
    without_compiled_muon()
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
