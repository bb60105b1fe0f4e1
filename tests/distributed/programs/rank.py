"""What every rank program begins and ends with; see worlds.py."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sctrain.config.schema import RuntimeConfig
from sctrain.zero.world import World


def join() -> World:
    """Join the world: one thread per rank, collectives give up after a minute."""
    return World.start(RuntimeConfig(threads=1, timeout_seconds=60))


def report(values: dict[str, Any]) -> None:
    """Hand JSON values to the test."""
    path = Path(os.environ["WORLD_REPORT"])
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(values))
    os.replace(temporary, path)


def run(main: Callable[[], None]) -> None:
    """Run `main` and leave as ranks do: interpreter shutdown races with gloo's threads, and now and then aborts."""
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
