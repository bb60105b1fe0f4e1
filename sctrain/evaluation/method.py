"""How a run is drawn from: the samplers that fit what it was trained for, and what a user may choose among them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from sctrain.config import objectives
from sctrain.config.checks import guidance_mistake
from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.objectives.base import Progress
from sctrain.objectives.levels import Grid, ddim_times
from sctrain.objectives.progressive import steps_at
from sctrain.power_ema import MAX_WIDTH
from sctrain.processes import T_MAX, time_at, time_of
from sctrain.reporting.console import say
from sctrain.sampling import even_times, lcm_times, nearest_times, step_times

Sampler = Literal["consistency", "jumps", "heun", "euler", "dpm"]
ODE_SOLVERS: tuple[Sampler, ...] = ("heun", "euler", "dpm")
TITLES = {"heun": "Heun", "euler": "Euler", "dpm": "DPM-Solver++(2M)"}


class Method(NamedTuple):
    """A sampler and its number of steps; a student's times after the first one, where they are not the run's."""

    sampler: Sampler
    steps: int
    times: tuple[float, ...] | None = None
    gamma: float = 0.0  # of CTM: 0 is deterministic, 1 multistep sampling
    start: float = T_MAX  # of an ODE solver: the time of the noise; a student's is the end of its own process

    @property
    def name(self) -> str:
        return f"{self.sampler}-{self.steps}"

    @property
    def title(self) -> str:
        """In words."""
        if self.sampler in ODE_SOLVERS:
            return f"{TITLES[self.sampler]} ODE"
        return f"{self.steps} {'jump' if self.sampler == 'jumps' else 'step'}{'s' * (self.steps > 1)}"


def samplers(config: RunConfig) -> tuple[Sampler, ...]:
    """Those that fit what the run was trained for; the first is the default."""
    method = config.objective
    if method.samples_as == "diffusion":
        return ODE_SOLVERS
    return ("jumps",) if method.samples_as == "jumps" or method.told_the_end else ("consistency",)


def only_steps(config: RunConfig, images: int | None = None) -> int | None:
    """The one number of steps that a student of fixed jumps has learnt; None where any number will do.

    Progressive distillation halves it on the way: `images` is where the snapshot was taken, None the end of training.
    """
    method = config.objective
    if isinstance(method, objectives.ProgressiveDistillation):
        trained = config.budget_images if images is None else images  # the last image that it has seen decides
        return steps_at(Progress(max(trained - 1, 0), config.budget_images), method.first_steps, method.last_steps)
    if isinstance(method, objectives.ContinuousObjective) and method.told_the_end:
        return method.segments
    return None


def methods(config: RunConfig, images: int | None = None) -> list[Method]:
    """What a snapshot is scored with: Heun and Euler for a diffusion model, the configured steps for a student."""
    if samplers(config) == ODE_SOLVERS:
        return [Method("heun", config.evaluation.ode_steps), Method("euler", config.evaluation.ode_steps)]
    return student_methods(config, config.evaluation.steps, images)


def student_methods(config: RunConfig, steps: Sequence[int], images: int | None = None) -> list[Method]:
    """The numbers of steps among `steps` that the student can draw in; if it has learnt one alone, that one."""
    (sampler,) = samplers(config)
    fixed, most = only_steps(config, images), most_steps(config)
    if fixed is not None:
        return [Method(sampler, fixed)]
    return [Method(sampler, count) for count in dict.fromkeys(min(count, most or count) for count in steps)]


def most_steps(config: RunConfig) -> int | None:
    """As many as the times that the student was trained at, where these are few."""
    trained = trained_times(config)
    return None if trained is None else len(trained)


def trained_times(config: RunConfig) -> list[float] | None:
    """The only times that the network was trained at, descending; None where they are many.

    Those of CD's grid above the level at which it is the identity, and LCM's. Other grids are fine at last, and CTM's
    denoising term has all times.
    """
    method = config.objective
    if isinstance(method, objectives.LatentConsistency):
        times = ddim_times(method.ddim_steps)
    elif isinstance(method, objectives.ConsistencyDistillation):
        times = time_of(Grid.of(method).levels(method.levels), config.sigma_data)
    else:
        return None
    return times[1:].flip(0).tolist()


def start_time(config: RunConfig) -> float:
    """Where a student's trajectories start: at the end of the process that it was trained on."""
    method = config.objective
    if isinstance(method, objectives.LatentConsistency):
        return ddim_times(method.ddim_steps)[-1].item()
    sigma_max = getattr(method, "sigma_max", None)
    return T_MAX if sigma_max is None else time_at(sigma_max, config.sigma_data)


def anchor_time(config: RunConfig) -> float:
    """Where the consistency function is the identity."""
    return time_at(config.objective.anchor, config.sigma_data)


