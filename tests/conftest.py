"""Runs in every test process before any test."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Triton reads this when it is first imported, its own library's functions included, and `torch.compile` imports it
    # too: whichever test comes first, the kernels are interpreted.
    os.environ["TRITON_INTERPRET"] = "1"
