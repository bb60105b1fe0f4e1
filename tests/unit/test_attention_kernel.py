"""The Triton kernel without a GPU: interpreted, against float64; and compiled for the GPUs that labs have."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from models.attention import kernel  # noqa: E402

ROOT = Path(__file__).parents[2]
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SHARED_MEMORY = {80: 163, 90: 227}  # KiB of one block on A100 and H100


@pytest.fixture(scope="module")
def interpreted():
    program = ROOT / "tests/unit/programs/triton_interpreted.py"
    done = subprocess.run([sys.executable, program], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@pytest.mark.parametrize(("dtype", "bound"), [("torch.float32", 1e-5), ("torch.float16", 5e-3)])
def test_values_and_tangents_equal_float64(interpreted, dtype, bound):
    """Lengths that do not divide the blocks, head dimensions that are no power of two, logits of +-80."""
    cases = {name: errors for name, errors in interpreted.items() if name.startswith(dtype)}
    assert len(cases) == 7
    for name, errors in cases.items():
        assert max(errors["value"], errors["tangent"]) < bound and errors["logsumexp"] < 1e-6, name
    assert any(errors["tangent"] > 0 for errors in cases.values())


def test_gradient_of_the_value(interpreted):
    assert 0 < interpreted["gradient"] < 1e-5


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(torch.bfloat16, 64), (torch.bfloat16, 72), (torch.bfloat16, 256), (torch.float16, 32), (torch.float32, 64)],
)
def test_compiles_and_fits(dtype, dim, capability, tmp_path):
    """Triton needs no GPU to compile: shared memory within the chip's, and hardly a register spilled."""
    constants, launch = kernel.compile_options(dim, dtype)
    compiled = triton.compile(_source(dtype, constants), target=GPUTarget("cuda", capability, 32), options=launch)
    assert compiled.metadata.shared <= SHARED_MEMORY[capability] * 1024
    assert _spilled(compiled.asm["cubin"], tmp_path / "kernel.cubin") <= 64  # of 255 registers: 1,020


def _source(dtype, constants):
    function = kernel._sweep
    names = function.arg_names
    known = {name: f"*{TYPES[dtype]}" for name in ("q", "k", "v", "t_q", "t_k", "t_v", "out", "t_out")}
    known |= {"logsumexp": "*fp32", "scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: known.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.startswith(("stride", *"qkvt"))}
    places = {(names.index(name),): value for name, value in constants.items()}
    return ASTSource(fn=function, signature=signature, constexprs=places, attrs=aligned)


def _spilled(binary: bytes, file: Path) -> int:
    """Bytes of stack per thread, as NVIDIA's own tool (it comes with Triton) reads them from the machine code."""
    file.write_bytes(binary)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-res-usage", file], capture_output=True, check=True, text=True).stdout
    found = re.search(r"STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1])
