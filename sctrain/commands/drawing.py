"""What commands that draw from snapshots share."""

import torch

from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.power_ema import MAX_WIDTH


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ema_width(config: RunConfig, asked: float | None) -> float:
    """The relative EMA width asked for by --ema, else the run's first to be scored."""
    if asked is not None and not 0 < asked < MAX_WIDTH:
        raise UserError(f"--ema {asked:g} is not a relative width between 0 and {MAX_WIDTH:.3f}")
    return config.evaluation.ema[0] if asked is None else asked
