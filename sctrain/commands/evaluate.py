"""`sctrain evaluate`: a worker beside the training, or once afterwards."""

import argparse

from sctrain.evaluation.worker import evaluate
from sctrain.reporting.console import say


def run(args: argparse.Namespace) -> int:
    evaluated = evaluate(args.run, watch=args.watch, device=args.device)
    say(f"{args.run}: {evaluated} snapshots evaluated")
    return 0
