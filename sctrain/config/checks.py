"""What no single key can know: contradictions between keys, refused before anything starts."""

import math

from sctrain.config.deepspeed import refuse_contradictions
from sctrain.config.objectives import (
    ConsistencyTraining,
    EarlyContinuous,
    EasyTuning,
    ImprovedTraining,
    LatentConsistency,
    Method,
    SimplifiedConsistency,
)
from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.parameterization import SMOOTH

# Neighbours may be compared in bf16 on so many noise levels: CD's grids of 18 and 40 and LCM's 50 times are coarse
# enough. The error that bf16 makes in f_t - f_s, root mean squares over sCD's digits network: 7% of the difference on
# 18 levels, 13% on 40, 24% among LCM's times and 23% on 80; but 43% on 151 and 260% on 1281 levels, and 101% in the
# last stage of ECT. (CTM's jumps are mostly longer than a level.)
BF16_LEVELS = 64


def check(config: RunConfig) -> None:
    """UserError for the first contradiction; it names the keys and the mend."""
    _check_teacher(config)
    _check_counts(config)
    refuse_contradictions(config)
    _check_early(config)
    _check_compute(config)
    _check_guidance(config)
    _check_parameterization(config)


def guidance_mistake(method: Method, scale: float) -> str | None:
    """Why a run of this method cannot be drawn from at this scale of guidance, to follow its name; None if it can."""
    if not 0 <= scale < math.inf:
        return f"cannot be guided at {scale:g}; 1 is no guidance, more follows the class more"
    scales = method.guided_scales
    if scales is not None:
        known = f"{scales.low:g} to {scales.high:g}"
        fits = scales.low <= scale <= scales.high
        return None if fits else f"learns guidance at scales from {known}, not {scale:g}; choose one of those"
    if scale == 1:
        return None
    if method.samples_as != "diffusion":
        return "was trained without guidance, so it draws at guidance 1 alone"
    return None if method.label_dropout else "was trained without label dropout, so it draws at guidance 1 alone"


def compared_levels(method: Method) -> float:
    """How many noise levels its range has at last, if the method's loss is a difference between neighbours; else 0."""
    match method:
        case ConsistencyTraining() | ImprovedTraining():
            return method.last_levels
        case EasyTuning():
            return method.q**method.stages  # the last gap is about t / q^stages
        case LatentConsistency():
            return method.ddim_steps
    return getattr(method, "levels", 0)


def _check_teacher(config: RunConfig) -> None:
    objective, name = config.objective, config.objective.name
    if objective.distils and config.teacher is None:
        raise UserError(f"the objective '{name}' distils a teacher; name one with 'teacher.run' and 'teacher.ema'")
    simplified = isinstance(objective, SimplifiedConsistency)
    if simplified and not objective.distils and objective.guidance is not None:
        raise UserError(f"the objective '{name}' has no teacher to guide; remove 'objective.guidance', or distil")
    if simplified and not objective.distils and objective.told_the_end:
        raise UserError("'objective.segments' are for scd: sct goes from its time to the data; remove it")
    if objective.scores is not None:
        if not objective.distils:
            raise UserError("'objective.vsd' compares the student with a teacher, which sct has none of: remove it")
        if objective.told_the_end:
            raise UserError("'objective.vsd' looks at images of one step, 'objective.segments' has several: remove one")
    if config.guide is not None and (not objective.distils or objective.guided_scales is None):
        raise UserError(
            f"'guide' guides a teacher, and the objective '{name}' has no 'guidance': give it, or remove it"
        )
    if name == "lcf" and config.start_from is None:
        raise UserError("the objective 'lcf' fine-tunes an LCM; name it with 'start_from.run' and 'start_from.ema'")
    if objective.target_teaches and config.start_from is not None:
        raise UserError(
            f"the objective '{name}' starts from its teacher and learns from what it started from, so 'start_from' "
            "would take the teacher's place; remove it, or name that run as 'teacher'"
        )
    if not objective.distils and config.teacher is not None:
        raise UserError(f"the objective '{name}' has no teacher; remove 'teacher', or distil with for example scd")


def _check_counts(config: RunConfig) -> None:
    if config.budget_images == 0:
        raise UserError("'budget_images' is 0, nothing would be trained; give for example 8Mi")
    for name in ("status", "snapshot", "checkpoint"):
        if getattr(config.cadence, name) == 0:
            raise UserError(f"'cadence.{name}' is 0; give the number of images between two of them, for example 64Ki")
    objective = config.objective
    if isinstance(objective, SimplifiedConsistency) and objective.tangent_warmup_images > config.budget_images:
        raise UserError(
            f"'objective.tangent_warmup_images' ({objective.tangent_warmup_images}) exceeds 'budget_images' "
            f"({config.budget_images}); shorten the warm-up or raise the budget"
        )


def _check_early(config: RunConfig) -> None:
    objective, stage = config.objective, config.deepspeed.get("zero_optimization", {}).get("stage")
    if not isinstance(objective, EarlyContinuous) or objective.form == "stop_gradient":
        return
    if not objective.distils:
        raise UserError(
            "'objective.form' full is for cd_continuous, for without a teacher's velocity its least is another "
            "function; set it to stop_gradient"
        )
    if stage != 0:
        raise UserError(
            "'objective.form' full is differentiated through the tangent, whose parameters ZeRO-3 has freed by then: "
            "set 'deepspeed.zero_optimization.stage' to 0, or the form to stop_gradient"
        )
    for key, set_to in (("precision", "fp32"), ("compute.checkpointing", False), ("compute.compile", False)):
        section, _, name = key.rpartition(".")
        if getattr(getattr(config, section) if section else config, name) != set_to:
            raise UserError(f"'objective.form' full needs '{key}' {str(set_to).lower()}; set it so, or stop_gradient")


def _check_compute(config: RunConfig) -> None:
    if config.precision == "bf16" and config.compute.tangent_engine == "finite_difference":
        raise UserError(
            "'compute.tangent_engine' finite_difference subtracts values that bf16 rounds to noise; "
            "set 'precision' to fp32, or the engine to single_pass"
        )
    levels = compared_levels(config.objective)
    if config.precision == "bf16" and levels > BF16_LEVELS:
        raise UserError(
            f"the objective '{config.objective.name}' ends with comparing neighbours among {levels:g} noise levels, "
            f"whose difference bf16 rounds away; set 'precision' to fp32 (up to {BF16_LEVELS} levels bf16 will do)"
        )
    if config.compute.compile and config.deepspeed.get("zero_optimization", {}).get("stage") != 0:
        raise UserError(
            "'compute.compile' cannot follow weights that ZeRO-3 gathers and frees: remove it, or set "
            "'deepspeed.zero_optimization.stage' to 0 where the network fits on every rank"
        )


def _check_guidance(config: RunConfig) -> None:
    scale = config.evaluation.guidance
    mistake = None if scale is None else guidance_mistake(config.objective, scale)
    if mistake is not None:
        raise UserError(f"'evaluation.guidance' does not fit: a run of this objective {mistake}")


def _check_parameterization(config: RunConfig) -> None:
    if not config.objective.has_tangents:
        return
    for key, fitting in (("noise_input", SMOOTH), ("network_output", ("velocity",))):
        if getattr(config, key) not in fitting:
            raise UserError(
                f"the objective '{config.objective.name}' differentiates the network, which cannot be done with "
                f"'{key}' {getattr(config, key)}: fine-tune it first to {fitting[0]}"
            )
