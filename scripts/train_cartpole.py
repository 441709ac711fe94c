"""Train CartPole agents. ``--help`` lists every field of the recipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's packages, whatever else is installed

from agents import RECIPES
from snn_rl.cli import train


def main(argv: Sequence[str] | None = None) -> int:
    return train.main(argv, recipes=RECIPES, default="cartpole")


if __name__ == "__main__":
    sys.exit(main())
