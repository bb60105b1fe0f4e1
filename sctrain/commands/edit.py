"""`sctrain edit`: zero-shot editing of the user's pictures with a consistency model."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sctrain.commands.drawing import device, evaluations
from sctrain.commands.edit_inputs import (
    Model,
    check_files,
    chosen_labels,
    pictures_of,
)
from sctrain.editing import given
from sctrain.editing.algorithm import STROKE_SIGMAS, denoised, from_strokes, interpolated, zero_shot
from sctrain.editing.measurements import Measurement, colorization, inpainting, superresolution
from sctrain.editing.pictures import read_mask, write_pictures
from sctrain.errors import UserError
from sctrain.evaluation.generation import Generator
from sctrain.evaluation.method import ema_width
from sctrain.parameterization import Network
from sctrain.reporting.console import say
from sctrain.reporting.grids import image_grid
from sctrain.sampling import initial_noise

Rows = dict[str, Tensor]  # what is shown above the results: pixels in [0, 255], (N, C, H, W) each

# (network, indices of the images (B,) on the CPU, their labels (B,)) -> images in model space (B, C, H, W)
Edit = Callable[[Network, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """One edit of a batch of pictures."""

    count: int
    evaluations: int  # of the network, per picture
    edit: Edit
    rows: Rows
    known: tuple[Measurement, Tensor] | None = None  # in pixels: what the results have in common with (N, C, H, W)


def run(args: argparse.Namespace) -> int:
    """Write one picture with the rows before, given and after, and the single results beside it if asked to."""
    model = Model.of(args.run)
    ema = ema_width(model.config, args.ema)
    task = _TASKS[args.kind](args, model)
    singles = [args.out.with_name(f"{args.out.stem}-{i}.png") for i in range(task.count)] if args.save_each else []
    check_files(args.out, singles, _inputs(args))
    labels = chosen_labels(args.labels, model, task.count)
    generator = Generator.of(model.run, model.images, ema, device(), args.guidance)
    network = consistency_network(generator)
    start = time.perf_counter()
    batches = torch.arange(task.count).split(model.config.evaluation.batch)
    x = torch.cat([task.edit(network, batch, labels[batch].to(generator.device)).float().cpu() for batch in batches])
    seconds = time.perf_counter() - start
    _write(args.out, singles, task, model.space.to_pixels(x))
    say(f"{args.out}: {task.count} images, {evaluations(task.evaluations)} each, {seconds:.2f} s")
    return 0


def consistency_network(generator: Generator) -> Network:
    """F whose consistency function leads to the data at once: networks that are told where a jump ends are told 0."""
    if not generator.config.objective.told_the_end:
        return generator.F

    def to_the_data(u: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return generator.F(u, t, labels, end=torch.zeros_like(t))

    return to_the_data


def _inputs(args: argparse.Namespace) -> list[Path]:
    return [*getattr(args, "images", []), *([args.mask] if "mask" in args else [])]


def _write(out: Path, singles: list[Path], task: Task, after: Tensor) -> None:
    """The grid, the results in their own size, and how exactly their known part is what was given."""
    rows = task.rows | {"after": after} if task.rows else {"": after}
    out.parent.mkdir(parents=True, exist_ok=True)
    tiles = torch.cat([row.round().to(torch.uint8) for row in rows.values()])
    image_grid(tiles, task.count, row_labels=[name for name in rows if name]).save(out)
    if singles:
        write_pictures(after, singles)
    if task.known is not None:
        measurement, y = task.known
        levels = measurement.deviation(after.double(), y.double())
        say(f"what was given is off by at most {levels:.2f} of 255 levels: files hold whole levels")


def _inpaint(args: argparse.Namespace, model: Model) -> Task:
    before = pictures_of(args.images, model.about)
    missing = read_mask(args.mask, model.about.shape[1:])
    rows = {"before": before, "given": given.without(before, missing)}
    return _algorithm_4(args, model, rows, before, inpainting(missing))


def _colorize(args: argparse.Namespace, model: Model) -> Task:
    if model.about.channels != 3:
        raise UserError(f"{model.run} makes gray images, which have no colours; colorize with a run on RGB images")
    before = pictures_of(args.images, model.about, also_gray=True)
    y = given.gray(before)
    scale = [std / model.config.sigma_data for std in model.config.data.std]
    return _algorithm_4(args, model, {"before": before, "given": y}, y, colorization(), colorization(scale))


def _superres(args: argparse.Namespace, model: Model) -> Task:
    _, height, width = model.about.shape
    if args.factor < 2 or height % args.factor or width % args.factor:
        raise UserError(f"--factor {args.factor} is not above 1 and a divisor of the model's {width}x{height} pixels")
    before = pictures_of(args.images, model.about, smaller_by=args.factor)
    if before.shape[-1] < width:
        y = given.enlarged(before, args.factor)
        rows = {"given": y}
    else:
        y = given.coarse(before, args.factor)
        rows = {"before": before, "given": y}
    return _algorithm_4(args, model, rows, y, superresolution(args.factor))


def _algorithm_4(
    args: argparse.Namespace,
    model: Model,
    rows: Rows,
    y: Tensor,
    of_pixels: Measurement,
    measurement: Measurement | None = None,
) -> Task:
    """Of the pixels `y`; `measurement` is what is known in model space, where that is not what is known of pixels."""
    known, times = measurement or of_pixels, model.times(args.steps)
    sigma_data, anchor = model.config.sigma_data, model.config.objective.anchor
    x = model.space.from_pixels(y)
    black, white = (model.space.from_pixels(torch.full_like(y[:1, :, :1, :1], level)) for level in (0, 255))

    def edit(network: Network, batch: Tensor, labels: Tensor) -> Tensor:
        part = x[batch].to(labels.device)
        edited = zero_shot(network, part, known, labels, sigma_data, times, args.seed, batch, anchor)
        return known.within(edited, part, black.to(part), white.to(part))

    return Task(len(y), len(times), edit, rows, (of_pixels, y))


def _stroke(args: argparse.Namespace, model: Model) -> Task:
    strokes = pictures_of(args.images, model.about)
    x = model.space.from_pixels(strokes)
    sigma_data, anchor = model.config.sigma_data, model.config.objective.anchor
    times = model.times_of(args.sigma or [sigma * sigma_data / 0.5 for sigma in STROKE_SIGMAS])

    def edit(network: Network, batch: Tensor, labels: Tensor) -> Tensor:
        return from_strokes(network, x[batch].to(labels.device), labels, sigma_data, times, args.seed, batch, anchor)

    return Task(len(strokes), len(times), edit, {"given": strokes})


def _denoise(args: argparse.Namespace, model: Model) -> Task:
    noisy = pictures_of(args.images, model.about)
    x, (time_of_noise,) = model.space.from_pixels(noisy), model.times_of([args.sigma])

    def edit(network: Network, batch: Tensor, labels: Tensor) -> Tensor:
        return denoised(network, x[batch].to(labels.device), labels, model.config.sigma_data, time_of_noise)

    return Task(len(noisy), 1, edit, {"given": noisy})


def _interpolate(args: argparse.Namespace, model: Model) -> Task:
    """From the first image of one seed to the first of another, over the great circle between their noises."""
    first, second = args.seeds
    if first == second:
        raise UserError(f"--seeds {first} {second} are the same noise, with nothing between; name two different seeds")
    sigma_data, only = model.config.sigma_data, torch.tensor([0])
    first_noise, second_noise = (
        initial_noise(seed, only, model.about.shape, sigma_data)[0] for seed in (first, second)
    )
    shares = torch.linspace(0, 1, args.count)

    def edit(network: Network, batch: Tensor, labels: Tensor) -> Tensor:
        ends = (first_noise.to(labels.device), second_noise.to(labels.device))
        return interpolated(network, *ends, shares[batch], labels, sigma_data, model.start)

    return Task(args.count, 1, edit, {})


_TASKS: dict[str, Callable[[argparse.Namespace, Model], Task]] = {
    "inpaint": _inpaint,
    "colorize": _colorize,
    "superres": _superres,
    "stroke": _stroke,
    "denoise": _denoise,
    "interpolate": _interpolate,
}
