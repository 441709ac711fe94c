"""``snn-rl train``: an agent, by its recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from snn_rl.cli.recipes import NAMES_HELP
from snn_rl.cli.status import RESUMES, exit_status
from snn_rl.cli.training import begin, chosen, parse_after_recipe, print_results, run_dir, training_parser
from snn_rl.runs.agent import run
from snn_rl.runs.recipe import Recipe


def main(
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    recipes: Mapping[str, Recipe] | None = None,
    default: str | None = None,
) -> int:
    """Choose a recipe, override any of its fields, run it.

    ``recipes`` are known by name. With a ``default``, ``--recipe`` names another one; without, the first word does.
    """
    ann = "the zip of an SB3 DQN, or the policy.safetensors of an ANN,"
    names = NAMES_HELP if recipes is None else f"one of {', '.join(recipes)}, or MODULE:RECIPE"
    parser = training_parser("an agent", ann, prog, names, positional=default is None)
    if default is None:
        options, overrides = parse_after_recipe(parser, argv)
    else:
        parser.add_argument("--recipe", metavar="NAME", default=default, help=names)
        options, overrides = parser.parse_known_args(argv)

    def command() -> None:
        recipe = chosen(options, overrides, recipes, Recipe, parser, fixed=("name", "env_id"))
        print_results(run(recipe, run_dir(options, recipe), options.seed, **begin(options)))

    return exit_status(command, RESUMES)
