"""The methods by name, each with its paper's defaults (those of CIFAR-10 where a paper has several)."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from sctrain.config.base import Fraction, Images, NotNegative, Positive, Share, Strict

# Float32 times tell neighbours near sigma = 80 apart only roughly beyond these bounds: their gap is off by 3%
# on 8,192 levels, 20% on 65,536; by 8% after 12 doublings of ECT, 25% after 14, and after 16 some gaps are 0.
Levels = Annotated[int, Field(ge=2, le=8192)]
MOST_DOUBLINGS = 12
DistanceName = Literal["l2", "l1", "lpips", "pseudo_huber", "huber"]


class TimeDistribution(Strict):
    """ln sigma ~ N(mean, std^2), t = arctan(sigma / sigma_data) (EDM section 5, sCM section 4.2)."""

    mean: float = -1.0
    std: Positive = 1.4


class GuidanceRange(Strict):
    """The student learns to follow its teacher at any scale of guidance in [low, high]; 1 is no guidance."""

    low: NotNegative = 1.0
    high: Positive = 2.0

    @model_validator(mode="after")
    def _ordered(self) -> GuidanceRange:
        if self.low > self.high:
            raise ValueError(f"low {self.low} exceeds high {self.high}; exchange them")
        return self


class Distance(Strict):
    """How far two images are from each other. `lpips` reads its backbone from `weights`, a file of yours."""

    name: DistanceName = "l2"
    constant: NotNegative | None = None  # c of the Huber metrics; None: 0.00054 sqrt(D), for huber 0.001
    weights: str | None = None  # VGG16 of torchvision, for lpips

    @model_validator(mode="after")
    def _its_own_keys(self) -> Distance:
        if self.name == "lpips" and self.weights is None:
            raise ValueError("lpips needs 'weights', the file of torchvision's VGG16; nothing is downloaded")
        if self.name != "lpips" and self.weights is not None:
            raise ValueError(f"'weights' are for lpips, {self.name} has none; remove them")
        if self.constant is not None and "huber" not in self.name:
            raise ValueError(f"'constant' is for pseudo_huber and huber, {self.name} has none; remove it")
        return self


class Method(Strict):
    """What any method is asked."""

    samples_as: ClassVar[Literal["diffusion", "consistency", "jumps"]] = "consistency"
    target_teaches: ClassVar[bool] = False  # the target network is a teacher, whose units never drop out
    distillations: ClassVar[tuple[str, ...]] = ()  # those of its names that learn from a teacher
    label_dropout: Share = 0.0

    @property
    def distils(self) -> bool:
        """Whether it learns from a teacher, a diffusion model."""
        return getattr(self, "name", None) in self.distillations

    @property
    def guided_scales(self) -> GuidanceRange | None:
        """The scales of guidance that its network is told, None if it is told none."""
        return getattr(self, "guidance", None)

    @property
    def scores(self) -> ScoreDistillation | None:
        """What a fake score that is trained beside its network does, None if there is none."""
        return getattr(self, "vsd", None)

    @property
    def discriminates(self) -> Adversary | None:
        """What a discriminator that is trained beside its network does, None if there is none."""
        return getattr(self, "adversary", None)

    @property
    def anchor(self) -> float:
        """The noise level at which its consistency function is the identity."""
        return 0.0

    @property
    def told_the_end(self) -> bool:
        """Whether its network is told where a jump ends."""
        return False

    @property
    def has_target(self) -> bool:
        """Whether there is a target network."""
        return getattr(self, "target_decay", 0.0) > 0

    @property
    def has_tangents(self) -> bool:
        """Whether its network is differentiated along a trajectory; what it starts with is then verified."""
        return False

    @property
    def records_tangents(self) -> bool:
        """Whether its loss is differentiated through those tangents."""
        return False


class Diffusion(Method):
    """One loss under two names with other defaults: the error of the velocity, E[||F - v / sigma_d||^2 / D]."""

    samples_as: ClassVar = "diffusion"
    times: TimeDistribution
    learned_weighting: bool  # e^w L - w of EDM2 section 2.2; without it every time counts as it is drawn
    augmentation: Share = 0.0  # EDM's non-leaky one: the probability of each transformation, told to the network


class TrigFlowObjective(Diffusion):
    """TrigFlow diffusion: the teacher of sCM (section 3)."""

    name: Literal["trigflow"] = "trigflow"
    times: TimeDistribution = TimeDistribution()
    label_dropout: Share = 0.1
    learned_weighting: bool = True


class EdmObjective(Diffusion):
    """EDM's diffusion (Karras et al. 2022): lambda(sigma) ||D - x0||^2 is the error of the velocity."""

    name: Literal["edm"]
    times: TimeDistribution = TimeDistribution(mean=-1.2, std=1.2)
    learned_weighting: bool = False


