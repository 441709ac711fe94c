"""Runs in every test process before any test."""

from __future__ import annotations

import os

# One thread for each test process and for those that a test starts. They share the cores, and would stand in each
# other's way.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Triton reads this when it is first imported, its own library's functions included, and `torch.compile` imports it
    # too: whichever test comes first, the kernels are interpreted.
    os.environ["TRITON_INTERPRET"] = "1"
