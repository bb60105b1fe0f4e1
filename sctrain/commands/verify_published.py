"""`sctrain verify-published`: whatever published weights are in a folder, against the published figures."""

import argparse
import json
from typing import Any

from sctrain.commands.drawing import device
from sctrain.errors import UserError
from sctrain.evaluation.catalog import entries
from sctrain.evaluation.published import Verified, verify


def run(args: argparse.Namespace) -> int:
    if not args.folder.is_dir():
        raise UserError(f"{args.folder} is no folder: name the one that holds published weights")
    if args.samples < 2:
        raise UserError("--samples must be at least 2")
    chosen = [entry for entry in entries() if args.only is None or args.only in entry.file]
    if not chosen:
        raise UserError(f"no published file has '{args.only}' in its name: leave --only out to see them all")
    rows = []
    for found in verify(chosen, args.folder, device(), args.samples, args.seed, args.batch):
        rows.append(_row(found))
        if not args.json:
            print(_line(found), flush=True)
    if args.json:
        print(json.dumps(rows, indent=2))
    return 0


def _row(found: Verified) -> dict[str, Any]:
    entry = found.entry
    row = {"file": entry.file, "sampler": entry.sampler, "steps": entry.steps, "published": entry.fid}
    if found.fid is None:
        return row | {"measured": None, "why": f"not run: {found.why}", "source": entry.source}
    return row | {"measured": found.fid, "evaluations": found.evaluations}


def _line(found: Verified) -> str:
    entry = found.entry
    head = f"{entry.name}: published {entry.fid:.2f}"
    if found.fid is None:
        return f"{head}, not run: {found.why} (weights: {entry.source})"
    return f"{head}, here {found.fid:.2f} in {found.evaluations} evaluations"
