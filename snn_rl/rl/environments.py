"""Environments as agents take them: images channels first, and failures as errors of one line."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import (
    VecEnv,
    VecEnvWrapper,
    VecNormalize,
    VecTransposeImage,
    is_vecenv_wrapped,
)
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from snn_rl.base.progress import one_line
from snn_rl.rl.spaces import channels_first

Result = TypeVar("Result")


class EnvironmentFailedError(ValueError):
    """An environment raised an error, which is the ``__cause__``."""


def transposed(env: VecEnv) -> VecEnv:
    """``env`` with its images channels first, where SB3's algorithms would transpose them."""
    space = env.observation_space
    done = is_vecenv_wrapped(env, VecTransposeImage) or channels_first(space) == space
    return env if done else VecTransposeImage(env)


def without_normalization(env: VecEnv) -> VecEnv:
    """What a ``VecNormalize`` at the top of ``env`` wraps; ``env`` itself where there is none."""
    return env.venv if isinstance(env, VecNormalize) else env


def named(env: VecEnv, description: str) -> VecEnv:
    """``env`` with its images channels first and in `NamedFailures`, both below a ``VecNormalize`` at its top."""
    if isinstance(env, VecNormalize):
        env.venv = NamedFailures(env.venv, description)  # of images, whose channels would move, it is refused
        return env
    return NamedFailures(transposed(env), description)


class NamedFailures(VecEnvWrapper):
    """``venv``, whose errors become an `EnvironmentFailedError` that begins with its ``description``.

    An error in an environment comes from code that is not ours: the message tells it apart from our own.
    """

    def __init__(self, venv: VecEnv, description: str) -> None:
        super().__init__(venv)
        self._description = description
        self._failed = False

    def reset(self) -> VecEnvObs:
        return self._call(self.venv.reset)

    def step_async(self, actions: np.ndarray) -> None:
        self._call(lambda: self.venv.step_async(actions))

    def step_wait(self) -> VecEnvStepReturn:
        return self._call(self.venv.step_wait)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return self._call(lambda: self.venv.env_is_wrapped(wrapper_class, indices))

    def close(self) -> None:
        if not self._failed:
            self._call(self.venv.close)
            return
        with suppress(Exception):  # what has failed may fail to close, and would hide its first error
            self.venv.close()

    def _call(self, method: Callable[[], Result]) -> Result:
        try:
            return method()
        except Exception as error:
            self._failed = True
            raise EnvironmentFailedError(f"{self._description} failed: {why(error)}") from error


def why(error: Exception) -> str:
    """An environment's error in one line."""
    if isinstance(error, EOFError | ConnectionError):  # of the pipe to a process, which tells nothing of it
        return f"a process that it runs in has ended ({type(error).__name__}); look above for its own error"
    return one_line(error)
