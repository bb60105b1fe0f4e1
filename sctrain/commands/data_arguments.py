"""The arguments of `sctrain prepare` and `sctrain data`, apart from their modules so that --help loads little."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
Adder = Callable[[argparse.ArgumentParser], None]


def add_prepare(parser: argparse.ArgumentParser, add_global_flags: Adder) -> None:
    """One sub-command per kind of source."""
    kinds = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    digits = kinds.add_parser("digits", help="scikit-learn's 1,797 scanned digits (8x8, 10 classes)")
    folder = kinds.add_parser("folder", help="a directory of class folders of ordinary image files")
    ilsvrc = kinds.add_parser("ilsvrc", help="ImageNet (ILSVRC2012) from its tar files, or from class folders")
    cifar10 = kinds.add_parser("cifar10", help="CIFAR-10 from its archive, the python or the binary version")
    lsun = kinds.add_parser("lsun", help="LSUN from the LMDB of one or more categories")
    shards = kinds.add_parser("shards", help="existing webdataset shards")
    folder.add_argument("src", type=Path, help="SRC/CLASS/name.jpg")
    ilsvrc.add_argument("src", type=Path, help="ILSVRC2012_img_train.tar, or a folder of class folders")
    cifar10.add_argument("src", type=Path, help="cifar-10-python.tar.gz or cifar-10-binary.tar.gz")
    lsun.add_argument("src", type=Path, nargs="+", help="folders such as bedroom_train_lmdb; each is a class")
    shards.add_argument("src", help="path or URL with braces: s3://bucket/train-{000000..000999}.tar; several with ::")
    for kind in (digits, folder, ilsvrc, cifar10, lsun, shards):
        kind.add_argument("dest", help="folder or s3:// URL to write; gone on with, or verified, if it exists")
    ilsvrc.add_argument("--val", type=Path, help="ILSVRC2012_img_val.tar or a folder of class folders: the test split")
    ilsvrc.add_argument("--val-labels", type=Path, help="ILSVRC2012_devkit_t12.tar.gz, or a text of one wnid per image")
    lsun.add_argument("--val", type=Path, nargs="+", default=[], help="bedroom_val_lmdb and the like: the test split")
    cifar10.add_argument("--one-class", action="store_true", help="all images in one class, for models without labels")
    shards.add_argument("--label-key", default="label", help="of the .json where there is no .cls (default: label)")
    shards.add_argument("--unlabelled", action="store_true", help="all images in one class")
    for kind, share in ((folder, 0.1), (shards, 0.0)):
        kind.add_argument("--test-share", type=float, default=share, help=f"of each class, held out (default: {share})")
    for kind in (folder, ilsvrc, lsun, shards):
        kind.add_argument("--resolution", type=int, required=True, help="side of the square images, in pixels")
        kind.add_argument("--skip-broken", action="store_true", help="leave unreadable images out instead of stopping")
    for kind in (folder, ilsvrc, cifar10, lsun, shards):
        _add_output(kind)
    for kind in (digits, folder, ilsvrc, cifar10, lsun, shards):
        _add_work(kind)
        add_global_flags(kind)


def _add_output(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("--format", choices=("png", "jpeg", "webp"), default="png", help="of the images (default: png)")
    kind.add_argument("--quality", type=int, default=95, help="of jpeg and webp, 1 to 100 (default: 95)")
    kind.add_argument("--samples-per-shard", type=count, default=4096, help="at most (default: 4096)")
    kind.add_argument("--shard-size", type=byte_size, default=2**28, help="a shard is closed there (default: 256MiB)")
    kind.add_argument("--seed", type=int, default=0, help="of the order of the samples (default: 0)")
    kind.add_argument("--limit", type=count, metavar="N", help="the first N images of each class only, for a trial")
    kind.add_argument("--encode", choices=("vae",), help="write latents, means and deviations, instead of images")
    kind.add_argument("--vae", type=Path, metavar="FOLDER", help="of Stable Diffusion's auto-encoder (sd-vae-ft-mse)")
    ranges = "what the encoder is shown: scm [-1, 1] (default), edm2 [0, 1]; sd as scm, for DiT's scale"
    kind.add_argument("--convention", choices=("scm", "edm2", "sd"), default="scm", help=ranges)
    mirrored = "the latents of mirrored training images too, for latents have no mirror images"
    kind.add_argument("--flip-variant", action="store_true", help=mirrored)
    kind.add_argument("--latent-type", choices=("float16", "float32"), default="float32", help="default: float32")


def _add_work(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("--verify", action="store_true", help="read everything again afterwards")
    classifier = "the small classifier that scores samples (default: if there is a test split that fits in memory)"
    kind.add_argument("--classifier", action=argparse.BooleanOptionalAction, help=classifier)
    _add_processes(kind)


def _add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=count, help="that decode side by side (default: one per core)")


def add_data(parser: argparse.ArgumentParser, add_global_flags: Adder) -> None:
    """What can be asked of a data set that is there."""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    stat = kinds.add_parser("stat", help="samples, classes, shards and sizes")
    verify = kinds.add_parser("verify", help="read every sample and compare it with the index")
    show = kinds.add_parser("show", help="draw a contact sheet")
    for kind in (stat, verify, show):
        add_global_flags(kind)
        kind.add_argument("url", help="folder or URL that holds dataset.json")
    for kind in (stat, verify):
        kind.add_argument("--json", action="store_true", help="an object instead of words")
    _add_processes(verify)
    show.add_argument("--out", type=Path, default=Path("sheet.png"), help="picture to write (default: sheet.png)")
    show.add_argument("--count", type=count, default=64, help="images, at most 1024 (default: 64)")
    show.add_argument("--class", dest="label", metavar="CLASS", help="number or name: images of this class only")
    show.add_argument("--split", default="train", help="default: train")
    show.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
    show.add_argument("--vae", type=Path, metavar="FOLDER", help="auto-encoder that decodes latents")


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def byte_size(text: str) -> int:
    """A size such as 256MiB, 1GB or 100000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip().lower())
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 256MiB or 1GB")
    return max(1, round(float(found[1]) * _UNITS[found[2] or ""]))
