"""Folders that are complete and verified, or do not exist: the form of every checkpoint and snapshot.

Files are written into `.NAME.partial` beside the final place; `manifest.json`, written last, holds size and sha256 of
every one; a rename makes the folder appear under its name. What is retired takes the hidden name first, so that an
interrupted removal leaves no half-empty folder behind. Only JSON and safetensors are stored: reading runs no code.
"""

import hashlib
import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from sctrain.errors import UserError
from sctrain.files import write_json

MANIFEST = "manifest.json"
FORMAT = 1


def partial_folder(final: Path) -> Path:
    """Where `final` is prepared."""
    return final.with_name(f".{final.name}.partial")


def remove_partial_folders(parent: Path) -> None:
    """Clear what an interrupted run left in `parent`. Only while nobody writes there."""
    for path in parent.glob(".*.partial"):
        shutil.rmtree(path)


def flush(path: Path) -> None:
    """Have a finished file or folder on the disk before something relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def describe_file(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256: the entry of a file in a manifest."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def seal(final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest into the partial folder of `final` and give it its name."""
    partial = partial_folder(final)
    write_json(partial / MANIFEST, {"format": FORMAT, "sha256": _digest(manifest), "content": manifest})
    flush(partial)
    os.rename(partial, final)
    flush(final.parent)


def retire(final: Path) -> None:
    """Remove a sealed folder."""
    hidden = partial_folder(final)
    os.rename(final, hidden)
    shutil.rmtree(hidden)


def read_manifest(folder: Path, mend: str) -> dict[str, Any]:
    """The manifest of a sealed folder; UserError, ending in `mend`, if it is missing, damaged or of another version."""
    path = folder / MANIFEST
    try:
        sealed = json.loads(path.read_text())
        version, digest, manifest = sealed["format"], sealed["sha256"], sealed["content"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): {mend}") from error
    if version != FORMAT:
        raise UserError(f"{path} has format {version}, this version reads format {FORMAT}: {mend}")
    if _digest(manifest) != digest:
        raise UserError(f"{path} is corrupt, its checksum differs: {mend}")
    return manifest


def verified(folder: Path, name: str, manifest: dict[str, Any], mend: str) -> Path:
    """Path of a file of a sealed folder, checked against the manifest; UserError, ending in `mend`, if damaged."""
    path = folder / name
    assert not Path(name).is_absolute() and ".." not in Path(name).parts, f"{name} leaves its folder"
    try:
        about = path.stat()
        actual = _described(path, about.st_size, about.st_mtime_ns, about.st_ino)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {mend}") from error
    if manifest["files"].get(name) != actual:
        raise UserError(f"{path} is corrupt, its checksum differs from {MANIFEST}: {mend}")
    return path


@cache
def _described(path: Path, *_: int) -> dict[str, Any]:
    """Of a file that stays what it is: a teacher's weights are wanted again as start and as score."""
    return describe_file(path)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
