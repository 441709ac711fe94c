"""Agents: one file per family, each a recipe. ``RECIPES`` lists them by name."""

from agents.cartpole import CARTPOLE, CARTPOLE_NO_VELOCITY
from agents.freeway import FREEWAY_LITE
from agents.pong import PONG, PONG_LITE, PONG_SINGLE_FRAME
from snn_rl.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (CARTPOLE, CARTPOLE_NO_VELOCITY, FREEWAY_LITE, PONG, PONG_LITE, PONG_SINGLE_FRAME)
}
