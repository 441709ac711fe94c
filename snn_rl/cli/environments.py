"""The environment that an agent plays in: that of its training, or the one that ``--env-id`` names."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from stable_baselines3.common.vec_env import VecEnv

from snn_rl.cli.recipes import local_recipes, search_here
from snn_rl.rl.policy_file import LoadedPolicy
from snn_rl.runs.provenance import as_taken_by, environment_of, recipe_of
from snn_rl.runs.recipe import Recipe
from snn_rl.runs.registered import import_or_refuse, registered

ENV_ID_HELP = (
    "environment to play in: a gymnasium id, or MODULE:FUNCTION for a function of yours, such as a recipe's make_env "
    "(default: the one that FILE names)"
)
ENV_KWARGS_HELP = "arguments of the environment, such as continuous=True (default: as trained)"


def add_environment(parser: argparse.ArgumentParser) -> None:
    """The options ``--env-id`` and ``--env-kwargs``."""
    parser.add_argument("--env-id", metavar="ID", help=ENV_ID_HELP)
    add_env_kwargs(parser, ENV_KWARGS_HELP)


def add_env_kwargs(parser: argparse.ArgumentParser, words: str) -> None:
    """The option ``--env-kwargs NAME=VALUE ...``; `parsed_kwargs` reads it."""
    parser.add_argument("--env-kwargs", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=words)


def parsed_kwargs(words: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` words as arguments: a value is a Python literal, or else a string.

    Raises:
        ValueError: a word of another form.
    """
    kwargs = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--env-kwargs takes NAME=VALUE, such as continuous=True, got {word!r}")
        try:
            kwargs[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            kwargs[name] = text
    return kwargs


class EnvironmentOf:
    """Builds environments for a policy, as the command line says.

    Args:
        recipes: those that a policy file may name; None: those of the package ``agents`` in the current folder.
        options: of `add_environment`; None: the command does not have them.
    """

    def __init__(self, recipes: Mapping[str, Recipe] | None, options: argparse.Namespace | None = None) -> None:
        self._recipes = recipes
        self._env_id: str | None = None if options is None else options.env_id
        self._kwargs = {} if options is None else parsed_kwargs(options.env_kwargs)
        self._hint = "" if options is None else "; --env-id names another environment"

    def __call__(self, policy: LoadedPolicy, num_envs: int, seed: int, **overrides: Any) -> VecEnv:
        """``num_envs`` copies, seeded ``seed, seed + 1, ...``.

        Raises:
            ValueError: an environment that is not there, cannot be built or has other spaces than ``policy``.
        """
        kwargs = {**self._kwargs, **overrides}
        if self._env_id is None:
            try:
                env = environment_of(policy, self._known(), num_envs, seed, **kwargs)
            except ValueError as error:
                raise ValueError(f"{error}{self._hint}") from error
        else:
            env = named_environment(self._env_id, policy, num_envs, seed, **kwargs)
        for kind in ("observation_space", "action_space"):
            ours, theirs = getattr(policy, kind), getattr(env, kind)
            if ours != theirs:
                env.close()
                raise ValueError(
                    f"the agent's {kind} is {ours}, that of {self._called(policy)} is {theirs}; "
                    "build the environment with the wrappers of the training, in a function, and give --env-id "
                    "MODULE:FUNCTION"
                )
        return env

    def name(self, policy: LoadedPolicy) -> str | None:
        """What the environment is called; None: the one that the policy's own recipe builds."""
        if self._env_id is not None:
            return self._env_id
        recipe = recipe_of(policy, self._known())
        return None if recipe.name == policy.metadata["provenance"].get("recipe") else recipe.name

    def _called(self, policy: LoadedPolicy) -> str:
        return self.name(policy) or f"the recipe {policy.metadata['provenance'].get('recipe')}"

    def _known(self) -> Mapping[str, Recipe]:
        if self._recipes is None:
            self._recipes = local_recipes()
        return self._recipes


def named_environment(name: str, policy: LoadedPolicy, num_envs: int = 1, seed: int = 0, /, **kwargs: Any) -> VecEnv:
    """``num_envs`` copies of the environment ``name``, seeded ``seed, seed + 1, ...``.

    ``name`` is a gymnasium id, or the ``MODULE:FUNCTION`` of a recipe's ``make_env``. A function gets the arguments
    that the policy file names, too. ``kwargs`` add to them.

    Raises:
        ValueError: no such id, module or function, or an environment that cannot be built.
    """
    search_here()
    if name.partition(":")[2].isidentifier():  # "package:Game-v0" is an id
        make_env = _function(name)
        kwargs = {**policy.metadata["provenance"].get("env_kwargs", {}), **kwargs}
    else:
        try:
            make_env = registered(name)
        except ValueError as error:
            if ":" in name:
                raise
            raise ValueError(f"{error}, or MODULE:FUNCTION for a function of yours") from error
    recipe = Recipe(name=name, env_id=name, make_env=make_env, num_envs=1)
    return as_taken_by(policy, recipe.build_training_env(num_envs, seed, **kwargs))


def _function(name: str) -> Callable[..., Any]:
    """What ``MODULE:FUNCTION`` names. Raises ValueError where there is no such thing."""
    module_name, _, function_name = name.partition(":")
    module = import_or_refuse(module_name, f"to hold the function {function_name}; give MODULE:FUNCTION")
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{getattr(module, '__file__', module_name)} has no function {function_name!r}")
    return cast(Callable[..., Any], function)
