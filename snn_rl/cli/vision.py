"""``snn-rl vision``: an image classifier, by its recipe."""

from __future__ import annotations

from collections.abc import Sequence

from snn_rl import vision
from snn_rl.cli.parser import MINUTES_HELP
from snn_rl.cli.status import RESUMES, exit_status, is_first
from snn_rl.cli.training import begin, chosen, parse_after_recipe, print_results, run_dir, training_parser
from snn_rl.vision import VISION_RECIPES, VisionRecipe

STATUSES: dict[type[Exception], int] = {vision.OutOfTimeError: 3}


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Choose a recipe, override any of its fields, run it."""
    names = f"one of {', '.join(VISION_RECIPES)}, or MODULE:RECIPE"
    ann = "the model.safetensors of another run's ANN"
    parser = training_parser("a classifier", ann, prog, names, positional=True)
    parser.add_argument("--minutes", type=float, help=MINUTES_HELP)
    options, overrides = parse_after_recipe(parser, argv)

    def command() -> None:
        recipe = chosen(options, overrides, VISION_RECIPES, VisionRecipe, parser, fixed=("name",))
        where = run_dir(options, recipe)
        results = vision.run(recipe, where, options.seed, **begin(options), minutes=options.minutes)
        if is_first():
            print_results(results)

    return exit_status(command, RESUMES, STATUSES)
