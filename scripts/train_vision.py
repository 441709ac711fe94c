"""`snn-rl vision`: train classifiers of images. ``RECIPE --help`` lists every field of the recipe.

Under torchrun, on several GPUs or machines that share the run's folder (its status is 1 whatever ours is):
torchrun --nproc-per-node 8 scripts/train_vision.py vgg16-imagenet
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's package, whatever else is installed

from snn_rl.cli import vision


def main(argv: Sequence[str] | None = None) -> int:
    return vision.main(argv)


if __name__ == "__main__":
    sys.exit(main())
