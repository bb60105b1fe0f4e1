"""Which code this is: the version, and the commit where it runs out of a checkout."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

from sctrain import __version__

_ROOT = Path(__file__).resolve().parents[1]


@cache
def code_version() -> str:
    """For example `0.1.0, commit 0123abc...`, with `and changes` where files differ from it."""
    if not (_ROOT / ".git").exists():
        return __version__
    try:
        commit, changes = (_git(*words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno")))
    except (OSError, subprocess.SubprocessError):  # no git here, or a repository of somebody else
        return __version__
    return f"{__version__}, commit {commit}{' and changes' if changes else ''}"


def _git(*words: str) -> str:
    command = ["git", "-C", str(_ROOT), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
