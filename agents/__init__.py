"""Agents: one file per family, each a recipe. ``RECIPES`` lists them by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agents.breakout import BREAKOUT_LITE
from agents.cartpole import CARTPOLE, CARTPOLE_NO_VELOCITY
from agents.pong import PONG, PONG_LITE, PONG_SINGLE_FRAME
from snn_rl.runs.recipe import Recipe

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

    from snn_rl.rl.policy_file import LoadedPolicy

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (BREAKOUT_LITE, CARTPOLE, CARTPOLE_NO_VELOCITY, PONG, PONG_LITE, PONG_SINGLE_FRAME)
}


def environment_of(policy: LoadedPolicy, num_envs: int = 1, seed: int = 0, **overrides: Any) -> VecEnv:
    """The environment that a policy was trained in: ``num_envs`` copies, seeded ``seed, seed + 1, ...``.

    The policy file names the recipe, which builds the environment, and the environment's arguments. Where ``RECIPES``
    has no such recipe, the environment is made by its id, if it is registered in gymnasium. ``overrides`` give an
    argument another value, such as ``sticky=0.25``.

    Raises:
        ValueError: a recipe that is not in ``RECIPES``, of an environment that is not registered; or as
            `Recipe.build_env`.
    """
    from snn_rl.runs import provenance  # here: it needs what listing the recipes does not

    return provenance.environment_of(policy, RECIPES, num_envs, seed, **overrides)
