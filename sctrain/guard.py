"""Rules that keep a sick step out of the weights, and a sick run from going on. What they count is shown as guard/*."""

from __future__ import annotations

import statistics

from sctrain.config.schema import GuardConfig
from sctrain.errors import UserError
from sctrain.record import Record
from sctrain.self_check import Verdict

LEAST_HISTORY = 16  # steps before a median means anything


def median_norm(record: Record) -> float | None:
    """Of the gradient's norm over the last steps taken; None while there are too few."""
    return statistics.median(record.norms) if len(record.norms) >= LEAST_HISTORY else None


def is_spike(norm: float, record: Record, config: GuardConfig) -> bool:
    """Whether a norm is so far above the median that its step would do harm."""
    median = median_norm(record)
    return config.spike_factor > 0 and median is not None and norm > config.spike_factor * median


def must_roll_back(record: Record, config: GuardConfig) -> bool:
    """Whether so many of the last steps were spikes that the weights must be to blame."""
    return 0 < config.spikes_before_rollback <= len(record.recent_spikes)


def check(record: Record, config: GuardConfig, run_dir: object) -> None:
    """UserError for a run in which too many steps in a row were dropped, or that keeps falling back."""
    if record.skipped_in_row > config.max_skipped_steps:
        raise UserError(
            f"{record.skipped_in_row} steps in a row were dropped, at {record.images} images, for a gradient that was "
            "non-finite or far above the median: lower optimizer.learning_rate or raise objective.tangent_constant, "
            f"then repeat the command to go on from the last checkpoint in {run_dir} (guard.max_skipped_steps sets "
            "this limit)"
        )
    if must_roll_back(record, config) and record.rollbacks >= config.max_rollbacks:
        raise UserError(
            f"the gradient's norm spikes again at {record.images} images after {record.rollbacks} rollbacks: lower "
            f"optimizer.learning_rate, then repeat the command to go on from the last checkpoint in {run_dir} "
            "(guard.max_rollbacks sets this limit)"
        )


def check_dropped(share: float, images: int, config: GuardConfig) -> None:
    """UserError if too many samples of the last status interval had a tangent that was not finite."""
    if share > config.max_dropped_share:
        raise UserError(
            f"{share:.1%} of the samples before {images} images had a tangent or loss that was not finite: set "
            "compute.tangent_precision to fp32 or precision to fp32, or lower optimizer.learning_rate "
            "(guard.max_dropped_share sets this limit)"
        )


def check_tangents(verdict: Verdict, config: GuardConfig) -> None:
    """UserError if a tangent is wrong, or too coarse in the running precision."""
    name, error = verdict.worst
    if error > config.tangent_error:
        raise UserError(
            f"the tangent of {name} differs by {error:.1e} from central differences: set compute.attention to "
            "reference to see whether its kernel is to blame (guard.tangent_error sets this limit)"
        )
    for name, error in verdict.running.items():
        if error is not None and error > config.precision_error:
            raise UserError(
                f"the tangent in the {name} differs by {error:.1e} from the one in float32: set "
                "compute.tangent_precision or precision to fp32 (guard.precision_error sets this limit)"
            )
