"""Freed memory is kept where glibc does the keeping."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from snn_rl.cli.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    torch.ones(20_000_000)  # 80 MB
before = faults()
for _ in range(30):  # the heap may grow once more before it fits
    torch.ones(20_000_000)
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_large_blocks_come_back_without_page_faults() -> None:
    counts = [
        int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "leave")
    ]
    assert counts[0] < counts[1] / 10
