"""What the scripts share: errors as one line and exit status 2, and a recipe as a command line."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import os
import re
import select
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypedDict, TypeVar, cast, get_type_hints

import gymnasium as gym
import tyro
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor

from snn_rl import vision
from snn_rl.cli.memory import keep_freed_memory
from snn_rl.rl.policy_file import LoadedPolicy
from snn_rl.runs.agent import run
from snn_rl.runs.recipe import Recipe
from snn_rl.vision import VISION_RECIPES, VisionRecipe

R = TypeVar("R", Recipe, VisionRecipe)


MINUTES_HELP = "stop at the end of the epoch in which so many minutes have passed, with status 3 (default: no limit)"
DEVICE_HELP = "cpu, cuda, or auto: cuda if there is a GPU, else cpu"
STICKY_HELP = "probability that an Atari game repeats the last action"
RESUMES = "interrupted; run the same command again to continue from the last checkpoint"


def exit_status(command: Callable[[], Any], interrupted: str = "interrupted") -> int:
    """Run ``command`` and return the exit status of a script.

    A ValueError or an OSError is printed as one line on stderr and gives status 2. Running out of time gives 3, Ctrl-C
    gives 130. A reader of stdout that leaves early (``| head``) gives 141, as if SIGPIPE had ended the script, and no
    message.
    """
    _open_streams()
    try:
        command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except vision.OutOfTimeError as stop:
        _say(str(stop))
        return 3
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            return 141
        _say(f"error: {' '.join(str(error).split())}")
        return 2
    return 0


def _open_streams() -> None:
    """Python has None for a stream that was closed at the start (``2>&-``), which libraries do not expect."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  open until the process ends


def _reader_has_left() -> bool:
    """Whether stdout is the pipe that broke: an environment in a process of its own has pipes too.

    If so, what stdout still holds goes nowhere, or Python would complain of it when it exits.
    """
    with suppress(AttributeError, OSError, ValueError):  # no poll on this system, or no file behind stdout
        pipe = select.poll()
        pipe.register(sys.stdout.fileno(), 0)  # errors alone
        if pipe.poll(0):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return True
    return False


def _say(message: str) -> None:
    if _is_first():
        print(message, file=sys.stderr)


def _is_first() -> bool:
    """Of the processes that torchrun has started."""
    return int(os.environ.get("RANK", "0")) == 0


# --- options and their help -----------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """The options of a script, without abbreviations. The help shows each option's default."""

    def __init__(self, description: str | None, **settings: Any) -> None:
        _open_streams()
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Help, **settings)

    def print_help(self, file: Any = None) -> None:
        if status := exit_status(lambda: print(self.format_help(), end="", file=file)):
            raise SystemExit(status)


class _Help(argparse.HelpFormatter):
    """Ends an option's help with its default, and keeps paragraphs and indented lines as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        words = action.help or ""
        if not action.option_strings or action.dest == "help" or "(default: " in words:
            return words
        if action.required:
            return f"{words} (required)"
        default = "off" if action.const is True else _words(action.default)
        return f"{words} (default: {default.replace('%', '%%')})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = textwrap.dedent(text).strip().split("\n\n")
        return "\n\n".join(p if p.startswith(" ") else textwrap.fill(p, width) for p in paragraphs)


def _words(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)


def _training_parser(what: str, ann: str) -> Parser:
    """The options that every training has. ``ann`` is a file that may take the ANN stage's place."""
    description = (
        f"Train {what}: first an ordinary network (ANN), then spiking ones.\n\n"
        "Run the same command again to resume a run that was stopped."
    )
    parser = Parser(description, add_help=False)
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


def _chosen(
    options: argparse.Namespace,
    overrides: Sequence[str],
    recipes: Mapping[str, R],
    parser: Parser,
    fixed: Sequence[str],
) -> R:
    """The recipe that the command line names, with the fields that it overrides: any but the ``fixed`` ones."""
    if options.recipe is None and {"-h", "--help"} & set(overrides):
        parser.print_help()
        raise SystemExit(0)
    if options.recipe is None:
        raise ValueError(f"say which recipe: {', '.join(recipes)}")
    if options.recipe not in recipes:
        raise ValueError(f"unknown recipe {options.recipe!r}; there are {', '.join(recipes)}")
    recipe = recipes[options.recipe].smoke() if options.smoke else recipes[options.recipe]
    parser.usage, parser.epilog = argparse.SUPPRESS, None  # tyro's help has a usage of its own
    note = f"Every field of the recipe {options.recipe} is an option too:"
    return overridden(recipe, overrides, parser.prog, fixed, f"{parser.format_help()}\n{note}")


