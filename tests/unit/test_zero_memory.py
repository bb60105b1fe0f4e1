"""State on a disk: values survive giving up the pages, nothing is left behind, a full disk is said."""

import errno
import os

import pytest
import torch

from sctrain.config.schema import OffloadConfig
from sctrain.errors import UserError
from sctrain.zero import memory
from sctrain.zero.memory import DiskMemory, HostMemory, Memories, Memory


def resident_file_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssFile"))


def test_values_outlive_their_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "SLACK", 2**24)
    disk, values = DiskMemory(tmp_path), torch.randn(2**23)
    held = disk.hold(values)
    held.mul_(2)
    before = resident_file_bytes()
    disk.relieve(2**24)
    assert before - resident_file_bytes() > 2**24
    assert torch.equal(held, 2 * values)
    assert disk.hold(held) is held


def test_nothing_is_left_behind(tmp_path):
    disk = DiskMemory(tmp_path / "new" / "folder")
    half = disk.empty(10, torch.device("cpu"), torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.shape == (10,) and not half.any()
    assert disk.empty(0, torch.device("cpu")).shape == (0,)
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_full_disk_is_said_at_once(tmp_path, monkeypatch):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"0.4 GB do not fit in .* \(No space left on device\): make room, or"):
        DiskMemory(tmp_path).empty(10**8, torch.device("cpu"))


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/offload cannot be made .*: set 'offload.folder' to another"):
        DiskMemory(tmp_path / "file" / "offload")


def test_the_description_chooses(tmp_path):
    found = Memories(OffloadConfig(optimizer="disk", ema="cpu"), tmp_path)
    assert isinstance(found.optimizer, DiskMemory) and isinstance(found.ema, HostMemory)
    assert found.all is found.optimizer
    found = Memories(OffloadConfig(), tmp_path / "unused")
    assert type(found.optimizer) is type(found.ema) is type(found.all) is Memory
    assert not (tmp_path / "unused").exists()
