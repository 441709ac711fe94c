"""Environments that are registered in gymnasium, as a recipe's ``make_env``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import metadata
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec, load_env_creator

from snn_rl.base.progress import one_line

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

OWN = "gymnasium.envs."  # an entry point below it comes with gymnasium; what it needs may be an extra
CLOSE = 0.75  # of difflib: how similar an id must be to be suggested
ATARI = ("ALE/", "ale_py:")


def registered(env_id: str, env_kwargs: Mapping[str, Any] | None = None) -> Callable[..., VecEnv]:
    """The ``make_env`` of a `Recipe` for an environment that is registered in gymnasium.

    It takes ``(num_envs, *, seed, render_mode=None, **kwargs)`` and returns a monitored ``VecEnv`` whose copies are
    seeded ``seed, seed + 1, ...`` at their first reset. ``kwargs`` go to ``gymnasium.make``, after ``env_kwargs`` and
    instead of those of the same name.

    Args:
        env_id: such as ``LunarLander-v3``; ``MODULE:ID`` imports the module first, which registers the id.
        env_kwargs: arguments of the environment, such as ``{"continuous": True}``.

    Raises:
        ValueError: no such id. When an environment is built: a package that is missing, an argument that the
            environment does not take, or an environment that cannot be built.
    """
    spec_of(env_id)
    return partial(_make, env_id, dict(env_kwargs or {}))


def spec_of(env_id: str) -> EnvSpec:
    """What gymnasium knows of ``env_id``. Raises ValueError where it knows no such id."""
    module_name, colon, name = env_id.rpartition(":")
    if colon:
        import_or_refuse(module_name, f"which should register {name}")
    try:
        import ale_py  # noqa: F401  registers its games
    except ImportError:
        if env_id.startswith(ATARI):
            raise ValueError(f"{env_id} needs ale-py: pip install ale-py") from None
    try:
        return gym.spec(name)
    except gym.error.Error as error:
        known = {key.lower(): key for key in gym.registry}
        close = [known[key] for key in difflib.get_close_matches(name.lower(), known, cutoff=CLOSE)]
        similar = f"; similar ids: {', '.join(close)}" if close else ""
        module = "" if colon else "; if a package of yours registers it, write MODULE:ID"
        raise ValueError(f"gymnasium has no environment {name!r}{similar}{module}") from error


def import_or_refuse(name: str, what: str) -> Any:
    """The module ``name``, ``what`` the caller wants of it. Raises ValueError where it is not there or fails."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # the module's own code may raise anything
        absent = isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}.")
        if absent or not name or name.startswith("."):
            raise ValueError(f"no module {name!r} in {os.getcwd()}, nor installed, {what}") from None
        raise ValueError(f"the module {name} cannot be imported: {one_line(error)}") from error


def _make(
    env_id: str,
    env_kwargs: Mapping[str, Any],
    /,
    num_envs: int,
    *,
    seed: int,
    render_mode: str | None = None,
    **more: Any,
) -> VecEnv:
    from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

    spec = spec_of(env_id)
    kwargs = {**env_kwargs, **more}
    if render_mode is not None:  # not every environment takes one
        kwargs["render_mode"] = render_mode
    try:
        env = VecMonitor(DummyVecEnv([lambda: _one(spec, kwargs)] * num_envs))
    except Exception as error:  # the environment's own code may raise anything
        raise ValueError(_reason(spec, kwargs, error)) from error
    env.seed(seed)
    return env


def _one(spec: EnvSpec, kwargs: Mapping[str, Any]) -> gym.Env[Any, Any]:
    from snn_rl.rl.spaces import check_observation_space

    env = gym.make(spec, **kwargs)
    if isinstance(env.observation_space, gym.spaces.Dict):  # SB3's wrappers fail on parts that they do not know
        check_observation_space(env.observation_space)
    return env


def _reason(spec: EnvSpec, kwargs: Mapping[str, Any], error: Exception) -> str:
    """Why the environment cannot be built, and the way out where there is one."""
    if isinstance(error, ImportError | gym.error.DependencyNotInstalled):
        return f"{spec.id} {_missing(spec, error)}"
    if isinstance(error, TypeError) and (found := re.search(r"unexpected keyword argument '(\w+)'", str(error))):
        return f"{spec.id} does not take the argument {found[1]!r}{_taken(spec)}"
    given = f" with {dict(kwargs)}"[:200] if kwargs else ""
    return f"{spec.id} cannot be built{given}: {one_line(error)}"


def _missing(spec: EnvSpec, error: Exception) -> str:
    extra, package = _extra(spec, error), getattr(error, "name", None)
    if extra is not None:
        words = re.match(r"(\w+) is not installed", str(error))
        needed = package or (words[1] if words else "a package that is not installed")
        return f"needs {needed}: pip install 'gymnasium[{extra}]'"
    if package is not None:
        return f"needs the module {package}, which is not installed"
    return f"cannot be built: {one_line(error)}"  # its own words say what to install


def _extra(spec: EnvSpec, error: Exception) -> str | None:
    """The extra of gymnasium that brings what an environment of its own lacks."""
    entry = spec.entry_point
    if not isinstance(entry, str) or not entry.startswith(OWN):
        return None
    extras = {name.replace("_", "-") for name in metadata("gymnasium").get_all("Provides-Extra") or ()}
    family = entry.removeprefix(OWN).split(".")[0].replace("_", "-")
    named = str(getattr(error, "name", None)).split(".")[0]
    return next((name for name in (family, named) if name in extras), None)


def _taken(spec: EnvSpec) -> str:
    """The arguments that an environment takes, as far as its signature tells."""
    creator = spec.entry_point
    if creator is None:
        return ""
    parameters = inspect.signature(load_env_creator(creator) if isinstance(creator, str) else creator).parameters
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [name for name, it in parameters.items() if it.kind in kinds and name not in ("self", "render_mode")]
    return f"; it takes {', '.join(names)}" if names else "; it takes none"
