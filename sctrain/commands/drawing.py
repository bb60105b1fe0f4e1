"""What commands that draw from snapshots share."""

from collections.abc import Sequence
from pathlib import Path

import torch

from sctrain.errors import UserError

PIXELS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # endings of pictures of images
CURVES = (".png", ".svg", ".pdf")  # and of drawings


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def evaluations(count: int) -> str:
    """Of the network, in words."""
    return "one network evaluation" if count == 1 else f"{count} network evaluations"


def picture_file(flag: str, path: Path, endings: Sequence[str] = CURVES) -> None:
    """UserError unless the file that `flag` names ends like a picture that can be written."""
    if path.suffix.lower() not in endings:
        fitting = " or ".join(filter(None, (", ".join(endings[:-1]), endings[-1])))
        example = path.with_name(f"{path.stem}.png") if path.name else path / "picture.png"
        raise UserError(f"{flag} {path} does not end in {fitting}; write for example {example}")
