"""Train each recipe with each variant and each seed, on one machine or many, and write one table of all results.

Run the same command again to resume a sweep that was stopped. docs/sweep.md says more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's agents, whatever else is installed

from agents import RECIPES
from snn_rl.cli.common import RESUMES, Parser, exit_status
from snn_rl.cli.sweep import Job, check_installed, cluster, jobs, markdown, sweep


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    return exit_status(lambda: _run(options), RESUMES)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help=f"one or more of {', '.join(RECIPES)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="seeds of the runs")
    parser.add_argument(
        "--set",
        dest="overrides",
        nargs="*",
        action="append",
        metavar="FIELD=VALUE",
        help="a variant: new values of the recipe's fields; give --set again for each variant, and --set without a "
        "value for the recipe as it is (default: the recipe as it is)",
    )
    parser.add_argument("--root", type=Path, metavar="DIR", default=Path("runs", "sweep"), help="folder of the sweep")
    parser.add_argument("--address", help="address of a Ray cluster: auto or HOST:PORT (default: this machine alone)")
    parser.add_argument("--cpus-per-run", type=int, metavar="N", default=1, help="CPUs for each run")
    parser.add_argument(
        "--gpus-per-run", type=float, metavar="N", default=0.0, help="GPUs for each run; 0.25: four runs share one"
    )
    parser.add_argument("--smoke", action="store_true", help="take seconds for every run; nothing is learnt")
    return parser.parse_args(argv)


def runs(options: argparse.Namespace) -> list[Job]:
    """What the command line asks for. Raises ValueError for a recipe, field or value that cannot be."""
    for name in options.recipes:
        if name not in RECIPES:
            raise ValueError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}")
    recipes = [RECIPES[name].smoke() if options.smoke else RECIPES[name] for name in options.recipes]
    suffix = "-smoke" if options.smoke else ""
    return jobs(recipes, options.overrides or [[]], options.seeds, options.root, suffix)


def _run(options: argparse.Namespace) -> None:
    check_installed()
    todo = runs(options)
    options.root.mkdir(parents=True, exist_ok=True)  # where it cannot be, better said now
    with cluster(options.address):
        size = {"cpus_per_run": options.cpus_per_run, "gpus_per_run": options.gpus_per_run}
        gathered = sweep(todo, options.root, **size, say=lambda line: print(line, flush=True))
    print(markdown(gathered), end="")
    if failed := gathered["failed"]:
        names = ", ".join(run["run"] for run in failed)
        raise ValueError(f"{len(failed)} of {len(todo)} runs failed, see {options.root / 'sweep.md'}: {names}")


if __name__ == "__main__":
    sys.exit(main())