def times_of(config: RunConfig, method: Method) -> list[float]:
    """The times of a student's steps, descending; those of jumps end with 0.

    Where the network was trained at a few times alone they are the nearest of these.
    """
    if method.times is None and only_steps(config) is not None:
        return even_times(method.steps)
    times, trained = _wanted_times(config, method), trained_times(config)
    if trained is not None:
        return nearest_times(times, trained)
    return [*times, 0.0] if method.sampler == "jumps" else times


def _wanted_times(config: RunConfig, method: Method) -> list[float]:
    """The user's, else the method's own; without the 0 at which jumps end."""
    if method.times is not None:
        return [start_time(config), *method.times]
    if isinstance(config.objective, objectives.LatentConsistency):
        return lcm_times(config.objective.ddim_steps, method.steps)
    return step_times(method.steps, config.evaluation.middle_time, start_time(config), anchor_time(config))


def refuse_fixed_times(run: object, config: RunConfig, mend: str) -> None:
    """UserError where the number of steps decides the times: of diffusion models, and of fixed jumps."""
    method = config.objective
    if method.samples_as == "diffusion" or only_steps(config) is not None:
        raise UserError(f"{run} was trained by '{method.name}', whose times are given by --steps; {mend}")


def guidance_scale(run: object, config: RunConfig, asked: float | None) -> float:
    """The scale to draw at; None asks for the run's own. UserError if its network has not learnt it."""
    method, scales = config.objective, config.objective.guided_scales
    if asked is None:
        asked = config.evaluation.guidance
    if asked is None:
        return 1.0 if scales is None or scales.low <= 1 <= scales.high else scales.low
    mistake = guidance_mistake(method, asked)
    if mistake is not None:
        raise UserError(f"{run} {mistake}")
    return asked


def ema_width(config: RunConfig, asked: float | None) -> float:
    """The relative EMA width asked for by --ema, else the run's first to be scored."""
    if asked is not None and not 0 < asked < MAX_WIDTH:
        raise UserError(f"--ema {asked:g} is not a relative width between 0 and {MAX_WIDTH:.3f}")
    return config.evaluation.ema[0] if asked is None else asked


def chosen(
    run: object,
    config: RunConfig,
    images: int,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    times: Sequence[float] | None = None,
    gamma: float | None = None,
) -> Method:
    """What a user asks of the snapshot of `run` at `images`. UserError, which names the flag, for what does not fit."""
    fitting = samplers(config)
    found: Sampler | None = next((name for name in fitting if sampler in (None, name)), None)
    trained = f"{run} was trained by '{config.objective.name}'"
    if found is None:
        raise UserError(f"{trained}, which --sampler {sampler} does not fit; choose {' or '.join(fitting)}")
    if steps is not None and steps < 1:
        raise UserError("--steps must be at least 1")
    count = _steps(trained, config, images, steps, times)
    if gamma is not None and not isinstance(config.objective, objectives.TrajectoryObjective):
        raise UserError(f"{trained}, and --gamma is for 'ctm'; remove it")
    if gamma is not None and not 0 <= gamma <= 1:
        raise UserError(f"--gamma {gamma:g} is not between 0, deterministic, and 1, all noise anew")
    if times is not None:
        refuse_fixed_times(run, config, "remove --times")
        _check_times(config, times)
    method = Method(found, count, None if times is None else tuple(times), gamma or 0.0)
    if times is not None and trained_times(config) is not None:
        _say_if_moved(trained, times, times_of(config, method)[1:])
    return method


def _steps(trained: str, config: RunConfig, images: int, steps: int | None, times: Sequence[float] | None) -> int:
    """The number of steps that --steps and --times come to."""
    if times is not None and steps not in (None, len(times) + 1):
        raise UserError(f"--times gives {len(times)} times after the first, which are not the --steps {steps}")
    asked = steps if times is None else len(times) + 1
    if config.objective.samples_as == "diffusion":
        return asked or config.evaluation.ode_steps
    fixed, most = only_steps(config, images), most_steps(config)
    if fixed is not None and asked not in (None, fixed):
        raise UserError(f"{trained} to jump over {fixed} even parts, so it draws in --steps {fixed} alone")
    if most is not None and asked is not None and asked > most:
        raise UserError(f"{trained} at {most} times, so it draws in --steps {most} at most")
    return fixed or asked or 1


def _say_if_moved(trained: str, asked: Sequence[float], times: Sequence[float]) -> None:
    if any(abs(time - wish) > 5e-5 for time, wish in zip(times, asked, strict=True)):
        words = ", ".join(f"{time:.4f}" for time in times)
        say(f"{trained} at a few times alone: the nearest to --times are t = {words}")


def _check_times(config: RunConfig, times: Sequence[float]) -> None:
    start, end = start_time(config), anchor_time(config)
    around = [start, *times, end]
    if not all(before > after for before, after in zip(around, around[1:], strict=False)):  # nan compares as False
        raise UserError(f"--times must descend from below {start:.4f}, the first, to above {end:.4g}, in radians")
