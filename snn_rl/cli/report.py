"""Write figures and a report.html into the folder of a run, from its results.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from snn_rl.cli.extras import need
from snn_rl.cli.parser import Parser
from snn_rl.cli.status import exit_status


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    parser = Parser(__doc__, prog=prog)
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="the folder of a run, such as runs/cartpole/seed-0")
    options = parser.parse_args(argv)
    return exit_status(lambda: _write(options.run_dir))


def _write(run_dir: Path) -> None:
    need("scripts", "matplotlib")
    from snn_rl.runs.report import write_report

    print(write_report(run_dir))
