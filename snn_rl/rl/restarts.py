"""Training environments that show how episodes start more often than episodes end."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from snn_rl.rl.replay import frame_stack_of


class RestartingVecEnv(VecEnv):
    """``whole`` and ``restarting`` as one ``VecEnv``, copies in this order; the second is reset every ``every`` steps.

    In a deterministic game greedy episodes differ by their starts alone and soon all go the same way, so that a student
    of them learns most of what decides them from their first steps. A cut is a time limit that is bootstrapped over
    (Pardo et al. 2018, partial episodes): it is reported as a truncation. All copies are cut at once, however long
    their episodes are by then. What a monitor says of the second's episodes is left out: only the short ones end.

    Raises:
        ValueError: ``every`` below 1, spaces that differ, or a ``VecNormalize`` inside, of which there would be two.
    """

    def __init__(self, whole: VecEnv, restarting: VecEnv, every: int) -> None:
        if every < 1:
            raise ValueError(f"every must be >= 1, got {every}")
        for name in ("observation_space", "action_space"):
            ours, theirs = getattr(whole, name), getattr(restarting, name)
            if ours != theirs:
                raise ValueError(f"both must have the same {name}, got {ours} and {theirs}; build them alike")
        if unwrap_vec_normalize(whole) is not None or unwrap_vec_normalize(restarting) is not None:
            raise ValueError(
                "environments inside must not be normalized; leave VecNormalize out of make_env or do not restart"
            )
        self.parts = (whole, restarting)
        self.every = every
        self.frame_stack = frame_stack_of(whole)
        self._steps = 0  # of the restarting ones, since they were last reset
        super().__init__(sum(part.num_envs for part in self.parts), whole.observation_space, whole.action_space)

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        whole, restarting = self.parts
        second = None if seed is None else seed + whole.num_envs
        return [*whole.seed(seed), *restarting.seed(second)]

    def set_options(self, options: list[dict[str, Any]] | dict[str, Any] | None = None) -> None:
        super().set_options(options)
        whole, restarting = self.parts
        whole.set_options(self._options[: whole.num_envs])
        restarting.set_options(self._options[whole.num_envs :])

    def reset(self) -> VecEnvObs:
        self._steps = 0
        return _joined(*(part.reset() for part in self.parts))

    def step_async(self, actions: np.ndarray) -> None:
        whole, restarting = self.parts
        whole.step_async(actions[: whole.num_envs])
        restarting.step_async(actions[whole.num_envs :])

    def step_wait(self) -> VecEnvStepReturn:
        first, (obs, rewards, dones, infos) = (part.step_wait() for part in self.parts)
        for info in infos:
            info.pop("episode", None)
        self._steps += 1
        if self._steps == self.every:
            last = copy.deepcopy(obs)  # a reset may write into the array that a step gave out
            obs = self.parts[1].reset()
            for i in np.flatnonzero(~dones):
                own = {key: part[i] for key, part in last.items()} if isinstance(last, dict) else last[i]
                infos[i].update({"terminal_observation": own, "TimeLimit.truncated": True})
            dones = np.ones_like(dones)
            self._steps = 0
        obs_whole, rewards_whole, dones_whole, infos_whole = first
        return (
            _joined(obs_whole, obs),
            np.concatenate([rewards_whole, rewards]),
            np.concatenate([dones_whole, dones]),
            [*infos_whole, *infos],
        )

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        return [image for part in self.parts for image in part.get_images()]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [part.get_attr(attr_name, [i])[0] for part, i in self._copies(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        for part, i in self._copies(indices):
            part.set_attr(attr_name, value, [i])

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        return [part.env_method(method_name, *args, indices=[i], **kwargs)[0] for part, i in self._copies(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return [part.env_is_wrapped(wrapper_class, [i])[0] for part, i in self._copies(indices)]

    def _copies(self, indices: VecEnvIndices) -> list[tuple[VecEnv, int]]:
        copies = [(part, i) for part in self.parts for i in range(part.num_envs)]
        return [copies[i] for i in self._get_indices(indices)]


def _joined(first: VecEnvObs, second: VecEnvObs) -> VecEnvObs:
    """The observations of all copies, (num_envs, ...), or those of each key."""
    if isinstance(first, dict):
        assert isinstance(second, dict)
        return {key: np.concatenate([part, second[key]]) for key, part in first.items()}
    return np.concatenate([first, second])
