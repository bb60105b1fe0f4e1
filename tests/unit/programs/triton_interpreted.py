"""The Triton kernel in its interpreter, on the CPU: errors against float64, by case, as JSON on stdout.

A program of its own, because TRITON_INTERPRET has to be set before Triton is imported.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from models.attention import attention
from models.attention.kernel import triton_sweep
from models.tangent.dual import Dual

# length, head dimension, size of the logits
CASES = [(1, 16, 1.0), (33, 16, 80.0), (100, 64, 1.0), (64, 64, 80.0), (130, 72, 1.0), (40, 128, 80.0), (37, 256, 1.0)]


def plain(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm().clamp_min(1e-6)).item()


def main() -> None:
    torch.manual_seed(0)
    errors = {}
    for dtype in (torch.float32, torch.float16):
        for length, dim, logits in CASES:
            shape = (2, length, 3, dim)  # strided, as q, k and v come out of one linear layer
            q, k, v, *tangents = (torch.randn(shape).transpose(1, 2).to(dtype) for _ in range(6))
            primals = (logits * q, k, v)
            out, t_out, logsumexp = triton_sweep(*primals, *tangents)
            for alone, beside in zip(triton_sweep(*primals), (out, logsumexp), strict=True):
                assert torch.equal(alone, beside)
            assert out.dtype == t_out.dtype == dtype and logsumexp.dtype == torch.float32
            wide = [tuple(x.double() for x in xs) for xs in (primals, tangents)]
            exact, t_exact = torch.func.jvp(plain, *wide)
            scores = wide[0][0] @ wide[0][1].mT * dim**-0.5
            errors[f"{dtype} {length} x {dim}, logits {logits:g}"] = {
                "value": error(out, exact),
                "tangent": error(t_out, t_exact),
                "logsumexp": error(logsumexp, scores.logsumexp(-1)),
            }
    primals, tangents = torch.randn(2, 3, 2, 3, 50, 32)
    primals.requires_grad_()
    value = attention(*map(Dual, primals, tangents), "triton").value
    exact = plain(*primals)
    errors["gradient"] = error(
        *(torch.autograd.grad(x.square().sum(), primals)[0].to(dtype)
          for x, dtype in ((value, torch.float32), (exact, torch.float64)))
    )  # fmt: skip
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
