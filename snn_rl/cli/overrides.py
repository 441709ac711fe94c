"""A recipe's fields as options of the command line, by tyro."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Annotated, Any, TypedDict, TypeVar, get_type_hints

import tyro

from snn_rl.runs.recipe import Recipe
from snn_rl.vision.recipe import VisionRecipe

R = TypeVar("R", Recipe, VisionRecipe)


class OptionError(ValueError):
    """An option that is no field of the recipe, or a value that the field does not take."""


def overridden(recipe: R, overrides: Sequence[str], program: str, fixed: Sequence[str], description: str = "") -> R:
    """``recipe`` with the fields that the flags ``overrides`` name. ``description`` stands at the top of their help.

    Raises:
        OptionError: a flag that is no field, or a value of another type.
        ValueError: one of the ``fixed`` fields, or a value that the recipe refuses.
    """
    for word in overrides:
        if word.split("=")[0].lstrip("-").replace("-", "_") in fixed and word.startswith("--"):
            raise ValueError(f"{' and '.join(fixed)} say which recipe this is; choose another with --recipe")
    shown = _shown(recipe, fixed)
    said = StringIO()
    try:
        with redirect_stderr(said):  # tyro's errors fill a frame of several lines
            parsed = tyro.cli(type(shown), args=list(overrides), default=shown, prog=program, description=description)
    except SystemExit as end:
        if not end.code:
            raise
        raise OptionError(f"{_first_part(said.getvalue())}; {program} --help lists the options") from None
    return _as(recipe, parsed)


def _first_part(framed: str) -> str:
    """What is said inside a frame, down to the first rule, in one line."""
    inside = [line.strip("│ \n") for line in framed.splitlines() if not line.startswith(("╭", "╰"))]
    rules = [number for number, line in enumerate(inside) if line and not line.strip("─")]
    return " ".join(" ".join(inside[: rules[0] if rules else None]).split())


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
