"""Environments that hide a part of the state from a student whose teacher sees all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from snn_rl.rl.spaces import in_one_line
from snn_rl.rl.statistics import Statistics
from snn_rl.rl.teacher import Observations, Teacher, teacher_of


class PartialObservation(VecEnvWrapper):
    """``venv`` with only the ``entries`` of each observation, which is a vector.

    ``whole`` holds the observations (n_envs, ...) that the last ones are a part of, for a `WholeObservationTeacher`.

    Raises:
        ValueError: observations that are no vectors, or entries that they do not have.
    """

    def __init__(self, venv: VecEnv, entries: Sequence[int]) -> None:
        space = venv.observation_space
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise ValueError(f"only vectors have entries to choose from, got {in_one_line(space)}")
        self.entries = np.asarray(entries, dtype=np.int64)
        if (
            self.entries.ndim != 1
            or not len(entries)
            or not ((self.entries >= 0) & (self.entries < space.shape[0])).all()
        ):
            raise ValueError(f"entries must be indices from 0 to {space.shape[0] - 1}, got {list(entries)}")
        part = spaces.Box(space.low[self.entries], space.high[self.entries], dtype=space.dtype.type)
        super().__init__(venv, part)
        self.whole: np.ndarray | None = None

    def reset(self) -> np.ndarray:
        return self._part(self.venv.reset())

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            if "terminal_observation" in info:
                info["terminal_observation"] = info["terminal_observation"][self.entries]
        return self._part(obs), rewards, dones, infos

    def _part(self, obs: Any) -> np.ndarray:
        self.whole = np.array(obs)  # a copy: some environments write into the array that they gave out
        return self.whole[:, self.entries]


class WholeObservationTeacher(Teacher):
    """A teacher that sees the whole observations behind those of ``env``, in which its student plays.

    It labels the observations that ``env`` gave out last, and no others.

    Raises:
        ValueError: a teacher that `teacher_of` refuses, or one of other observations than those behind ``env``.
    """

    def __init__(self, teacher: object, env: PartialObservation) -> None:
        whole = env.venv.observation_space
        self.teacher, self.env = teacher_of(teacher, whole), env
        if self.teacher.observation_space != whole:
            sees = in_one_line(self.teacher.observation_space)
            raise ValueError(f"the teacher sees {sees}, the environment is {in_one_line(whole)}")
        self.observation_space, self.action_space = env.observation_space, self.teacher.action_space
        self.head, self.exploration_rate = self.teacher.head, self.teacher.exploration_rate
        whole_statistics = self.teacher.statistics
        if whole_statistics is not None:  # a student normalises what it sees as its teacher does
            mean, var = (np.asarray(value)[env.entries] for value in (whole_statistics.mean, whole_statistics.var))
            self.statistics = Statistics(mean, var, whole_statistics.clip, whole_statistics.epsilon)

    @property
    def normalizes(self) -> bool:
        return True  # it takes what `env` gave out

    def label(
        self, observation: Observations, state: Any = None, episode_start: np.ndarray | None = None
    ) -> tuple[np.ndarray, Any]:
        whole = self.env.whole
        is_array = isinstance(observation, np.ndarray)
        if whole is None or not (is_array and np.array_equal(whole[:, self.env.entries], observation)):  # type: ignore[arg-type]
            raise ValueError("the observations are not those that the teacher's environment gave out last")
        return self.teacher.label(whole, state, episode_start)
