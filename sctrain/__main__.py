"""`python -m sctrain`, which is also how launchers start ranks."""

import os
import sys

from sctrain.cli import main

if __name__ == "__main__":
    code = main()
    if "RANK" in os.environ:
        # All is saved and closed. Interpreter shutdown races with the threads of gloo, and now and then aborts.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
