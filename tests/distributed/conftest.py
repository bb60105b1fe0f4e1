"""Lets the distributed tests import their harness, worlds.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