def overridden(recipe: R, overrides: Sequence[str], program: str, fixed: Sequence[str], description: str = "") -> R:
    """``recipe`` with the fields that the flags ``overrides`` name. ``description`` stands at the top of their help.

    Raises:
        ValueError: one of the ``fixed`` fields, or a value that the recipe refuses.
    """
    for word in overrides:
        if word.split("=")[0].lstrip("-").replace("-", "_") in fixed and word.startswith("--"):
            raise ValueError(f"{' and '.join(fixed)} say which recipe this is; choose another with --recipe")
    shown = _shown(recipe, fixed)
    parsed = tyro.cli(type(shown), args=list(overrides), default=shown, prog=program, description=description)
    return _as(recipe, parsed)


def _shown(config: Any, fixed: Sequence[str] = ()) -> Any:
    """``config`` as tyro shows and parses it: without the ``fixed`` fields and functions, and unchecked.

    Recipes know nothing of tyro, so its settings are put onto a subclass. It checks nothing: tyro would frame an error
    over several lines.
    """
    kind = type(config)
    hints = get_type_hints(kind)
    fields: list[Any] = []
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        hint: Any = hints[field.name]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = _shown(value)
            hint = type(value)
        elif field.name in fixed or callable(value):
            hint = Annotated[hint, tyro.conf.Suppress, tyro.conf.Fixed]
        elif isinstance(value, dict) and value:
            hint = _shown_arguments(value, config.make_env)
        else:
            metavar = "[NAME VALUE ...]" if isinstance(value, dict) else None
            hint = Annotated[hint, tyro.conf.arg(metavar=metavar, help_behavior_hint=_default)]
        fields.append((field.name, hint, dataclasses.field(default=None)))
        values[field.name] = value
    unchecked = {"__doc__": kind.__doc__, "__post_init__": lambda self: None}
    shown = dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), frozen=True, namespace=unchecked)
    shown.__module__ = kind.__module__  # where tyro finds the comments that say what a field is for
    return shown(**values)


def _shown_arguments(arguments: Mapping[str, Any], make_env: Callable[..., Any]) -> Any:
    """Arguments of an environment, each an option with the words of "Args" in the docstring of ``make_env``."""
    function = getattr(make_env, "func", make_env)  # of a partial
    _, _, section = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    found = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", section.split("\n\n")[0], re.MULTILINE)
    words = {name: " ".join(text.split()).rstrip(".") for name, text in found}
    hints = {
        name: Annotated[type(value), tyro.conf.arg(help=words.get(name, f"the environment's {name}"))]
        for name, value in arguments.items()
    }
    return TypedDict("Arguments", hints)  # type: ignore[operator]


def _default(label: str) -> str:
    return f"(default: {label or 'none'})"


def _as(config: Any, parsed: Any) -> Any:
    """What tyro has ``parsed`` as a ``config`` again, which checks it."""
    values = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(config)}
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            values[name] = _as(getattr(config, name), value)
    return type(config)(**values)


# --- environments ---------------------------------------------------------------------------------------------------


ENV_HELP = (
    "environment to play in: a gymnasium id, or MODULE:FUNCTION for a function of yours. MODULE is found from the "
    "current folder. FUNCTION(num_envs, *, seed, render_mode=None) returns a monitored VecEnv (default: the recipe's "
    "environment; FILE names the recipe)"
)


