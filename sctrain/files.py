"""Files that are complete or absent, on folders shared by several processes and machines."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` in one step."""
    with _prepared(path, content) as temporary:
        os.replace(temporary, path)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, _json(value))


def create_json(path: Path, value: Any) -> bool:
    """Create `path` complete; False where it exists already. Of several callers exactly one gets True."""
    with _prepared(path, _json(value)) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            # The answer to a link over a network file system may be lost: what counts is whether it is our file.
            return os.path.samefile(temporary, path)
    return True


@contextmanager
def _prepared(path: Path, content: bytes) -> Iterator[Path]:
    """A temporary file beside `path`, on disk, gone afterwards."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
