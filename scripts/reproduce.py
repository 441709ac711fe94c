"""Train what one of the paper's tables needs and write the table as Markdown, with the paper's figures beside ours.

Run the same command again to resume a run that was stopped. With --recipe, every field of the recipe is an option too:
python scripts/train_vision.py RECIPE --help lists them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's package, whatever else is installed

from snn_rl.cli.memory import keep_freed_memory
from snn_rl.cli.overrides import overridden
from snn_rl.cli.parser import DEVICE_HELP, MINUTES_HELP, Parser
from snn_rl.cli.status import exit_status
from snn_rl.cli.vision import STATUSES
from snn_rl.vision import VISION_RECIPES, VisionRecipe
from snn_rl.vision.paper import TABLES, reproduce


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("table", metavar="TABLE", help=f"one of {', '.join(TABLES)}")
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help=f"train this recipe: one of {', '.join(VISION_RECIPES)} (default: the paper's networks)",
    )
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="folder of the runs (default: runs/paper)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the runs")
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument(
        "--smoke", action="store_true", help="take seconds for every run; nothing is learnt; needs --recipe"
    )
    parser.add_argument("--minutes", type=float, help=MINUTES_HELP)
    options, overrides = parser.parse_known_args(argv)
    directory = options.run_dir or Path("runs", "paper-smoke" if options.smoke else "paper")
    started = time.monotonic()

    def minutes_left() -> float | None:
        return None if options.minutes is None else max(0.0, options.minutes - (time.monotonic() - started) / 60)

    def command() -> None:
        keep_freed_memory()
        out = reproduce(
            options.table,
            directory,
            recipe=_recipe(options, overrides),
            seed=options.seed,
            device=options.device,
            progress_bar=sys.stderr.isatty(),
            deadline=minutes_left,
        )
        print(out.read_text())

    return exit_status(command, statuses=STATUSES)


def _recipe(options: argparse.Namespace, overrides: Sequence[str]) -> VisionRecipe | None:
    if options.recipe is None:
        if overrides or options.smoke:
            raise ValueError(f"{' '.join(overrides) or '--smoke'} changes a recipe: say which with --recipe")
        return None
    if options.recipe not in VISION_RECIPES:
        raise ValueError(f"unknown recipe {options.recipe!r}; there are {', '.join(VISION_RECIPES)}")
    recipe = VISION_RECIPES[options.recipe]
    return overridden(recipe.smoke() if options.smoke else recipe, overrides, "reproduce.py", fixed=("name",))


if __name__ == "__main__":
    sys.exit(main())
