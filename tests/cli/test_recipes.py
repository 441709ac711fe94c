"""Recipes by name, as the console script and the scripts find them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents import RECIPES
from snn_rl import Recipe
from snn_rl.cli.recipes import find_recipe
from snn_rl.vision import VISION_RECIPES, VisionRecipe

OWN = """
from snn_rl import Recipe
from snn_rl.runs.registered import registered

ACROBOT = Recipe("acrobot", "Acrobot-v1", registered("Acrobot-v1"))
RECIPES = {"in-a-mapping": ACROBOT, "no-recipe": 3}
number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a module of the user's; nothing that it imports stays imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.split(".")[0] == "agents"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "own_recipes.py").write_text(OWN)
    yield tmp_path
    for name in ("own_recipes", "agents"):
        sys.modules.pop(name, None)


def test_a_name_is_looked_up_in_the_mapping_that_is_given() -> None:
    assert find_recipe("pong", RECIPES, Recipe) is RECIPES["pong"]
    assert find_recipe("vgg6-cifar10", VISION_RECIPES, VisionRecipe) is VISION_RECIPES["vgg6-cifar10"]
    with pytest.raises(
        ValueError, match=r"^unknown recipe 'chess'; there are breakout-lite, .*, or give MODULE:RECIPE$"
    ):
        find_recipe("chess", RECIPES, Recipe)


@pytest.mark.parametrize("name", ["own_recipes:ACROBOT", "own_recipes:in-a-mapping"])
@pytest.mark.parametrize("known", [None, RECIPES])
def test_a_module_of_the_current_folder_holds_a_recipe(name: str, known: dict[str, Recipe] | None) -> None:
    recipe = find_recipe(name, known, Recipe)
    assert (recipe.name, recipe.env_id) == ("acrobot", "Acrobot-v1")
    env = recipe.build_env(2, 0)
    assert env.num_envs == 2
    env.close()


@pytest.mark.parametrize("layout", ["agents.py", "agents/__init__.py"])
def test_agents_of_the_current_folder(layout: str, folder: Path) -> None:
    (folder / layout).parent.mkdir(exist_ok=True)
    (folder / layout).write_text(OWN)
    assert find_recipe("in-a-mapping", None, Recipe).name == "acrobot"
    with pytest.raises(ValueError, match=r"^unknown recipe 'pong'; there are in-a-mapping, or give MODULE:RECIPE$"):
        find_recipe("pong", None, Recipe)


def test_agents_of_another_folder_are_not_taken(folder: Path) -> None:
    """This repository is on the path, and its package of that name too."""
    import agents

    with pytest.raises(ValueError, match=r"^unknown recipe 'pong': no agents with RECIPES in .*; give MODULE:RECIPE$"):
        find_recipe("pong", None, Recipe)
    (folder / "agents.py").write_text(OWN)
    hidden = f"^the package agents in .* is hidden by {re.escape(str(agents.__file__))}; give MODULE:RECIPE$"
    with pytest.raises(ValueError, match=hidden):
        find_recipe("in-a-mapping", None, Recipe)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_recipes:CHESS", "own_recipes has no Recipe 'CHESS'; there are in-a-mapping, ACROBOT"),
        ("own_recipes:number", "own_recipes has no Recipe 'number'; there are in-a-mapping, ACROBOT"),
        ("own_recipes:no-recipe", "own_recipes has no Recipe 'no-recipe'; "),
        ("json:tool", "json has no Recipe 'tool'; it has none"),
        ("no_such_module:A", "no module 'no_such_module' in .*, nor installed, to hold the recipe A"),
        ("own_recipes.py:A", "no module 'own_recipes.py' in "),
        (":A", "no module '' in "),
    ],
)
def test_what_is_no_recipe_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        find_recipe(name, None, Recipe)


def test_a_recipe_of_the_other_kind_is_none(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^own_recipes has no VisionRecipe 'ACROBOT'; it has none$"):
        find_recipe("own_recipes:ACROBOT", VISION_RECIPES, VisionRecipe)


def test_an_agents_package_that_fails_or_lists_nothing(folder: Path) -> None:
    (folder / "agents.py").write_text("import no_such_dependency")
    with pytest.raises(
        ValueError, match=r"^the module agents cannot be imported: ModuleNotFoundError: No module named"
    ):
        find_recipe("pong", None, Recipe)
    (folder / "agents.py").write_text("number = 3")
    with pytest.raises(ValueError, match=r"^unknown recipe 'pong': no agents with RECIPES in .*; give MODULE:RECIPE$"):
        find_recipe("pong", None, Recipe)
