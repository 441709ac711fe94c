"""Recipes by name: of a mapping, of the ``agents`` package in the current folder, or ``MODULE:RECIPE``."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from snn_rl.runs.recipe import Recipe
from snn_rl.runs.registered import import_or_refuse
from snn_rl.vision.recipe import VisionRecipe

R = TypeVar("R", Recipe, VisionRecipe)

PACKAGE, LISTED = "agents", "RECIPES"
NAMES_HELP = f"MODULE:RECIPE, or a name in {LISTED} of the package {PACKAGE} in the current folder"


def find_recipe(name: str, known: Mapping[str, R] | None, kind: type[R]) -> R:
    """The recipe ``name``.

    Args:
        name: a name in ``known``, or ``MODULE:RECIPE``: a recipe in this module, or the name of one in the module's
            ``RECIPES``. MODULE is found from the current folder.
        known: recipes by name; None: those of the package ``agents`` in the current folder.
        kind: of a recipe.

    Raises:
        ValueError: no such recipe.
    """
    if ":" in name:
        return _imported(name, kind)
    if known is None:
        known = _local(kind)
        if known is None:
            raise ValueError(
                f"unknown recipe {name!r}: no {PACKAGE} with {LISTED} in {os.getcwd()}; give MODULE:RECIPE"
            )
    if name not in known:
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(known)}, or give MODULE:RECIPE")
    return known[name]


def local_recipes() -> Mapping[str, Recipe]:
    """``RECIPES`` of the package ``agents`` in the current folder; empty where there is none.

    Raises:
        ValueError: a package that cannot be imported.
    """
    return _local(Recipe) or {}


def search_here() -> None:
    """Let modules of the current folder be imported: a console script does not by itself."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _local(kind: type[R]) -> Mapping[str, R] | None:
    here = Path.cwd()
    file = next(filter(Path.is_file, (here / PACKAGE / "__init__.py", here / f"{PACKAGE}.py")), None)
    if file is None:
        return None
    search_here()
    module = import_or_refuse(PACKAGE, f"with {LISTED}")
    if Path(module.__file__ or "").resolve() != file.resolve():  # of another folder, imported earlier
        raise ValueError(f"the package {PACKAGE} in {here} is hidden by {module.__file__}; give MODULE:RECIPE")
    return _mapping(module, kind)


def _mapping(module: Any, kind: type[R]) -> Mapping[str, R] | None:
    """The recipes of this kind in a module's ``RECIPES``; None where it lists none."""
    listed = getattr(module, LISTED, None)
    if not isinstance(listed, Mapping):
        return None
    return {name: recipe for name, recipe in listed.items() if isinstance(recipe, kind)}


def _imported(name: str, kind: type[R]) -> R:
    module_name, _, attribute = name.rpartition(":")
    search_here()
    module: Any = import_or_refuse(module_name, f"to hold the recipe {attribute}")
    listed: Mapping[str, R] = _mapping(module, kind) or {}
    found = listed.get(attribute, getattr(module, attribute, None))
    if isinstance(found, kind):
        return found
    names = dict.fromkeys((*listed, *(key for key, value in vars(module).items() if isinstance(value, kind))))
    there_are = f"there are {', '.join(names)}" if names else "it has none"
    raise ValueError(f"{module_name} has no {kind.__name__} {attribute!r}; {there_are}")
