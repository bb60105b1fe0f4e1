"""Everything that knows DeepSpeed. No other room imports it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed looks, and warns that it found no GPU