def named_environment(name: str, policy: LoadedPolicy, num_envs: int = 1, seed: int = 0, **kwargs: Any) -> VecEnv:
    """``num_envs`` copies of the environment ``name``, seeded ``seed, seed + 1, ...``, for ``policy`` to play in.

    ``name`` is a gymnasium id, or the ``MODULE:FUNCTION`` of a recipe's ``make_env``. A function gets the environment's
    arguments that the policy file names, too. ``kwargs`` add to them.

    Raises:
        ValueError: no such id, module or function, an environment that cannot be built or has other spaces.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        if name.partition(":")[2].isidentifier():  # "package:Game-v0" is an id
            make_env = _function(name)
            kwargs = {**policy.metadata["provenance"].get("env_kwargs", {}), **kwargs}
        else:
            make_env = partial(_make_registered, name)
        env = Recipe(name=name, env_id=name, make_env=make_env, num_envs=1).build_env(num_envs, seed, **kwargs)
    except ValueError as error:
        if isinstance(error.__cause__, gym.error.UnregisteredEnv) and ":" not in name:
            raise ValueError(f"{error}; for a function of yours, write MODULE:FUNCTION") from error
        raise
    except Exception as error:  # the module and the environment may raise anything
        raise ValueError(f"the environment {name} cannot be built: {type(error).__name__}: {error}") from error
    for kind in ("observation_space", "action_space"):
        ours, theirs = getattr(policy, kind), getattr(env, kind)
        if ours != theirs:
            env.close()
            raise ValueError(
                f"the agent's {kind} is {ours}, that of {name} is {theirs}; build the environment with the wrappers of "
                "the training, in a function, and give MODULE:FUNCTION"
            )
    return env


def _function(name: str) -> Callable[..., Any]:
    """What ``MODULE:FUNCTION`` names. Raises ValueError where there is no such thing."""
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        raise ValueError(f"no module {module_name!r} in {os.getcwd()}, nor installed; give MODULE:FUNCTION") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{getattr(module, '__file__', module_name)} has no function {function_name!r}")
    return cast(Callable[..., Any], function)


def _make_registered(env_id: str, num_envs: int, *, seed: int, render_mode: str | None = None) -> VecEnv:
    import ale_py  # noqa: F401  registers its games

    env = VecMonitor(DummyVecEnv([lambda: gym.make(env_id, render_mode=render_mode)] * num_envs))
    env.seed(seed)
    return env


# --- trainings ------------------------------------------------------------------------------------------------------


def _run_dir(options: argparse.Namespace) -> Path:
    folder = options.recipe + ("-smoke" if options.smoke else "")
    return options.run_dir or Path("runs", folder, f"seed-{options.seed}")


def train(argv: Sequence[str] | None, recipes: Mapping[str, Recipe], default: str) -> int:
    """The command line of an agent's ``scripts/train_*.py``: choose a recipe, override any of its fields, run it."""
    parser = _training_parser("an agent", "the zip of an SB3 DQN, or the policy.safetensors of an ANN,")
    parser.add_argument("--recipe", metavar="NAME", default=default, help=f"one of {', '.join(recipes)}")
    options, overrides = parser.parse_known_args(argv)

    def command() -> None:
        recipe = _chosen(options, overrides, recipes, parser, fixed=("name", "env_id"))
        print_results(run(recipe, _run_dir(options), options.seed, **_begin(options)))

    return exit_status(command, RESUMES)


def train_classifier(argv: Sequence[str] | None) -> int:
    """The command line of ``scripts/train_vision.py``."""
    parser = _training_parser("a classifier", "the model.safetensors of another run's ANN")
    parser.usage = "%(prog)s RECIPE [OPTIONS]"
    parser.epilog = (
        f"RECIPE is one of {', '.join(VISION_RECIPES)}. Every field of the recipe is an option too: "
        "%(prog)s RECIPE --help lists them."
    )
    parser.add_argument("--minutes", type=float, help=MINUTES_HELP)
    words = list(sys.argv[1:] if argv is None else argv)
    named = bool(words) and not words[0].startswith("-")
    options, overrides = parser.parse_known_args(words[1:] if named else words)
    options.recipe = words[0] if named else None
    if named:
        parser.prog += f" {options.recipe}"

    def command() -> None:
        recipe = _chosen(options, overrides, VISION_RECIPES, parser, fixed=("name",))
        kwargs = _begin(options)
        results = vision.run(recipe, _run_dir(options), options.seed, **kwargs, minutes=options.minutes)
        if _is_first():
            print_results(results)

    return exit_status(command, RESUMES)


def _begin(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of this process, and the arguments that every training takes."""
    keep_freed_memory()
    return {"device": options.device, "ann": options.ann, "progress_bar": sys.stderr.isatty() and _is_first()}


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
