"""Run recipes x overrides x seeds on Ray and gather one table: docs/sweep.md. The same command goes on after a kill."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's agents, whatever else is installed

from agents import RECIPES
from snn_rl.cli import RESUMES, exit_status
from snn_rl.sweep import Job, check_installed, cluster, jobs, markdown, sweep


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    return exit_status(lambda: _run(options), RESUMES)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help=", ".join(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    parser.add_argument(
        "--set",
        dest="overrides",
        nargs="*",
        action="append",
        metavar="FIELD=VALUE",
        help="a variant: one or more fields of the recipe; again for the next one; nothing: the recipe as it is",
    )
    parser.add_argument("--root", type=Path, default=Path("runs", "sweep"), help="default: runs/sweep")
    parser.add_argument("--address", help="a Ray cluster: auto or HOST:PORT (default: this machine)")
    parser.add_argument("--cpus-per-run", type=int, default=1)
    parser.add_argument(
        "--gpus-per-run", type=float, default=0.0, help="0.25: four runs share one (default: 0, no GPU)"
    )
    parser.add_argument("--smoke", action="store_true", help="every run in seconds, learning nothing")
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
