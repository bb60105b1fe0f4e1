"""`sctrain report`: finished runs on one page."""

import argparse
from pathlib import Path

from sctrain.errors import UserError
from sctrain.evaluation.report import write_report
from sctrain.reporting.console import say


def run(args: argparse.Namespace) -> int:
    page = write_report(dict(_named(word) for word in args.runs), args.out)
    say(f"report: {page}")
    return 0


def _named(word: str) -> tuple[str, Path]:
    name, equals, folder = word.partition("=")
    if not (name and equals and folder):
        raise UserError(f"'{word}' does not name a run; write it as name=RUN, for example teacher=runs/teacher")
    return name, Path(folder)
