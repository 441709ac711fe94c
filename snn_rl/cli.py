"""What the scripts share: errors as one line and exit status 2, and a recipe as a command line."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from stable_baselines3.common.vec_env import VecEnv

from snn_rl import vision
from snn_rl.memory import keep_freed_memory
from snn_rl.pipeline import run
from snn_rl.policy_file import LoadedPolicy
from snn_rl.recipe import Recipe
from snn_rl.vision import VISION_RECIPES, VisionRecipe

R = TypeVar("R", Recipe, VisionRecipe)


RESUMES = "interrupted; the same command goes on from the last checkpoint"


def exit_status(command: Callable[[], Any], interrupted: str = "interrupted") -> int:
    """Run ``command``; ValueError and OSError become a line on stderr and status 2, time that is up 3, Ctrl-C 130."""
    try:
        command()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except vision.OutOfTimeError as stop:
        _say(str(stop))
        return 3
    except (ValueError, OSError) as error:
        _say(f"error: {' '.join(str(error).split())}")
        return 2
    return 0


def _say(message: str) -> None:
    if _is_first():
        print(message, file=sys.stderr)


def _is_first() -> bool:
    """Of the processes that torchrun has started."""
    return int(os.environ.get("RANK", "0")) == 0


def _fields(recipe: Any) -> dict[str, Any]:
    return {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}


def _parser(ann: str, file: str, what: str) -> argparse.ArgumentParser:
    """The options that every training has; ``ann``, a ``file``, may take the ANN stage's place."""
    description = f"Train {what}, convert it, prune its timesteps. The same command resumes a killed run."
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, add_help=False)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, help="where the run is kept (default: runs/RECIPE/seed-N)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--smoke", action="store_true", help="go through every stage in seconds, learning nothing")
    parser.add_argument("--ann", type=Path, metavar=file, help=f"start from {ann} instead of training an ANN")
    return parser


def _chosen(
    options: argparse.Namespace,
    overrides: Sequence[str],
    recipes: Mapping[str, R],
    parser: argparse.ArgumentParser,
    fixed: Sequence[str],
) -> R:
    """The recipe that the command line names, with the fields that it overrides: any but the ``fixed`` ones."""
    wants_help = bool({"-h", "--help"} & set(overrides))
    if wants_help:
        parser.print_help()
    if wants_help and options.recipe is None:
        print(f"\nwith a recipe, --help lists its fields, each of which is a flag: {', '.join(recipes)}")
        raise SystemExit(0)
    if options.recipe is None:
        raise ValueError(f"say which recipe: {', '.join(recipes)}")
    if options.recipe not in recipes:
        raise ValueError(f"unknown recipe {options.recipe!r}; there are {', '.join(recipes)}")
    recipe = recipes[options.recipe].smoke() if options.smoke else recipes[options.recipe]
    if wants_help:
        print(f"\nand every field of the recipe, here {options.recipe}:\n")
    return overridden(recipe, overrides, parser.prog, fixed)


def overridden(recipe: R, overrides: Sequence[str], program: str, fixed: Sequence[str]) -> R:
    """``recipe`` with the fields that the flags ``overrides`` name. Raises ValueError for one of the ``fixed`` ones."""
    kind = type(recipe)
    # As the command line says it, checked afterwards: tyro would frame the error over several lines.
    unchecked = type(kind.__name__, (kind,), {"__doc__": kind.__doc__, "__post_init__": lambda self: None})
    parsed = tyro.cli(unchecked, args=list(overrides), default=unchecked(**_fields(recipe)), prog=program)
    changed = kind(**_fields(parsed))
    if any(getattr(changed, name) != getattr(recipe, name) for name in fixed):
        raise ValueError(f"{' and '.join(fixed)} say which recipe this is; choose another with --recipe")
    return changed


def _run_dir(options: argparse.Namespace) -> Path:
    folder = options.recipe + ("-smoke" if options.smoke else "")
    return options.run_dir or Path("runs", folder, f"seed-{options.seed}")


def train(argv: Sequence[str] | None, recipes: Mapping[str, Recipe], default: str) -> int:
    """The command line of an agent's ``scripts/train_*.py``: choose a recipe, override any of its fields, run it."""
    parser = _parser("this SB3 DQN's zip, or an ANN's policy.safetensors,", "FILE", "an ANN-DQN")
    parser.add_argument("--recipe", default=default, help=f"one of {', '.join(recipes)} (default: {default})")
    options, overrides = parser.parse_known_args(argv)

    def command() -> None:
        recipe = _chosen(options, overrides, recipes, parser, fixed=("name", "env_id"))
        print_results(run(recipe, _run_dir(options), options.seed, **_begin(options)))

    return exit_status(command, RESUMES)


def train_classifier(argv: Sequence[str] | None) -> int:
    """The command line of ``scripts/train_vision.py``."""
    parser = _parser("the ANN of another run, its model.safetensors,", "FILE", "a classifier")
    parser.usage = "%(prog)s RECIPE [--option VALUE ...]"
    parser.epilog = f"RECIPE comes first: {', '.join(VISION_RECIPES)}"
    parser.add_argument("--minutes", type=float, help="stop after the epoch in which they have passed (status 3)")
    words = list(sys.argv[1:] if argv is None else argv)
    named = bool(words) and not words[0].startswith("-")
    options, overrides = parser.parse_known_args(words[1:] if named else words)
    options.recipe = words[0] if named else None

    def command() -> None:
        recipe = _chosen(options, overrides, VISION_RECIPES, parser, fixed=("name",))
        kwargs = _begin(options)
        results = vision.run(recipe, _run_dir(options), options.seed, **kwargs, minutes=options.minutes)
        if _is_first():
            print_results(results)

    return exit_status(command, RESUMES)


def _begin(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of this process, a word of where the run is kept, and the arguments that every training takes."""
    keep_freed_memory()
    if _is_first():
        _show_log()
        print(f"training into {_run_dir(options)}; to watch: tensorboard --logdir {_run_dir(options)}", flush=True)
    return {"device": options.device, "ann": options.ann, "progress_bar": sys.stderr.isatty() and _is_first()}


class _Stderr(logging.Handler):
    """To ``sys.stderr`` as it is by then; logging's own keeps the stream that it began with."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr)
        except Exception:  # a closed pipe, a full disk: no reason for a training to end
            self.handleError(record)


def _show_log() -> None:
    """What the package logs of a training, on stderr, with the time of day."""
    log = logging.getLogger("snn_rl")
    log.setLevel(logging.INFO)
    if not log.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)


def environment_of(
    policy: LoadedPolicy, recipes: Mapping[str, Recipe], num_envs: int, seed: int, **overrides: Any
) -> VecEnv:
    """The environment that a policy was trained in, from its file's provenance.

    Raises:
        ValueError: a recipe that is not among ``recipes``, or as `Recipe.build_env`.
    """
    provenance = policy.metadata["provenance"]
    name = provenance.get("recipe")
    if not isinstance(name, str) or name not in recipes:
        raise ValueError(
            f"the policy file was made by the recipe {name!r}, and there are {', '.join(recipes)}; enter yours in "
            "RECIPES of agents/__init__.py"
        )
    env_kwargs = provenance.get("env_kwargs", {})
    if not isinstance(env_kwargs, dict):
        raise ValueError(f"the policy file's env_kwargs must be an object, got {env_kwargs!r}")
    return recipes[name].build_env(num_envs, seed, **{**env_kwargs, **overrides})


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
