"""Write figures and a report.html into the folder of a run, from its results.json."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's package, whatever else is installed

from snn_rl.cli.common import Parser, exit_status
from snn_rl.runs.report import write_report


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="the folder of a run, such as runs/cartpole/seed-0")
    options = parser.parse_args(argv)
    return exit_status(lambda: print(write_report(options.run_dir)))


if __name__ == "__main__":
    sys.exit(main())
