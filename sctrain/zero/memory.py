"""Where the float32 state lives that a forward does not need: on the device, on the host, or on a disk.

On a disk it is mapped into memory, so optimizer, EMA and checkpoints use it like any other; the operating system reads
and writes pages as they are touched. DeepSpeed's own offload to disks leaves nothing in memory that could be looked at
between steps, and needs libaio.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from sctrain.config.schema import OffloadConfig
from sctrain.errors import UserError

SLACK = 2**28  # bytes that may be touched before their pages are given up


class Memory:
    """The device's own."""

    def empty(self, numel: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """(numel,) for the state of weights on `device`."""
        return torch.empty(numel, device=device, dtype=dtype)

    def hold(self, values: Tensor) -> Tensor:
        """The same flat values, in this memory."""
        return values

    def relieve(self, touched: int) -> None:
        """To be told how many bytes were just used: what they leave behind may have to be cleared away."""


class HostMemory(Memory):
    """The host's, also of weights on a GPU. The optimizer's own state is put there by DeepSpeed."""

    def empty(self, numel: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(numel, dtype=dtype)


class DiskMemory(Memory):
    """Files of a folder, without names: they end with the process, however it ends."""

    def __init__(self, folder: Path):
        """UserError if the folder cannot be made."""
        self._folder, self._touched = folder, 0
        self._maps: dict[int, mmap.mmap] = {}  # by address
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made ({error.strerror}): set 'offload.folder' to another") from error

    def empty(self, numel: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        size = numel * dtype.itemsize
        if not size:
            return torch.empty(0, dtype=dtype)
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)  # or a full disk would kill the process later
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            told = f"{size / 1e9:.1f} GB do not fit in {self._folder} ({error.strerror})"
            raise UserError(f"{told}: make room, or set 'offload.folder' to another disk") from error
        tensor = torch.frombuffer(mapped, dtype=dtype)
        self._maps[tensor.data_ptr()] = mapped
        return tensor

    def hold(self, values: Tensor) -> Tensor:
        if values.data_ptr() in self._maps:
            return values
        held = self.empty(values.numel(), values.device, values.dtype).copy_(values)
        self.relieve(held.nbytes)
        return held

    def relieve(self, touched: int) -> None:
        """Give up the pages, which stay in the system's cache, or on the disk, and come back when they are used."""
        self._touched += touched
        if self._touched >= SLACK:
            self._touched = 0
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)


class Memories:
    """Those of a run: where its description puts the optimizer's state and the EMA."""

    def __init__(self, config: OffloadConfig, folder: Path):
        """`folder` is where disks keep what is on them, unless the description names another."""
        places, disk = (config.optimizer, config.ema), None
        if "disk" in places:
            disk = DiskMemory(config.folder or folder)
        self.all = disk or Memory()  # which to relieve after using any of it
        self.optimizer, self.ema = (
            HostMemory() if place == "cpu" else (disk if disk and place == "disk" else Memory()) for place in places
        )
