"""What the scripts share: errors as one line and exit status 2, and a recipe as a command line."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
from stable_baselines3.common.vec_env import VecEnv

from snn_rl.pipeline import run
from snn_rl.policy_file import LoadedPolicy
from snn_rl.recipe import Recipe


def exit_status(command: Callable[[], Any]) -> int:
    """Run ``command``; ValueError and OSError become one line on stderr and status 2, Ctrl-C status 130."""
    try:
        command()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


class _Unchecked(Recipe):
    """A recipe as the command line says it, checked afterwards: tyro would frame the error over several lines."""

    def __post_init__(self) -> None:
        pass


def _fields(recipe: Recipe) -> dict[str, Any]:
    return {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}


def train(argv: Sequence[str] | None, recipes: Mapping[str, Recipe], default: str) -> int:
    """The command line of ``scripts/train_*.py``: choose a recipe, override any of its fields, run it."""
    parser = argparse.ArgumentParser(
        description="Train an ANN-DQN, convert it, prune its timesteps. The same command resumes a killed run.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--recipe", default=default, help=f"one of {', '.join(recipes)} (default: {default})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, help="where the run is kept (default: runs/RECIPE/seed-N)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--smoke", action="store_true", help="go through every stage in seconds, learning nothing")
    parser.add_argument("--ann", type=Path, metavar="ZIP", help="start from this SB3 DQN instead of training one")
    options, overrides = parser.parse_known_args(argv)

    def command() -> None:
        if options.recipe not in recipes:
            raise ValueError(f"unknown recipe {options.recipe!r}; there are {', '.join(recipes)}")
        chosen = recipes[options.recipe]
        if options.smoke:
            chosen = chosen.smoke()
        if {"-h", "--help"} & set(overrides):
            parser.print_help()
            print(f"\nand every field of the recipe, here {options.recipe}:\n")
        parsed = tyro.cli(_Unchecked, args=overrides, default=_Unchecked(**_fields(chosen)), prog=parser.prog)
        recipe = Recipe(**_fields(parsed))
        if (recipe.name, recipe.env_id) != (chosen.name, chosen.env_id):
            raise ValueError("name and env_id say which recipe this is; choose another with --recipe")
        folder = options.recipe + ("-smoke" if options.smoke else "")
        results = run(
            recipe,
            options.run_dir or Path("runs", folder, f"seed-{options.seed}"),
            options.seed,
            device=options.device,
            ann=options.ann,
            progress_bar=sys.stderr.isatty(),
        )
        print_results(results)

    return exit_status(command)


def environment_of(
    policy: LoadedPolicy, recipes: Mapping[str, Recipe], num_envs: int, seed: int, **overrides: Any
) -> VecEnv:
    """The environment that a policy was trained in, from its file's provenance.

    Raises:
        ValueError: a recipe that is not among ``recipes``, or as `Recipe.build_env`.
    """
    provenance = policy.metadata["provenance"]
    name = provenance.get("recipe")
    if name not in recipes:
        raise ValueError(f"the policy file was made by the recipe {name!r}; there are {', '.join(recipes)}")
    return recipes[name].build_env(num_envs, seed, **{**provenance["env_kwargs"], **overrides})


def print_results(results: Mapping[str, Any]) -> None:
    """The table of a run's stages on stdout."""
    print(f"{results['recipe']}, seed {results['seed']}, {results['hardware']}")
    print(f"{'stage':>5} {'return':>17} {'episodes':>8} {'spike rate':>10} {'energy':>7} {'steps':>9} {'minutes':>8}")
    for stage in results["stages"]:
        rate = "-" if stage["spike_rate"] is None else f"{stage['spike_rate']['mean']:.3f}"
        energy = "-" if stage["energy"] is None else f"{stage['energy']['ann_over_snn']:.2f}x"
        score = f"{stage['eval']['mean']:.1f} +- {stage['eval']['std']:.1f}"
        print(
            f"{stage['stage']:>5} {score:>17} {stage['eval']['episodes']:>8} {rate:>10} {energy:>7} "
            f"{stage['env_steps']:>9} {stage['wall_seconds'] / 60:>8.1f}"
        )
