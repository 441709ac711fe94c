"""Agents: one file per family, each a recipe. ``RECIPES`` lists them by name."""

from agents.breakout import BREAKOUT_LITE
from agents.cartpole import CARTPOLE, CARTPOLE_NO_VELOCITY
from agents.pong import PONG, PONG_LITE, PONG_SINGLE_FRAME
from snn_rl.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (BREAKOUT_LITE, CARTPOLE, CARTPOLE_NO_VELOCITY, PONG, PONG_LITE, PONG_SINGLE_FRAME)
}
