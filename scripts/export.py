"""`snn-rl export`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's packages, whatever else is installed

from snn_rl.cli import export


def main(argv: Sequence[str] | None = None) -> int:
    return export.main(argv)


if __name__ == "__main__":
    sys.exit(main())
