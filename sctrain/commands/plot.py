"""`sctrain plot schedules`: what a run description lets change, on one picture, before anything is trained."""

import argparse

from sctrain.commands.drawing import picture_file
from sctrain.config.loading import load
from sctrain.reporting.console import say
from sctrain.reporting.panels import draw_panels
from sctrain.schedule_curves import schedule_panels


def run(args: argparse.Namespace) -> int:
    picture_file("--out", args.out)
    config = load(args.config, args.overrides)
    title = f"{config.name}: {config.objective.name}, {config.budget_images / 1e6:,.4g} million images"
    draw_panels(schedule_panels(config), title, args.out)
    say(f"schedules of {config.name}: {args.out}")
    return 0
