"""The environment that a policy file names: by its recipe, or else by its id in gymnasium."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from snn_rl.rl.environments import without_normalization
from snn_rl.runs.recipe import Recipe
from snn_rl.runs.registered import registered

if TYPE_CHECKING:
    from snn_rl.rl.policy_file import LoadedPolicy


def recipe_of(policy: LoadedPolicy, recipes: Mapping[str, Recipe]) -> Recipe:
    """A recipe that builds the environment of ``policy``: of ``recipes``, the one that the policy file names.

    Where there is no such recipe, and the file's ``env_id`` is registered in gymnasium, it is a recipe of this id,
    named so.

    Raises:
        ValueError: neither of them.
    """
    provenance = policy.metadata["provenance"]
    name, env_id = provenance.get("recipe"), provenance.get("env_id")
    if isinstance(name, str) and name in recipes:
        return recipes[name]
    made_by = _made_by(name, recipes)
    if not isinstance(env_id, str):
        raise ValueError(made_by)
    if ":" in env_id:  # what a file says must not decide which module is imported
        raise ValueError(f"{made_by}; its environment is {env_id}")
    try:
        return Recipe(name=env_id, env_id=env_id, make_env=registered(env_id), num_envs=1)
    except ValueError as error:
        raise ValueError(f"{made_by}; {error}") from error


def environment_of(
    policy: LoadedPolicy, recipes: Mapping[str, Recipe], num_envs: int = 1, seed: int = 0, /, **overrides: Any
) -> VecEnv:
    """``num_envs`` copies of the environment of ``policy``, seeded ``seed, seed + 1, ...``.

    The policy file names the recipe (see `recipe_of`) and the environment's arguments. ``overrides`` give an argument
    another value, such as ``sticky=0.25``.

    Raises:
        ValueError: as `recipe_of` and `Recipe.build_env`.
    """
    env_kwargs = policy.metadata["provenance"].get("env_kwargs", {})
    if not isinstance(env_kwargs, dict):
        raise ValueError(f"the policy file's env_kwargs must be an object, got {env_kwargs!r}")
    recipe = recipe_of(policy, recipes)
    try:
        return as_taken_by(policy, recipe.build_training_env(num_envs, seed, **{**env_kwargs, **overrides}))
    except ValueError as error:
        if recipe.name in recipes:
            raise
        raise ValueError(f"{_made_by(policy.metadata['provenance'].get('recipe'), recipes)}; {error}") from error


def as_taken_by(policy: LoadedPolicy, env: VecEnv) -> VecEnv:
    """``env``, of `Recipe.build_training_env`, without a ``VecNormalize`` where ``policy`` needs none.

    A policy with statistics normalises its observations itself. One without them was perhaps trained on normalised ones
    and stored without its environment, so a ``VecNormalize`` of observations is left to `evaluate` to judge.
    """
    needed = isinstance(env, VecNormalize) and env.norm_obs and policy.policy.net.normalizer is None
    return env if needed else without_normalization(env)


def _made_by(name: object, recipes: Mapping[str, Recipe]) -> str:
    there_are = f"and there are {', '.join(recipes)}" if recipes else "which is not here"
    return f"the policy file was made by the recipe {name!r}, {there_are}"
