"""What the unit tests share."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the closed forms in gaussian.py
torch.set_num_threads(1)  # tensors are so small that threads only wait for each other


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
