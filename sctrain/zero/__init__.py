"""Everything that knows DeepSpeed. No other room imports it."""

import os
import warnings

import torch

warnings.filterwarnings("ignore", r".*torch\.jit", category=FutureWarning)  # DeepSpeed's, at every start
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed looks, and warns that it found no GPU
