"""Everything of DeepSpeed (and one thing of torch) that its makers do not promise to keep, in this one file.

`check_deepspeed` refuses versions that these lines were not read against, and each of them asserts what it relies on;
`tests/unit/test_internals.py` and the mutation in `tests/distributed/test_zero_tangents.py` have to fail.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from importlib.metadata import version
from typing import Any

import deepspeed
import deepspeed.ops
import deepspeed.runtime.compiler as runtime_compiler
import torch
import torch.distributed.distributed_c10d as c10d
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups
from torch import Tensor, nn

from models.tangent.dual import Dual
from sctrain.errors import UserError

_OLDEST, _TOO_NEW = (0, 19, 8), (0, 20)
_HOOKS = ("pre_bwd_fn", "post_bwd_fn")


def check_deepspeed(found: str | None = None) -> None:
    """UserError for a DeepSpeed that this file does not know."""
    found = found or version("deepspeed")
    numbers = tuple(int(part) for part in found.split("+")[0].split(".") if part.isdigit())
    if not _OLDEST <= numbers < _TOO_NEW:
        wanted = f"deepspeed>={'.'.join(map(str, _OLDEST))},<{'.'.join(map(str, _TOO_NEW))}"
        raise UserError(f"DeepSpeed {found} is not one that sctrain knows: run `pip install '{wanted}'`")


def set_default_timeout(timeout: timedelta) -> None:
    """Of process groups made without one: those that ZeRO really uses, 30 minutes on gloo otherwise."""
    assert hasattr(c10d, "default_pg_timeout"), "torch keeps the default time-out of process groups elsewhere now"
    c10d.default_pg_timeout = timeout


def without_shared_memory_op() -> None:
    """Do without DeepSpeed's shared-memory op.

    It serves tensor-parallel inference only, yet every CPU start compiles it for half a minute and each rank leaves
    69 MB in /dev/shm.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def without_compiled_muon() -> None:
    """Import DeepSpeed's Muon without compiling it.

    It is imported for whatever optimizer there is, and its decorators load torch's compiler: seconds of every start.
    """
    compile_later = runtime_compiler.compile
    runtime_compiler.compile = lambda: lambda function: function
    try:
        import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        runtime_compiler.compile = compile_later


@contextmanager
def sharing_masters() -> Iterator[None]:
    """Engines that are made inside step the very float32 weights that they compute with, where they do.

    DeepSpeed means to, but compares a device with a device's name; so it keeps a second copy of all shards.
    """
    accelerator: Any = get_accelerator()
    device = torch.device(accelerator.current_device_name())
    accelerator.current_device_name = lambda: device
    try:
        yield
    finally:
        del accelerator.current_device_name


class _OnValues:
    """Applies an identity autograd.Function to the value of a Dual, whose tangent passes by."""

    def __init__(self, function: type[torch.autograd.Function]):
        self._function = function

    def apply(self, x: Tensor) -> Tensor:
        if isinstance(x, Dual):
            return Dual(self._function.apply(x.value), x.tangent)
        return self._function.apply(x)


def carry_tangents(module: nn.Module) -> None:
    """Let Duals pass ZeRO-3's hooks of a module that DeepSpeed has already wrapped.

    It applies identity autograd.Functions, which trigger the gathering of parameters in backward, to every module's
    inputs and outputs.
    """
    for submodule in module.modules():
        for name in _HOOKS:
            hook = vars(submodule).get(name)
            assert isinstance(hook, type) and issubclass(hook, torch.autograd.Function), (
                f"DeepSpeed no longer sets {name} on modules: tangents need a new way through ZeRO-3"
            )
            setattr(submodule, name, _OnValues(hook))


