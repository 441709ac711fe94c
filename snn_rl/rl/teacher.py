"""Whose play a `SpikingDQN` learns from: any `Player`, and a teacher on a stack where the student sees one frame."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.preprocessing import maybe_transpose
from torch import Tensor

from snn_rl.rl.policy import SpikingDQNPolicy
from snn_rl.rl.replay import Windows, stacking_axis
from snn_rl.rl.spaces import channels_first, in_one_line


class Player(Protocol):
    """Whatever has the ``predict`` of SB3's algorithms: these, a `LoadedPolicy`, a `StackedTeacher`, or your own."""

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        """Actions (n_envs,) for observations (n_envs, ...), and the state that the next call gets, of any type."""
        ...


StackState = tuple[np.ndarray, ...]  # one array: the last stacked observation of each environment, (n_envs, ...)


def frames_of(stacked: spaces.Space, single: spaces.Space) -> int | None:
    """How many observations of ``single`` one of ``stacked`` holds along its stacking axis; None where it does not.

    Images are compared with their channels first, as SB3's algorithms see them.
    """
    stacked, single = channels_first(stacked), channels_first(single)
    if not (isinstance(stacked, spaces.Box) and isinstance(single, spaces.Box)) or stacked.dtype != single.dtype:
        return None
    if len(stacked.shape) != len(single.shape) or 0 in single.shape or not single.shape:
        return None
    axis = stacking_axis(stacked.shape)
    if stacked.shape[axis] % single.shape[axis]:
        return None
    frames = stacked.shape[axis] // single.shape[axis]
    # the bounds as SB3 declares them, which repeats each entry instead of the whole frame
    low, high = (np.repeat(bound, frames, axis) for bound in (single.low, single.high))
    return frames if np.array_equal(low, stacked.low) and np.array_equal(high, stacked.high) else None


class StackedTeacher:
    """An SB3 DQN on stacked frames, put into an environment that shows one frame at a time.

    It keeps the stack that its student has to remember. An episode begins with a stack of zeros, as SB3's
    ``VecFrameStack`` begins it. ``observation_space`` is the environment's or the student's: images whose channels are
    last are transposed, as SB3's algorithms do.

    Raises:
        ValueError: ``dqn`` is no SB3 DQN, or it spikes, or ``observation_space`` is not one frame of its own.
    """

    def __init__(self, dqn: DQN, observation_space: spaces.Space) -> None:
        if not isinstance(dqn, DQN):
            raise ValueError(f"StackedTeacher takes a stable_baselines3.DQN, got a {type(dqn).__name__}")
        if isinstance(dqn.policy, SpikingDQNPolicy):
            raise ValueError("StackedTeacher takes an ANN; a spiking agent remembers the frames itself")
        frames = frames_of(dqn.observation_space, observation_space)
        if frames is None:
            single, stacked = in_one_line(observation_space), in_one_line(dqn.observation_space)
            raise ValueError(f"{single} is not one frame of the teacher's {stacked}")
        self.dqn, self.frames = dqn, frames
        self.observation_space, self.action_space = channels_first(observation_space), dqn.action_space
        self.shape = dqn.observation_space.shape
        assert self.shape is not None
        self.axis = stacking_axis(self.shape)

    @property
    def exploration_rate(self) -> float:
        """The DQN's."""
        return self.dqn.exploration_rate

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: StackState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, StackState]:
        """Actions for single frames (n_envs, ...); the state is the stack that the frames have been pushed onto.

        Raises:
            ValueError: observations that are no batch of single frames.
        """
        assert isinstance(observation, np.ndarray)
        shape, observation = observation.shape, maybe_transpose(observation, self.observation_space)
        if observation.shape[1:] != self.observation_space.shape:
            wanted = ", ".join(map(str, ("n_envs", *(self.observation_space.shape or ()))))
            raise ValueError(f"observations must have shape ({wanted}), got {shape}")
        n = len(observation)
        stack = np.zeros((n, *self.shape), dtype=observation.dtype) if state is None else state[0].copy()  # type: ignore[misc]
        if episode_start is not None:
            stack[np.asarray(episode_start, dtype=bool)] = 0
        older = np.split(stack, self.frames, axis=self.axis + 1)[1:]
        stack = np.concatenate([*older, observation], axis=self.axis + 1)
        actions, _ = self.dqn.predict(stack, deterministic=deterministic)
        return actions, (stack,)

    def check_burn_in(self, burn_in: int) -> None:
        """Raise ValueError where a window's burn-in does not hold the older frames of its first stack."""
        if burn_in < self.frames - 1:
            raise ValueError(
                f"burn_in must be >= {self.frames - 1} for a teacher on {self.frames} frames, got {burn_in}"
            )

    def q_values(self, windows: Windows, start: int, length: int) -> Tensor:
        """Q-values (length, batch, actions) of the slots ``start .. start + length - 1``, on stacks from the window.

        Raises:
            ValueError: fewer than ``frames - 1`` slots before ``start``, so that the first stacks would lack frames.
        """
        self.check_burn_in(start)
        now = slice(start, start + length)
        frames = [windows.observations[now]]
        same_episode = torch.ones_like(windows.episode_start[now])  # as the newest frame
        for age in range(1, self.frames):
            same_episode = same_episode & ~windows.episode_start[start - age + 1 : start - age + 1 + length]
            frame = windows.observations[start - age : start - age + length]
            mask = same_episode.reshape(*same_episode.shape, *[1] * (frame.dim() - 2))
            frames.append(torch.where(mask, frame, torch.zeros_like(frame)))
        stacks = torch.cat(frames[::-1], dim=self.axis + 2)  # (length, batch, ...)
        return self.dqn.q_net(stacks.flatten(0, 1)).unflatten(0, stacks.shape[:2])
