"""The run description: one typed tree, read from YAML. Units are in the names or the comments.

Counts of images accept the binary suffixes Ki, Mi and Gi ("8Mi"). Every cadence counts images, never steps or seconds,
so a change of batch size or a slow machine changes nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from data_pipeline.latents import CONVENTIONS, ConventionName
from models.attention import Backend
from models.registry import UNNAMED, NetworkOptions
from sctrain.config.base import Fraction, Images, NotNegative, Positive, Share, Strict, Width
from sctrain.config.objectives import Objective
from sctrain.parameterization import NetworkOutput, NoiseInput


def _named(network: Any) -> Any:
    """A mapping without a name is the first family's."""
    return {"name": UNNAMED, **network} if isinstance(network, dict) else network


Network = Annotated[Annotated[NetworkOptions, Field(discriminator="name")], BeforeValidator(_named)]


class StorageConfig(Strict):
    """How each process asks the store of remote data."""

    timeout_seconds: Positive = 30.0  # without one byte, after which a request has failed and is repeated
    retry_budget_seconds: NotNegative = 300.0  # without progress, after which a read has failed and the run stops
    parallel: Annotated[int, Field(ge=1)] = 32  # requests under way at once


class DataConfig(Strict):
    """Where the images are. Model space is (pixel/255 - mean) * sigma_data / std, of latents (x - mean) * ..."""

    url: str  # the folder that holds dataset.json
    split: str = "train"
    mean: tuple[float, ...] = (0.5,)  # per channel, or one for all; pixels scaled to [0, 1]
    std: tuple[Positive, ...] = (0.25,)  # 0.5 and 0.25 give the usual [-1, 1] where sigma_data is 0.5
    latents: ConventionName | None = None  # the published convention of latents; gives mean and std
    vae: Path | None = None  # folder of the auto-encoder that turns drawn latents into pictures
    workers: Annotated[int, Field(ge=0)] = 0  # processes per rank; 0 prefetches in a thread
    prefetch_batches: Annotated[int, Field(ge=1)] = 4
    shuffle_window: Annotated[int, Field(ge=1)] = 65_536  # samples over which neighbours are spread
    flip: bool = False  # mirror half of the images; the network is not told
    cache_folder: Path | None = None  # of remote data; None: this user's, among the machine's temporary files
    cache_bytes: Images = 16 * 2**30  # at most, over all data sets in that folder; 0 is off
    storage: StorageConfig = StorageConfig()
    max_corrupt_share: Share = 0.001  # of the samples read: so many are replaced if damaged, more stop the run
    on_lost_shard: Literal["stop", "replace"] = "stop"

    @model_validator(mode="before")
    @classmethod
    def _of_the_convention(cls, values: Any) -> Any:
        """Mean and std of the named convention, where they are not given."""
        known = CONVENTIONS.get(str(values.get("latents"))) if isinstance(values, dict) else None
        return values if known is None else {"mean": known.mean, "std": known.std, **values}

    @model_validator(mode="after")
    def _keep_the_convention(self) -> Self:
        if self.latents is not None:
            for key in ("mean", "std"):
                theirs, ours = getattr(CONVENTIONS[self.latents], key), getattr(self, key)
                if theirs != ours:
                    raise ValueError(f"{key} {list(ours)} is not that of latents {self.latents}; remove it")
        return self


class WeightsFrom(Strict):
    """Weights out of the published snapshots of another run."""

    run: Path
    images: Images | None = None  # which snapshot; None is the newest
    ema: Width  # reconstructed post hoc if not a track
    relearns: bool = False  # of start_from: the network was told, or said, something else; training has to change that


class GuideFrom(WeightsFrom):
    """A diffusion model away from which a teacher is guided, in place of the teacher itself without a label."""

    labels: Literal["none", "same"] = "none"  # what it is told: no label (EDM2), or the sample's (autoguidance)


class BatchConfig(Strict):
    """The global batch is the fact, the micro-batch the limit; accumulation is derived from them."""

    global_size: Annotated[int, Field(ge=1)]  # images per optimizer step, over all ranks
    micro_limit: Annotated[int, Field(ge=1)] = 2**31  # images per rank that fit at once


class OptimizerConfig(Strict):
    """Learning rate: linear ramp, then rate / sqrt(max(images / reference, 1)), then a linear end (EDM2 appendix B)."""

    name: Literal["adam", "radam"] = "adam"
    learning_rate: Positive = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    eps: Positive = 1e-8
    ramp_images: Images = 0
    reference_images: Images | None = None  # t_ref of EDM2; None keeps the rate constant after the ramp
    cooldown_images: Images = 0  # linear to zero over the last of these
    gradient_clip: Annotated[float, Field(ge=0)] = 0.0  # global norm; 0 is off


class EmaConfig(Strict):
    """Power-function EMA tracks by relative width (EDM2 section 3)."""

    widths: Annotated[tuple[Width, ...], Field(min_length=1)] = (0.05, 0.10)