class ProgressiveDistillation(Method):
    """Student of N steps learns two DDIM steps of its teacher; N halves in equal parts of the budget (PD section 3)."""

    samples_as: ClassVar = "jumps"
    target_teaches: ClassVar = True
    distillations: ClassVar = ("pd",)
    name: Literal["pd"]
    first_steps: Annotated[int, Field(ge=1)] = 1024
    last_steps: Annotated[int, Field(ge=1)] = 1
    weighting: Literal["snr_plus_one", "truncated_snr"] = "truncated_snr"

    @model_validator(mode="after")
    def _halves(self) -> ProgressiveDistillation:
        ratio = self.first_steps / self.last_steps
        if ratio < 1 or ratio.is_integer() is False or int(ratio) & (int(ratio) - 1):
            raise ValueError(
                f"first_steps {self.first_steps} does not halve down to last_steps {self.last_steps}; "
                f"let it be a power of two times {self.last_steps}, for example {8 * self.last_steps}"
            )
        return self

    @property
    def has_target(self) -> bool:
        return True


class OnGrid(Method):
    """EDM's noise levels."""

    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    rho: Positive = 7.0

    @model_validator(mode="after")
    def _ordered(self) -> OnGrid:
        low, high = self.sigma_min, self.sigma_max
        if low == high:
            raise ValueError(f"sigma_min and sigma_max are both {low}; the second must be greater")
        if low > high:
            raise ValueError(f"sigma_min {low} is not below sigma_max {high}; exchange them")
        return self


class Anchored(OnGrid):
    """On EDM's noise levels, with a consistency function that is the identity at the least of them."""

    @property
    def anchor(self) -> float:
        return self.sigma_min


class ConsistencyDistillation(Anchored):
    """CD (CM 2023 algorithm 2)."""

    distillations: ClassVar = ("cd",)
    name: Literal["cd"]
    levels: Levels = 18  # N
    solver: Literal["heun", "euler"] = "heun"
    metric: Distance = Distance()
    target_decay: Fraction = 0.0  # mu


class ConsistencyTraining(Anchored):
    """CT (CM 2023 algorithm 3): N(k) from `first_levels` to about `last_levels`, mu(k) from `first_decay`."""

    name: Literal["ct"]
    first_levels: Levels = 2  # s0
    last_levels: Levels = 150  # s1
    metric: Distance = Distance()
    first_decay: Fraction = 0.9  # mu0

    @model_validator(mode="after")
    def _grows(self) -> ConsistencyTraining:
        _refuse_fewer(self.first_levels, self.last_levels)
        return self

    @property
    def has_target(self) -> bool:
        return self.first_decay > 0


class EarlyContinuous(Anchored):
    """The continuous-time losses of CM 2023 (appendix B), l2; `full` differentiates through the tangent (theorem 3)."""

    distillations: ClassVar = ("cd_continuous",)
    name: Literal["ct_continuous", "cd_continuous"]
    form: Literal["stop_gradient", "full"] = "stop_gradient"

    @property
    def has_tangents(self) -> bool:
        return True

    @property
    def records_tangents(self) -> bool:
        return self.form == "full"


class ImprovedTraining(Anchored):
    """Improved consistency training, iCT (Song & Dhariwal 2023)."""

    name: Literal["ict"]
    first_levels: Levels = 10  # s0
    last_levels: Levels = 1280  # s1
    times: TimeDistribution = TimeDistribution(mean=-1.1, std=2.0)
    metric: Distance = Distance(name="pseudo_huber")

    @model_validator(mode="after")
    def _grows(self) -> ImprovedTraining:
        _refuse_fewer(self.first_levels, self.last_levels)
        return self


def _refuse_fewer(first: int, last: int) -> None:
    if last < first:
        raise ValueError(f"last_levels {last} is below first_levels {first}; exchange them")


class EasyTuning(Method):
    """ECT (Geng et al. 2024): r(t) = t (1 - (1 + k sigmoid(-b t)) / q^(stage + 1)), at least 0."""

    name: Literal["ect"]
    times: TimeDistribution = TimeDistribution(mean=-1.1, std=2.0)
    stages: Annotated[int, Field(ge=1)] = 8
    q: Annotated[float, Field(gt=1)] = 2.0
    k: NotNegative = 8.0
    b: NotNegative = 1.0
    metric: Distance = Distance(name="pseudo_huber", constant=0.0)
    weighting: Literal["inverse_gap", "edm"] = "inverse_gap"  # 1 / (t - r), or 1 / c_out(t)^2 as on ImageNet

    @model_validator(mode="after")
    def _resolved(self) -> EasyTuning:
        if self.stages * math.log2(self.q) > MOST_DOUBLINGS + 1e-9:
            raise ValueError(
                f"q {self.q:g} over {self.stages} stages ends with gaps of about t / {self.q**self.stages:.3g}, which "
                f"float32 cannot resolve; lower one of them, to at most {2**MOST_DOUBLINGS} = q^stages"
            )
        return self


