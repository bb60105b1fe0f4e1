"""`sctrain models`: the networks that a description may name, and how large they are."""

import argparse
import json
from typing import Any

from models.published import PUBLISHED, Published, size
from sctrain.bench.table import table


def run(args: argparse.Namespace) -> int:
    rows = [_row(name, network) for name, network in PUBLISHED.items()]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    head = ("name", "M parameters", "Gflop forward", "input", "classes")
    print(table(head, [_cells(row) for row in rows]))
    return 0


def _row(name: str, network: Published) -> dict[str, Any]:
    found = size(network)
    return {
        "name": name,
        "parameters": found.parameters,
        "gflop": round(found.multiply_adds / 1e9, 2),  # multiply-adds, as papers count them
        "shape": network.shape,
        "input": "latents" if network.latent else "pixels",
        "classes": network.classes,
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    classes = "-" if row["classes"] == 1 else str(row["classes"])
    shape = f"{'x'.join(map(str, row['shape']))} {row['input']}"
    return row["name"], f"{row['parameters'] / 1e6:.1f}", f"{row['gflop']:.1f}", shape, classes
