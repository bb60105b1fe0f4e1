"""What the unit tests share."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the closed forms in gaussian.py


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