class SimplifiedConsistency(Method):
    """What sCM's methods share (sections 4 and 5): the tangent, normalised, with adaptive weighting."""

    times: TimeDistribution = TimeDistribution()
    tangent_normalization: Literal["l2", "rms"] = "l2"  # which norm `tangent_constant` is compared with
    tangent_constant: NotNegative = 0.1  # c in g / (||g|| + c)
    tangent_warmup_images: Images = 0  # r rises linearly from 0 to 1 over these
    guidance: GuidanceRange | None = None  # of a teacher whose labels were dropped: classifier-free guidance


class ScoreDistillation(Strict):
    """Variational score distillation beside sCD (sCM appendix D): a fake score is trained with the student."""

    factor: Positive = 1.0  # lambda, of its loss
    times: TimeDistribution = TimeDistribution(mean=0.4, std=2.0)  # at which the two scores are compared
    fake_times: TimeDistribution = TimeDistribution(mean=-0.8, std=1.6)  # at which the fake one is trained
    rate_factor: Positive = 1.0  # its learning rate is so many times the student's


class ContinuousObjective(SimplifiedConsistency):
    """In continuous time: `sct` from data alone, `scd` from a teacher."""

    distillations: ClassVar = ("scd",)
    name: Literal["sct", "scd"]
    segments: Annotated[int, Field(ge=1)] = 1  # of scd: it jumps to the lower end of its segment, M of them
    vsd: ScoreDistillation | None = None  # of scd: a second loss, and a second network that is trained

    @property
    def told_the_end(self) -> bool:
        return self.segments > 1

    @property
    def has_tangents(self) -> bool:
        return True


class DiscreteTwin(SimplifiedConsistency, OnGrid):
    """The discrete twins of sCM (appendix E), on N levels of EDM's grid and the clean image."""

    distillations: ClassVar = ("scd_discrete",)
    name: Literal["sct_discrete", "scd_discrete"]
    levels: Levels = 1024  # N


class Adversary(Strict):
    """A discriminator, trained beside the network on whether images are real. It sits whole on every rank."""

    after: Share = 0.5  # of the budget, without it
    width: Annotated[int, Field(ge=4)] = 32  # channels of its first layer
    learning_rate: Positive = 2e-3


class TrajectoryObjective(OnGrid):
    """CTM (Kim et al. 2023): jumps from any time to any earlier one, matched after steps of a teacher; and denoising.

    Soft matching lets the teacher go from t to some u and a jump from there to s; global has u = s, local u one level
    below t. The paper's metric is lpips.
    """

    samples_as: ClassVar = "jumps"
    distillations: ClassVar = ("ctm",)
    name: Literal["ctm"]
    levels: Levels = 18  # N; 0 is one more
    matching: Literal["soft", "global", "local"] = "soft"
    teacher_steps: Annotated[int, Field(ge=1)] | None = None  # Heun, U{1 .. this} of them each time; None: N
    jump_by: Literal["student", "target"] = "student"  # who jumps from u to s: sg(theta), or theta-
    metric: Distance = Distance()
    target_decay: Fraction = 0.999  # 0: the target is the student after every step
    denoising: NotNegative = 1.0  # factor of the denoising term after balancing; 0 leaves it out
    times: TimeDistribution = TimeDistribution(mean=-1.2, std=1.2)  # of the denoising term's lower half
    adversary: Adversary | None = None

    @model_validator(mode="after")
    def _on_the_grid(self) -> TrajectoryObjective:
        if self.teacher_steps is not None and self.teacher_steps > self.levels:
            raise ValueError(f"teacher_steps {self.teacher_steps} exceeds levels {self.levels}, which is the most")
        return self

    @property
    def told_the_end(self) -> bool:
        return True

    @property
    def has_target(self) -> bool:
        return True


class LatentConsistency(Method):
    """LCM (Luo et al. 2023): `lcm` distils a guided teacher over skipped DDIM steps, `lcf` fine-tunes without one.

    `metric` and `target_decay` are the defaults of the public diffusers script; the range of guidance is the paper's:
    the script's is w in [5, 15].
    """

    distillations: ClassVar = ("lcm",)
    name: Literal["lcm", "lcf"]
    ddim_steps: Annotated[int, Field(ge=2, le=1000)] = 50  # among the process's 1000
    guidance: GuidanceRange = GuidanceRange(low=3.0, high=15.0)  # scale 1 + w of the paper's w in [2, 14]
    metric: Distance = Distance(name="huber")
    target_decay: Fraction = 0.95


Objective = Annotated[
    TrigFlowObjective
    | EdmObjective
    | ProgressiveDistillation
    | ConsistencyDistillation
    | ConsistencyTraining
    | EarlyContinuous
    | ImprovedTraining
    | EasyTuning
    | ContinuousObjective
    | DiscreteTwin
    | TrajectoryObjective
    | LatentConsistency,
    Field(discriminator="name"),
]
