"""What `sctrain doctor CONFIG` runs on the ranks: the tangents of the run as it would start now. It writes nothing."""

from __future__ import annotations

from pathlib import Path

from sctrain.config.schema import RunConfig
from sctrain.files import write_json
from sctrain.objectives.base import Progress
from sctrain.parts import Parts
from sctrain.runs import RunFolder
from sctrain.sources import pinned
from sctrain.zero.checkpoint import latest
from sctrain.zero.state import load_state
from sctrain.zero.world import World


def check_tangents(config: RunConfig, verdict_file: Path) -> None:
    """Verify the tangents of the newest checkpoint, or of a fresh start, and leave the verdict as JSON."""
    world = World.start(config.runtime)
    try:
        parts = Parts(pinned(config), world)
        path, images = latest(RunFolder(config.run_dir).checkpoints), 0
        if path is not None:
            shards = parts.student.shards
            followers = [parts.power_ema(), *filter(None, [parts.target])]
            images = load_state(path, shards, followers)["images"]
        with parts.batches(images) as batches:
            draws = parts.draw(next(batches), Progress(images, config.budget_images))
        verdict = parts.verify_tangents(draws)
        if world.is_main:
            write_json(
                verdict_file,
                {
                    "images": images,
                    "method": parts.tangent_method(),
                    "blocks": verdict.blocks,
                    "running": verdict.running,
                },
            )
    finally:
        world.stop()
