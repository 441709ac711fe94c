"""What the commands that train share: their options, the recipe with its overrides, and the table at the end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from snn_rl.cli.extras import need
from snn_rl.cli.memory import keep_freed_memory
from snn_rl.cli.parser import DEVICE_HELP, Parser
from snn_rl.cli.recipes import NAMES_HELP, find_recipe
from snn_rl.cli.status import is_first
from snn_rl.runs.recipe import Recipe
from snn_rl.vision.recipe import VisionRecipe

R = TypeVar("R", Recipe, VisionRecipe)


def training_parser(what: str, ann: str, prog: str | None, recipes: str, positional: bool) -> Parser:
    """The options that every training has.

    Args:
        what: is trained.
        ann: a file that may take the ANN stage's place.
        prog: the program's name; None: that of the process.
        recipes: which there are.
        positional: whether the first word names the recipe.
    """
    description = (
        f"Train {what}: first an ordinary network (ANN), then spiking ones.\n\n"
        "Run the same command again to resume a run that was stopped."
    )
    parser = Parser(description, prog=prog, add_help=False)
    if positional:
        parser.usage = "%(prog)s RECIPE [OPTIONS]"
        parser.epilog = (
            f"RECIPE is {recipes}. Every field of the recipe is an option too: %(prog)s RECIPE --help lists them."
        )
    parser.add_argument("--seed", type=int, default=0, help="seed of the run")
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="folder of the run (default: runs/RECIPE/seed-SEED)"
    )
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--smoke", action="store_true", help="go through every stage in seconds; nothing is learnt")
    parser.add_argument(
        "--ann", type=Path, metavar="FILE", help=f"use {ann} instead of training an ANN (default: none)"
    )
    return parser


def parse_after_recipe(parser: Parser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options behind a first word, which is the ``recipe`` (None where it is left out), and those of its fields."""
    words = list(sys.argv[1:] if argv is None else argv)
    named = bool(words) and not words[0].startswith("-")
    options, overrides = parser.parse_known_args(words[1:] if named else words)
    options.recipe = words[0] if named else None
    if named:
        parser.prog += f" {options.recipe}"
    return options, overrides


def chosen(
    options: argparse.Namespace,
    overrides: Sequence[str],
    known: Mapping[str, R] | None,
    kind: type[R],
    parser: Parser,
    fixed: Sequence[str],
) -> R:
    """The recipe that the command line names, with the fields that it overrides: any but the ``fixed`` ones."""
    if options.recipe is None:
        if {"-h", "--help"} & set(overrides):
            parser.print_help()
            raise SystemExit(0)
        raise ValueError(f"say which recipe: {', '.join(known) if known else NAMES_HELP}")
    need("scripts", "tyro")
    from snn_rl.cli.overrides import overridden

    found = find_recipe(options.recipe, known, kind)
    recipe = found.smoke() if options.smoke else found
    parser.usage, parser.epilog = argparse.SUPPRESS, None  # tyro's help has a usage of its own
    note = f"Every field of the recipe {options.recipe} is an option too:"
    return overridden(recipe, overrides, parser.prog, fixed, f"{parser.format_help()}\n{note}")


def run_dir(options: argparse.Namespace, recipe: Recipe | VisionRecipe) -> Path:
    """The folder of the run."""
    folder = recipe.name + ("-smoke" if options.smoke else "")
    return options.run_dir or Path("runs", folder, f"seed-{options.seed}")


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of this process, and the arguments that every training takes."""
    keep_freed_memory()
    return {"device": options.device, "ann": options.ann, "progress_bar": sys.stderr.isatty() and is_first()}


def print_results(results: Mapping[str, Any]) -> None:
    """The table of a run's stages on stdout."""
    print(f"{results['recipe']}, seed {results['seed']}, {results['hardware']}")
    names = ("stage", "result", "over", "spike rate", "energy", "trained", "minutes")
    rows = [names, *((s["stage"], *_result(s), *_cost(s)) for s in results["stages"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _result(stage: Mapping[str, Any]) -> tuple[str, str]:
    if "accuracy" in stage:
        return f"{100 * stage['accuracy']['top1']:.2f} %", f"{stage['accuracy']['images']} images"
    return f"{stage['eval']['mean']:.1f} +- {stage['eval']['std']:.1f}", f"{stage['eval']['episodes']} episodes"


def _cost(stage: Mapping[str, Any]) -> tuple[str, str, str, str]:
    rate = "-" if stage["spike_rate"] is None else f"{stage['spike_rate']['mean']:.3f}"
    energy = "-" if stage["energy"] is None else f"{stage['energy']['ann_over_snn']:.2f}x"
    trained = f"{stage['epochs']} epochs" if "accuracy" in stage else f"{stage['env_steps']} steps"
    return rate, energy, trained, f"{stage['wall_seconds'] / 60:.1f}"
