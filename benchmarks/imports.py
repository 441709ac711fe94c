"""How long importing the package takes, beside importing stable-baselines3 alone.

    python benchmarks/imports.py

Each statement runs in fresh processes, in turns, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

REPEATS = 5
STATEMENTS = ("import stable_baselines3", "import snn_rl", "import snn_rl._public", "import snn_rl.vision")


def seconds(statement: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - began


def main() -> None:
    taken: dict[str, list[float]] = {statement: [] for statement in ("pass", *STATEMENTS)}
    for _ in range(REPEATS + 1):
        for statement, found in taken.items():
            found.append(seconds(statement))
    bare, *medians = (statistics.median(found[1:]) for found in taken.values())  # the first fills the file cache
    for statement, median in zip(STATEMENTS, medians, strict=True):
        print(f"{statement:28} {median - bare:5.2f} s  {(median - bare) / (medians[0] - bare):.2f} of SB3 alone")


if __name__ == "__main__":
    main()
