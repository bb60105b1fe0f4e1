"""The command line: parsing, and what an error means to the shell.

Exit codes: 0 done; 1 a defect of ours (with a traceback) or another rank's failure; 2 a mistake the user can mend (one
sentence on stderr); 75 stopped by a signal after a checkpoint, the same command goes on; 130 interrupted from the
keyboard; 141, without a word, where nobody reads the output any more (`sctrain ... | head`). A command lives in
`sctrain/commands/` and is imported only when it is called, so `sctrain --help` needs neither torch nor DeepSpeed.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from data_pipeline.errors import DataError
from sctrain import __version__
from sctrain.commands.data_arguments import add_data, add_prepare, byte_size, count
from sctrain.errors import OwnUserError, UserError

USER_ERROR = 2
INTERRUPTED = 130
UNREAD = 141  # what shells call a program that SIGPIPE ended
LOST_PEER = OwnUserError("another rank ended; its own message says why")
_LOST_PEER_SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo's words
# Names that `bench` and `sample` know, written once more here so that --help needs no torch.
_STUDENTS = ("sct", "scd", "scd-guided")
_ENGINES = ("single_pass", "two_pass", "finite_difference")
_SAMPLERS = ("consistency", "jumps", "heun", "euler", "dpm")
_ATTENTION = ("reference", "blocked", "triton")
_MODULES = {"import": "import_published", "verify-published": "verify_published"}  # where not the command's name
_PUBLISHED = [f"edm2-{form}{size}" for form in ("", "scm-") for size in ("xs", "s", "m", "l", "xl", "xxl")]
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (UserError, DataError, OSError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return UNREAD
        if "--debug" in argv or not (told := _for_people(error)):
            raise
        _tell(told)
        return USER_ERROR if told is not LOST_PEER else 1


def _run(argv: Sequence[str]) -> int:
    try:
        args = parse(argv)
        module = _MODULES.get(args.command, args.command)
        return importlib.import_module(f"sctrain.commands.{module}").run(args)
    finally:
        sys.stdout.flush()  # an end of its reader is met here, and not when the interpreter ends


def _nobody_reads() -> bool:
    """Whether the reader of our output has ended, as `head` does; what is left of it then goes nowhere."""
    unread = False
    for stream in (1, 2):
        poll = select.poll()
        poll.register(stream, 0)
        if any(events & select.POLLERR for _, events in poll.poll(0)):
            unread = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    return unread


def _for_people(error: Exception) -> Exception | None:
    """What to say in one sentence; None for a defect of ours."""
    if isinstance(error, UserError | DataError):
        return error
    if isinstance(error, OSError) and error.errno in _DISK and error.filename:
        return OwnUserError(
            f"{error.filename}: {error.strerror}; make room or allow writing there, then repeat the command"
        )
    return LOST_PEER if any(sign in str(error) for sign in _LOST_PEER_SIGNS) else None


def _tell(error: Exception) -> None:
    """One line per mistake. All ranks find the same mistakes, so rank 0 speaks; what a rank has read is its own."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or isinstance(error, DataError | OwnUserError):
        speaker = "sctrain" if rank == "0" else f"sctrain (rank {rank})"
        for sentence in str(error).splitlines():
            print(f"{speaker}: error: {sentence}", file=sys.stderr)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Typed arguments. Overrides of `train` may stand anywhere after its CONFIG."""
    args, rest = _parser().parse_known_args(argv)
    if rest and (any(word.startswith("-") for word in rest) or "overrides" not in args):
        raise UserError(f"unknown argument '{rest[0]}'; `sctrain {args.command} --help` lists the known ones")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sctrain", description="Train one- and two-step image generators (consistency models).")
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(debug=False)
    _add_global_flags(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, add_arguments) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        _add_global_flags(command)
        add_arguments(command)
    return parser


def _add_global_flags(parser: argparse.ArgumentParser) -> None:
    """Before the command (launchers put --local_rank there) and after it."""
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks of mistakes")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _prepare(parser: argparse.ArgumentParser) -> None:
    add_prepare(parser, _add_global_flags)


def _data(parser: argparse.ArgumentParser) -> None:
    add_data(parser, _add_global_flags)


def _train(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--ranks", type=int, help="local processes to start (default: GPUs, else 2)")
    parser.add_argument("--print-config", action="store_true", help="print the resolved description and leave")


def _add_config(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("config", nargs=nargs, help="YAML file, or the name of a recipe")
    _add_overrides(parser)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    example = "for example optimizer.learning_rate=1e-4"
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=example)


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder")
    until = parser.add_mutually_exclusive_group()
    until.add_argument("--watch", action="store_true", help="go on until training has ended and all is scored")
    until.add_argument("--once", action="store_true", help="score what is there and leave (the default)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")


def _sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder, or an exported model")
    parser.add_argument("--sampler", choices=_SAMPLERS, help="of a diffusion model heun (default), euler or dpm")
    parser.add_argument("--steps", type=int, help="sampling steps (default: 1; of a diffusion model ode_steps)")
    parser.add_argument("--times", type=float, nargs="+", metavar="T", help="of a student's steps after the first")
    parser.add_argument("--gamma", type=float, help="of ctm: 0 is deterministic (default), 1 all noise anew")
    parser.add_argument("--count", type=int, default=64, help="number of images (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--class", type=_label, dest="label", metavar="CLASS", help="one only; none: without a label")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance (default: the run's scale; 1: none)")
    parser.add_argument("--guide", type=Path, metavar="RUN", help="guide by this run instead, a smaller or weaker one")
    parser.add_argument("--guide-ema", type=float, metavar="WIDTH", help="its relative EMA width")
    told = "what the guide is told: no label (EDM2; default if it knows that), or the same (autoguidance)"
    parser.add_argument("--guide-labels", choices=("none", "same"), help=told)
    parser.add_argument("--ema", type=float, help="relative EMA width (default: the run's first to be scored)")
    parser.add_argument("--vae", type=Path, metavar="FOLDER", help="auto-encoder that decodes latents (or data.vae)")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), help="image file (default: grid.png)")


def _label(text: str) -> int | str:
    return text if text == "none" else int(text)


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--ema", type=float, help="relative EMA width (default: the run's first to be scored)")
    parser.add_argument("--format", choices=("safetensors", "diffusers"), default="safetensors")
    parser.add_argument("--images", type=int, metavar="N", help="which snapshot (default: the newest)")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="new folder to write")


def _edit(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="WHAT")
    inpaint = kinds.add_parser("inpaint", help="generate what a mask covers")
    colorize = kinds.add_parser("colorize", help="generate the colours of gray pictures")
    superres = kinds.add_parser("superres", help="generate the details of coarse pictures")
    stroke = kinds.add_parser("stroke", help="generate images that resemble a sketch in strokes (SDEdit)")
    denoise = kinds.add_parser("denoise", help="remove noise of a known level")
    interpolate = kinds.add_parser("interpolate", help="generate images between those of two seeds")
    for kind in (inpaint, colorize, superres, stroke, denoise, interpolate):
        _add_global_flags(kind)
        kind.add_argument("run", type=Path, help="run folder of a consistency model")
    for kind in (inpaint, colorize, superres, stroke, denoise):
        kind.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="PNG or JPEG of the model's size")
    inpaint.add_argument("--mask", type=Path, required=True, help="picture that is white where to generate")
    superres.add_argument("--factor", type=int, required=True, help="how many pixels become one, in each direction")
    for kind in (inpaint, colorize, superres):
        kind.add_argument("--steps", type=count, default=40, help="noise levels of EDM's grid (default: 40)")
    noise = "noise level in the units of sigma_data"
    stroke.add_argument("--sigma", type=float, nargs="+", help=f"{noise}, descending (default: 5.38 2.24 of 0.5)")
    denoise.add_argument("--sigma", type=float, required=True, help=f"{noise}: of the noise in the pictures")
    interpolate.add_argument("--seeds", type=int, nargs=2, required=True, metavar=("A", "B"))
    interpolate.add_argument("--count", type=count, default=10, help="number of images, both ends too (default: 10)")
    for kind in (inpaint, colorize, superres, stroke):
        kind.add_argument("--seed", type=int, default=0)
    for kind in (inpaint, colorize, superres, stroke, denoise, interpolate):
        kind.add_argument(
            "--class", type=int, nargs="+", dest="labels", metavar="CLASS", help="one for all images, or one for each"
        )
        kind.add_argument("--guidance", type=float, help="classifier-free guidance (default: the run's scale; 1: none)")
        kind.add_argument("--ema", type=float, help="relative EMA width (default: the run's first to be scored)")
        kind.add_argument("--out", type=Path, default=Path("edited.png"), help="PNG file (default: edited.png)")
        kind.add_argument("--save-each", action="store_true", help="the single results beside it, as OUT-0.png ...")


def _import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, help=".pkl of EDM or EDM2, .pt of OpenAI's, .safetensors, diffusers folder"
    )
    parser.add_argument("--to", type=Path, required=True, metavar="RUN", help="run folder to write")
    parser.add_argument("--data", required=True, metavar="URL", help="data set of the same shape and classes")
    parser.add_argument("--network", metavar="YAML", help="where the file does not say: '{name: adm, channels: 64}'")
    parser.add_argument("--objective", choices=("edm", "trigflow", "cd", "ct", "sct", "scd"), help="it was trained by")
    parser.add_argument("--key", default="ema", help="which network of a pickle (default: ema)")
    parser.add_argument("--licence", help="of the weights (default: as their publisher says)")


def _verify_published(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="published weights, statistics and Inception")
    parser.add_argument("--samples", type=count, default=50_000, help="images per figure (default: 50000)")
    parser.add_argument("--batch", type=count, default=64, help="images at once (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="TEXT", help="entries whose file name has this in it")
    parser.add_argument("--json", action="store_true", help="a list of rows instead of a table")


def _times(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder of a student")
    parser.add_argument("--steps", type=count, default=2, help="sampling steps (default: 2)")
    parser.add_argument("--samples", type=count, default=1000, help="images per trial (default: 1000)")
    parser.add_argument("--rounds", type=count, default=6, help="two trials each, a third narrower (default: 6)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, help="classifier-free guidance (default: the run's scale)")
    parser.add_argument("--ema", type=float, help="relative EMA width (default: the run's first to be scored)")
    parser.add_argument("--json", action="store_true", help="an object instead of words")


def _bench(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    step = kinds.add_parser("step", help="consistency steps beside a plain diffusion step of the same network")
    step.add_argument("--network", choices=_PUBLISHED, metavar="NAME", help="edm2-xs .. edm2-scm-xxl in place of a DiT")
    step.add_argument("--width", type=count, default=384)
    step.add_argument("--depth", type=count, default=8)
    step.add_argument("--heads", type=count, default=6)
    step.add_argument("--side", type=count, default=32, help="of the latents, in pixels; tokens are 2x2 (default: 32)")
    step.add_argument("--batch", type=count, default=4, help="over all ranks (default: 4)")
    step.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    step.add_argument("--tangent-precision", choices=("value", "fp32"), default="value")
    step.add_argument("--attention", choices=("auto", *_ATTENTION), default="auto")
    step.add_argument("--ranks", type=count, nargs="+", default=[1, 2], help="numbers of local ranks (default: 1 2)")
    step.add_argument("--objectives", nargs="+", choices=_STUDENTS, default=_STUDENTS, metavar="NAME")
    step.add_argument("--engines", nargs="+", choices=_ENGINES, default=_ENGINES, metavar="NAME")
    step.add_argument("--checkpointing", choices=("no", "yes"), nargs="+", default=["no", "yes"], help="default: both")
    step.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    attention = kinds.add_parser("attention", help="attention with tangents beside its value alone, over lengths")
    lengths = [2**power for power in range(8, 15)]
    attention.add_argument("--lengths", type=count, nargs="+", default=lengths, metavar="N", help="256 .. 16384")
    attention.add_argument("--head-dims", type=count, nargs="+", default=[64], metavar="D", help="default: 64")
    attention.add_argument("--batch", type=count, default=1)
    attention.add_argument("--heads", type=count, default=2)
    attention.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    attention.add_argument("--backends", nargs="+", choices=_ATTENTION, metavar="NAME", help="default: as chosen here")
    methods = kinds.add_parser("methods", help="every method trained from the same start, and scored alike")
    methods.add_argument("--methods", nargs="+", metavar="NAME", help="of the recipes (default: all)")
    methods.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of training (default: 0 1)")
    methods.add_argument("--recipes", default="digits/methods", help="folder with teacher.yaml and a file per method")
    methods.add_argument("--out", type=Path, default=Path("runs/methods"), help="where the runs are kept and continued")
    methods.add_argument("--full", action="store_true", help="four times the images and three seeds")
    methods.add_argument("--jobs", type=count, help="runs side by side (default: one per core)")
    methods.add_argument("--set", nargs="+", default=[], metavar="key=value", dest="changes", help="in every run")
    data = kinds.add_parser("data", help="how fast samples arrive, beside webdataset and raw reads of the same objects")
    data.add_argument("url", help="folder or bucket of a data set")
    data.add_argument("--generate", type=byte_size, metavar="SIZE", help="first write latents there: 512MiB, say")
    data.add_argument("--batch", type=count, default=256, help="samples (default: 256)")
    data.add_argument("--workers", type=count, default=2, help="processes (default: 2)")
    data.add_argument("--window", type=count, help="of the shuffle, in samples (default: an eighth of the set)")
    data.add_argument("--rate", type=float, default=500.0, help="images/s of the paced consumer (default: 500)")
    data.add_argument("--seconds", type=float, default=20.0, help="how long it consumes (default: 20)")
    precision = kinds.add_parser("precision", help="errors of tangents in low precision on a trained run")
    precision.add_argument("run", type=Path, help="run folder")
    precision.add_argument("--ema", type=float, help="relative EMA width (default: the run's first to be scored)")
    sample = kinds.add_parser("sample", help="quality over network evaluations: solvers of teachers, and students")
    sample.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders, all of the same data")
    most = "of a teacher's network, at most (default: 10 20 50)"
    sample.add_argument("--evaluations", type=count, nargs="+", default=[10, 20, 50], metavar="N", help=most)
    sample.add_argument("--steps", type=count, nargs="+", default=[1, 2, 4], metavar="N", help="of students: 1 2 4")
    sample.add_argument("--samples", type=count, default=2000, help="images per row (default: 2000)")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--guidance", type=float, help="classifier-free guidance (default: each run's scale)")
    sample.add_argument("--ema", type=float, help="relative EMA width (default: each run's first to be scored)")
    sample.add_argument("--plot", type=Path, metavar="FILE", help="also draw the curves: a .png, .svg or .pdf file")
    for kind in (step, attention, methods, data, precision, sample):
        _add_global_flags(kind)
        if kind is not sample:
            kind.add_argument("--rounds", type=count, default=5, help="interleaved measurements of each (default: 5)")
        kind.add_argument("--json", action="store_true", help="a list of rows instead of a table")


def _sweep(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    vary = "values of one key; repeat it for a grid, for example --vary optimizer.learning_rate=1e-4,3e-4"
    parser.add_argument("--vary", action="append", required=True, metavar="key=v1,v2", help=vary)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of training (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="folder where the runs are kept and continued")
    parser.add_argument("--jobs", type=count, help="runs side by side (default: one per core)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture of the table (default: OUT/sweep.png)")
    parser.add_argument("--json", action="store_true", help="a list of rows instead of a table")


def _doctor(parser: argparse.ArgumentParser) -> None:
    _add_config(parser, "?")
    parser.add_argument("--verdict", type=Path, help=argparse.SUPPRESS)


def _plan(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--gpus", type=count, required=True, metavar="N", help="all of them, over all nodes")
    parser.add_argument("--nodes", type=count, metavar="M", help="machines (default: one per 8 GPUs)")
    parser.add_argument("--gpu-memory", type=byte_size, default=80 * 10**9, metavar="SIZE", help="default: 80GB")
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--bench", type=Path, metavar="FILE", help="rates of the hardware, as --measure wrote them")
    rates.add_argument("--measure", type=Path, metavar="FILE", help="run some steps on N ranks here, and write FILE")
    parser.add_argument("--json", action="store_true", help="an object instead of words")


def _smoke(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="YAML files or names of recipes (default: all)")


def _plot(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    schedules = kinds.add_parser("schedules", help="what changes over a run, and which noise levels it draws")
    _add_global_flags(schedules)
    _add_config(schedules)
    schedules.add_argument("--out", type=Path, default=Path("schedules.png"), help="default: schedules.png")


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="name=RUN", help="teacher=, scd= or sct= and its run folder")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write (default: report)")


def _quickstart(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipes", default="digits/quickstart", help="folder of teacher, scd and sct recipes")
    _add_overrides(parser)


def _models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "prepare": ("write a data set as shards and train its evaluation classifier", _prepare),
    "data": ("describe, verify or show a data set", _data),
    "train": ("train one run, or go on with it", _train),
    "evaluate": ("score the published snapshots of a run", _evaluate),
    "sample": ("draw images from the newest snapshot of a run", _sample),
    "export": ("write one EMA of a run as safetensors or a diffusers pipeline", _export),
    "edit": ("fill in, colour, sharpen or denoise your pictures with a consistency model", _edit),
    "import": ("make a run of published weights, running nothing of theirs", _import),
    "verify-published": ("draw and score published weights against the published figures", _verify_published),
    "times": ("search the best times for a student's several steps", _times),
    "doctor": ("check this machine, and a run description with its tangents if one is given", _doctor),
    "plan": ("tell whether a run fits on so many GPUs, and what to change if not", _plan),
    "bench": ("measure what training and sampling cost here", _bench),
    "sweep": ("train one description with several values of its keys, and compare", _sweep),
    "models": ("list the networks by name: parameters, multiply-adds, what they take", _models),
    "smoke": ("shrink recipes and run them through train, resume and sample on the CPU", _smoke),
    "plot": ("draw the schedules of a run description", _plot),
    "report": ("write report.html and figures.json about finished runs", _report),
    "quickstart": ("see the whole system work on real images, without a GPU in ten minutes", _quickstart),
}
