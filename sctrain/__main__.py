"""`python -m sctrain`, which is also what `deepspeed --module sctrain` and `torchrun -m sctrain` start."""

import sys

from sctrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
