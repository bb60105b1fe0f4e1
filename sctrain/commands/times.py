"""`sctrain times`: the best times for multistep sampling, by the run's own Frechet distance."""

import argparse
import json
from collections.abc import Sequence

from sctrain.commands.drawing import device
from sctrain.errors import UserError
from sctrain.evaluation.distance import Distance
from sctrain.evaluation.generation import Generator
from sctrain.evaluation.method import Method, anchor_time, chosen, ema_width, refuse_fixed_times, start_time, times_of
from sctrain.reporting.console import say
from sctrain.sampling import greedy_times
from sctrain.snapshots import newest_images, snapshot_config


def run(args: argparse.Namespace) -> int:
    """The searched times and the run's own with their distances, on the same noise."""
    images = newest_images(args.run)
    config = snapshot_config(args.run, images)
    refuse_fixed_times(args.run, config, "name a run whose times are free, for example of sct or ctm")
    usual = chosen(args.run, config, images, steps=args.steps)
    if args.steps < 2 or args.samples < 2:
        raise UserError("--steps and --samples must be at least 2: the first time is where the process ends")
    generator = Generator.of(args.run, images, ema_width(config, args.ema), device(), args.guidance)
    distance = Distance.of(config.data.url, generator.device, config.data.vae)

    def score(method: Method) -> float:
        return distance(generator.draw(method, args.seed, args.samples).pixels(generator.space))

    def at(times: Sequence[float]) -> Method:
        return Method(usual.sampler, len(times), tuple(times[1:]))

    def drawn_at(times: Sequence[float]) -> list[float]:
        """What is really drawn at: where the run was trained at a few times alone, the nearest of these."""
        return times_of(config, at(times))[: len(times)]

    def score_times(times: Sequence[float]) -> float:
        value = score(at(times))
        say(f"t = {_words(drawn_at(times))}: Frechet distance {value:.3f}")
        return value

    times, found = greedy_times(score_times, start_time(config), args.steps, args.rounds, anchor_time(config))
    times, own = drawn_at(times), times_of(config, usual)[: args.steps]
    before = score(usual)
    if args.json:
        print(json.dumps({"times": times, "fd": found, "own_times": own, "own_fd": before, "samples": args.samples}))
        return 0
    print(f"{args.samples} images of seed {args.seed}. Frechet distance {found:.3f} at t = {_words(times)};")
    print(f"{before:.3f} at the run's own t = {_words(own)}.")
    print(f"Draw at them: sctrain sample {args.run} --times {' '.join(f'{time:.4f}' for time in times[1:])}")
    return 0


def _words(times: Sequence[float]) -> str:
    return ", ".join(f"{time:.4f}" for time in times)