class CadenceConfig(Strict):
    """How often, in images. Status lines show means since the last: let `checkpoint` be a multiple of `status`."""

    status: Images = 16_384
    snapshot: Images = 8 * 2**20
    checkpoint: Images = 8 * 2**20
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2


class GuardConfig(Strict):
    """What is dropped is counted and shown as guard/*; beyond these bounds the run goes back, or stops."""

    max_skipped_steps: Annotated[int, Field(ge=0)] = 20  # in a row, whatever the reason
    max_dropped_share: Share = 0.01  # of a status interval's samples, not finite
    spike_factor: Annotated[float, Field(ge=0)] = 10.0  # a step is dropped above this many medians; 0 is off
    spike_window: Annotated[int, Field(ge=16)] = 256  # steps whose median norm counts, and among which spikes do
    spikes_before_rollback: Annotated[int, Field(ge=0)] = 5  # within the window; 0 never goes back
    max_rollbacks: Annotated[int, Field(ge=0)] = 3  # to the last checkpoint, and past the samples since
    check_tangents: bool = True  # at the start: ten evaluations of the network, whose layers' outputs are all kept
    tangent_error: Positive = 0.01  # of a block's tangent against central differences, at the start
    precision_error: Positive = 0.1  # of the running precision's tangent against float32, at the start


class EvaluationConfig(Strict):
    """What a worker does with each published snapshot; the settings it was published with count."""

    samples: Annotated[int, Field(ge=2)] = 5000
    batch: Annotated[int, Field(ge=1)] = 250
    steps: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 2, 4)  # of a student
    ode_steps: Annotated[int, Field(ge=1)] = (
        32  # of Heun and Euler, for a diffusion model and for the teacher of a student
    )
    guidance: Annotated[float, Field(ge=0)] | None = None  # scale to draw at; None: 1, or the least that was learnt
    middle_time: Annotated[float, Field(gt=0, lt=1.57)] = 1.1  # t of the second step (sCM appendix G); cd: the nearest
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    ema: Annotated[tuple[Width, ...], Field(min_length=1)] = (0.05,)  # relative widths to score
    ode_teacher: WeightsFrom | None = None  # whose ODE solutions a student is compared with; None: its own teacher's
    claim_seconds: Positive = 120.0  # a claim without a heartbeat for this long may be taken over


class ComputeConfig(Strict):
    """How the mathematics is evaluated: cost and rounding depend on it, the objective does not."""

    tangent_engine: Literal["single_pass", "two_pass", "finite_difference"] = "single_pass"
    tangent_precision: Literal["value", "fp32"] = "value"  # fp32: tangents are wider than the values of a bf16 run
    attention: Backend = "auto"  # how attention with tangents is computed; auto: triton on a GPU, else blocked
    checkpointing: bool = False  # keep the blocks' inputs alone, and evaluate the blocks again in backward
    compile: bool = False  # torch.compile for blocks without tangents: the teacher, diffusion; with ZeRO-0 only


Place = Literal["device", "cpu", "disk"]


class OffloadConfig(Strict):
    """Where training keeps what a forward does not need. Arithmetic stays what it is; a step waits for the disk."""

    # Gradients, moments, and masters that are not the weights themselves; elsewhere than on the device in ZeRO-3 only.
    optimizer: Place = "device"
    ema: Place = "device"  # the tracks
    folder: Path | None = None  # on a fast disk of each machine; None: `offload` in run_dir
    checkpoint_copy: bool = True  # false: training waits for checkpoints, which take no second copy of the state


class RuntimeConfig(Strict):
    """How a run sits on the machine."""

    ranks: Annotated[int, Field(ge=1)] | None = None  # local ranks a plain `sctrain train` starts; None: GPUs, else 2
    threads: Annotated[int, Field(ge=1)] | None = None  # CPU threads per rank; None shares the cores evenly
    timeout_seconds: Positive = 600.0  # of every process group


class RunConfig(Strict):
    """A whole run."""

    name: str
    run_dir: Path
    seed: int = 0
    sigma_data: Positive = 0.5
    noise_input: NoiseInput = "t"  # what the network is told: log_sigma is EDM's ln(sigma) / 4; vp, ddpm: steps to 999
    network_output: NetworkOutput = "velocity"  # or noise: what the network says of its input (imported ones)
    licence: str = ""  # of weights and data that came from elsewhere, for the model card
    data: DataConfig
    network: Network
    objective: Objective
    teacher: WeightsFrom | None = None  # needed by distillations
    guide: GuideFrom | None = None  # of the teacher, a smaller or weaker one; None: it guides itself
    start_from: WeightsFrom | None = None  # initial weights; None: fresh, but a distillation starts from its teacher
    batch: BatchConfig
    budget_images: Images
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Literal["fp32", "bf16"] = "fp32"  # of weights and activations; masters, moments and EMA are fp32
    compute: ComputeConfig = ComputeConfig()
    ema: EmaConfig = EmaConfig()
    cadence: CadenceConfig = CadenceConfig()
    guard: GuardConfig = GuardConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    offload: OffloadConfig = OffloadConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)  # passed through; what our keys decide is refused here
