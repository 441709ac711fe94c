"""Train each recipe with each variant and each seed, on one machine or many, and write one table of all results.

Run the same command again to resume a sweep that was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from snn_rl.cli.extras import need
from snn_rl.cli.parser import Parser
from snn_rl.cli.recipes import NAMES_HELP, find_recipe
from snn_rl.cli.status import RESUMES, exit_status
from snn_rl.runs.recipe import Recipe

if TYPE_CHECKING:
    from snn_rl.cli.sweeping.jobs import Job


def main(
    argv: Sequence[str] | None = None, *, prog: str | None = None, recipes: Mapping[str, Recipe] | None = None
) -> int:
    options = parse(argv, prog=prog, recipes=recipes)
    return exit_status(lambda: _sweep(options, recipes), RESUMES)


def parse(
    argv: Sequence[str] | None, *, prog: str | None = None, recipes: Mapping[str, Recipe] | None = None
) -> argparse.Namespace:
    """The options of the command line."""
    parser = Parser(__doc__, prog=prog)
    names = NAMES_HELP if recipes is None else f"{', '.join(recipes)}, or MODULE:RECIPE"
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help=f"one or more recipes: {names}")
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


def runs(options: argparse.Namespace, recipes: Mapping[str, Recipe] | None) -> list[Job]:
    """What the command line asks for. Raises ValueError for a recipe, field or value that cannot be."""
    from snn_rl.cli.sweeping.jobs import jobs

    found = [find_recipe(name, recipes, Recipe) for name in options.recipes]
    if options.smoke:
        found = [recipe.smoke() for recipe in found]
    suffix = "-smoke" if options.smoke else ""
    return jobs(found, options.overrides or [[]], options.seeds, options.root, suffix)


def _sweep(options: argparse.Namespace, recipes: Mapping[str, Recipe] | None) -> None:
    need("sweep", "ray", "scipy", "tyro")
    from snn_rl.cli.sweeping.cluster import cluster, sweep
    from snn_rl.cli.sweeping.table import markdown

    todo = runs(options, recipes)
    options.root.mkdir(parents=True, exist_ok=True)  # where it cannot be, better said now
    with cluster(options.address):
        size = {"cpus_per_run": options.cpus_per_run, "gpus_per_run": options.gpus_per_run}
        gathered = sweep(todo, options.root, **size, say=lambda line: print(line, flush=True))
    print(markdown(gathered), end="")
    if failed := gathered["failed"]:
        names = ", ".join(run["run"] for run in failed)
        raise ValueError(f"{len(failed)} of {len(todo)} runs failed, see {options.root / 'sweep.md'}: {names}")
