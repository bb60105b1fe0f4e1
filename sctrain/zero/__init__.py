"""Everything that knows DeepSpeed. No other room imports it."""

import os
import warnings

import torch

# DeepSpeed's own calls: at every start, and (torch >= 2.14) at every collective of every step.
warnings.filterwarnings("ignore", r".*torch\.(jit|distributed)\..* is deprecated", category=FutureWarning)
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed looks, and warns that it found no GPU
