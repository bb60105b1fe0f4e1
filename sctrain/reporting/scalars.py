"""Training scalars over images seen: one JSON line per status interval, and TensorBoard.

Both go on where a resumed run starts: what an earlier attempt wrote beyond that image count is dropped, so no curve
runs twice. Tags are `group/name`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from sctrain.files import write_bytes
from sctrain.runs import RunFolder


class ScalarWriter:
    """Appends to `stats.jsonl` and `tensorboard/train` of a run."""

    def __init__(self, run: RunFolder, start: int = 0, *, enabled: bool = True):
        """Go on after `start` images. Every rank may have one, the `enabled` one writes."""
        self._enabled = enabled
        if enabled:
            run.root.mkdir(parents=True, exist_ok=True)
            if run.stats.exists():
                _drop_beyond(run.stats, start)
            self._stats = run.stats.open("a", encoding="utf-8", buffering=1)
            self._events = SummaryWriter(str(run.tensorboard / "train"), purge_step=start + 1)

    def write(self, images: int, scalars: Mapping[str, float]) -> None:
        """Record `scalars` after `images` images; in the JSON line null stands for what is not finite."""
        if not self._enabled:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._stats.write(json.dumps({"images": images, **finite}, allow_nan=False) + "\n")
        for name, value in scalars.items():
            self._events.add_scalar(name, value, images)
        self._events.flush()

    def close(self) -> None:
        if self._enabled:
            self._stats.close()
            self._events.close()


def read_stats(path: Path) -> list[dict[str, Any]]:
    """The lines of a `stats.jsonl`, without one that a killed process left half written."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _drop_beyond(stats: Path, images: int) -> None:
    """Rewrite the file without the lines past `images`, in one step."""
    kept = [json.dumps(line) + "\n" for line in read_stats(stats) if line["images"] <= images]
    write_bytes(stats, "".join(kept).encode())
