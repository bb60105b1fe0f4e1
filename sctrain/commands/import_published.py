"""`sctrain import`: published weights of others become a run."""

import argparse
from dataclasses import replace

from pydantic import TypeAdapter, ValidationError

from models.registry import NetworkOptions
from sctrain.config.schema import Network
from sctrain.config.yaml_text import parse_value
from sctrain.errors import UserError
from sctrain.imports.published import read_published
from sctrain.imports.run_folder import RETIME, needs_retiming, write_run
from sctrain.reporting.console import say


def run(args: argparse.Namespace) -> int:
    network = None if args.network is None else _options(args.network)
    published = read_published(args.source, network=network, objective=args.objective, key=args.key)
    if args.licence is not None:
        published = replace(published, licence=args.licence)
    if not published.licence:
        raise UserError(
            f"{args.source} does not say its licence; give --licence, which goes with all that is made of it"
        )
    config = write_run(published, args.to, args.data)
    say(
        f"{args.to}: {published.family} as '{config.network.name}', told {config.noise_input}, EMA "
        f"{config.evaluation.ema[0]:g}; licence: {config.licence}"
    )
    if needs_retiming(config):
        say(
            f"{args.to}: teaches cd, ctm and pd as it is; for sct and scd it has to be told c_noise = t, which "
            f"`sctrain train {args.to / RETIME}` fine-tunes it to"
        )
    return 0


def _options(text: str) -> NetworkOptions:
    """A network as a run description names it."""
    value = parse_value(text, "--network")
    try:
        return TypeAdapter(Network).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--network {text}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