class Partitioner:
    """Makes ZeRO-3 parameters one at a time, as `deepspeed.zero.Init` does for every module that is constructed."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype, device: torch.device):
        in_machine = None  # hpZ's process group; it may be made once, and who knows it has hpZ
        if config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1:
            in_machine = groups._get_zero_param_intra_parallel_group()
        self._init = deepspeed.zero.Init(
            config_dict_or_path=copy.deepcopy(config), dtype=dtype, zero_param_parallel_group=in_machine
        )
        self._dtype, self._device = dtype, device

    def blank(self, shape: tuple[int, ...], *, postponed: bool) -> nn.Parameter:
        """A partitioned parameter of zeros, in a moment's memory of the whole.

        `postponed` is for networks that get an optimizer: DeepSpeed then moves all shards into one buffer, and until it
        does they take no memory.
        """
        parameter = nn.Parameter(torch.empty(shape, dtype=self._dtype, device=self._device))
        self._init._convert_to_deepspeed_param(parameter)
        parameter.partition()
        shard = parameter.ds_tensor
        assert parameter.numel() == 0 and shard.dim() == 1, "DeepSpeed partitions parameters in another way now"
        shard.data = shard.new_zeros(1).expand(shard.numel()) if postponed else shard.zero_()
        return parameter


class Zero3:
    """The ZeRO-3 optimizer behind a partitioned module."""

    def __init__(self, module: nn.Module):
        self._zero = next(module.parameters())._z3_optimizer
        for flat in self.flat_masters:
            if not self._zero.offload_optimizer:
                flat.grad = None  # what DeepSpeed left there to size up memory

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The one that steps the flat fp32 shards, with their state."""
        return self._zero.optimizer

    @property
    def flat_masters(self) -> list[Tensor]:
        return self._zero.fp32_partitioned_groups_flat

    def move(self, hold: Callable[[Tensor], Tensor]) -> None:
        """Keep where `hold` puts them: gradients, and masters that are not the weights themselves."""
        for master, weights in zip(self.flat_masters, self._zero.fp16_partitioned_groups_flat, strict=True):
            if master.data_ptr() != weights.data_ptr():
                master.data = hold(master.data)
            if master.grad is not None:
                master.grad = hold(master.grad)
        gradients = hold(self._zero.grad_partitions_flat_buffer)
        self._zero.grad_partitions_flat_buffer = gradients
        views = self._zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        assert sum(view.numel() for view in views.values()) == gradients.numel(), (
            "gradients are kept in another way now"
        )
        for key, view in views.items():
            views[key] = gradients.narrow(0, view.storage_offset(), view.numel())

    def place(self, parameter: nn.Parameter) -> tuple[int, slice]:
        """Where this rank's piece of a parameter lies in `flat_masters`, and in moments alike; with its padding."""
        group, start, numel = self._zero.grad_position[self._zero.get_param_id(parameter)]
        return group, slice(start, start + numel)

    @property
    def gradient_norm(self) -> float:
        """Global norm before clipping, of the step under way: known before the optimizer is called."""
        return float(self._zero._global_grad_norm)

    def drop_whole_copies(self) -> None:
        """Of the small parameters that stay gathered between steps."""
        self._zero.checkpoint_event_prologue()

    def gather_whole_copies(self) -> None:
        self._zero.checkpoint_event_epilogue()

    def step_flat_masters(self) -> None:
        """Let the optimizer take its step with the gradients that the flat masters have."""
        for index in range(len(self.flat_masters)):
            self._zero._optimizer_step(index)


def compute_shard(parameter: nn.Parameter) -> Tensor:
    """This rank's piece of a ZeRO-3 parameter in the precision of the forward, padded: what gathering reads."""
    return parameter.ds_tensor


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of a partitioned parameter."""
    return tuple(parameter.ds_shape)


def release_shards(engine: Any) -> None:
    """Free a frozen ZeRO-3 engine, which DeepSpeed's list of root modules would keep for ever."""
    engine.destroy()
    for parameter in engine.module.parameters():
        parameter.ds_tensor.data = parameter.ds_tensor.new_empty(0)
