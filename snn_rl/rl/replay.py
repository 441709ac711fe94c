"""Replay memory that stores each frame once and hands out contiguous windows.

Every environment has one timeline of *slots*. A slot is an observation, stored as its newest frame; where an action
was taken from it, the slot behind it is the observation that followed. So the timeline of an episode is

    o_0  o_1  o_2 ... o_n(terminal) | o_0 of the next episode ...

and stacked observations are rebuilt from neighbouring slots when they are sampled. Where a stack cannot be rebuilt
that way (an episode's first, or one whose older frames are not the ones before it), the older frames are laid down
as slots of their own, with no action: exact for any environment, at the price of a few slots per episode.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecFrameStack, VecNormalize
from torch import Tensor

from snn_rl.rl.observations import flat_dict
from snn_rl.rl.spaces import channels_first, check_action_space, check_observation_space


def frame_stack_of(env: VecEnv) -> int:
    """How many frames an environment stacks along the observation's `stacking_axis` (1 where it does not)."""
    inner = env
    while isinstance(inner, VecEnvWrapper):
        if isinstance(inner, VecFrameStack):
            space, stack = inner.observation_space, inner.stacked_obs
            if not isinstance(space, spaces.Box):
                return 1  # the parts of a Dict are stored whole
            axis = stack.repeat_axis % len(stack.stacked_shape)
            if channels_first(space) is not space:  # SB3 moves the channels of such images from last to first
                axis = (axis + 1) % 3
            return int(stack.n_stack) if axis == stacking_axis(stack.stacked_shape) else 1
        inner = inner.venv
    return 1 if isinstance(env.observation_space, spaces.Dict) else int(getattr(inner, "frame_stack", 1))


def stacking_axis(shape: tuple[int, ...]) -> int:
    """The axis of one observation along which frames are stacked: 0 of an image (channels first), else the last."""
    return 0 if len(shape) == 3 else len(shape) - 1


class Windows(NamedTuple):
    """Contiguous windows of the timelines, time first; ``length`` slots each."""

    observations: Tensor  # (length, batch, ...), of a Dict space the bytes of a `FlatDict`
    actions: Tensor  # (length, batch, *action_space.shape), int64 of discrete ones; 0 where none was taken
    rewards: Tensor  # (length, batch)
    acted: Tensor  # (length, batch), bool: an action was taken here, so the next slot follows from it
    terminated: Tensor  # (length, batch), bool: and it ended the episode, so that nothing may be bootstrapped
    episode_start: Tensor  # (length, batch), bool: membranes are cleared before this slot
    labels: Tensor  # (length, batch, label_size): a teacher's outputs; zeros where it was not asked
    labelled: Tensor  # (length, batch), bool: it was


class SequenceReplayBuffer(ReplayBuffer):
    """A `ReplayBuffer` for recurrent agents; `sample` serves SB3's own DQN (n-step), `sample_windows` the spiking one.

    Args:
        buffer_size: transitions in all, divided among the environments as SB3 does.
        observation_space, action_space, device, n_envs: as in SB3.
        optimize_memory_usage: changes nothing. Each frame is stored once in any case.
        frame_stack: how many frames an observation stacks along its `stacking_axis`; see `frame_stack_of`.
        n_steps, gamma: of the return that `sample` computes.
        label_size: numbers that a teacher says of an observation, see `label`.

    Dict observations are stored whole, as the bytes of a `FlatDict`, and so are those of `sample_windows`.

    Observations are kept unnormalised; samples are normalised by the ``VecNormalize`` passed in, as in SB3.

    Raises:
        ValueError: observations or actions that `check_observation_space` or `check_action_space` refuses, a size too
            small, or a stack that does not divide the observation.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        frame_stack: int = 1,
        n_steps: int = 1,
        gamma: float = 0.99,
        label_size: int = 0,
    ) -> None:
        check_observation_space(observation_space)
        check_action_space(action_space)
        # Not ReplayBuffer's own __init__, which takes memory for every stacked observation, twice.
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        self.buffer_size = buffer_size // n_envs  # slots per environment
        if self.buffer_size < 2:
            raise ValueError(f"buffer_size must be at least 2 per environment, got {buffer_size} for {n_envs}")
        if n_steps < 1:
            raise ValueError(f"n_steps must be >= 1, got {n_steps}")
        self.flat = flat_dict(observation_space)
        if self.flat is not None:
            if frame_stack != 1:
                raise ValueError(f"frame_stack must be 1 for Dict observations, got {frame_stack}")
            self.obs_shape = (self.flat.size,)
        shape = tuple(self.obs_shape)
        self.axis = stacking_axis(shape)
        if frame_stack < 1 or shape[self.axis] % frame_stack:
            raise ValueError(f"frame_stack must divide axis {self.axis} of the observation {shape}, got {frame_stack}")
        self.frame_stack, self.n_steps, self.gamma = frame_stack, n_steps, gamma
        self.width = shape[self.axis] // frame_stack  # of one frame along the stacking axis
        frame_shape = (*shape[: self.axis], self.width, *shape[self.axis + 1 :])
        self.optimize_memory_usage = False
        self.handle_timeout_termination = handle_timeout_termination
        slots = (n_envs, self.buffer_size)
        dtype = np.uint8 if self.flat is not None else observation_space.dtype
        self.frames = np.zeros((*slots, *frame_shape), dtype=dtype)
        assert action_space.shape is not None
        self.action_shape = action_space.shape
        discrete = np.issubdtype(action_space.dtype, np.integer)
        self.slot_actions = np.zeros((*slots, *self.action_shape), np.int64 if discrete else action_space.dtype)
        self.labels = np.zeros((*slots, label_size), dtype=np.float32)
        self.labelled = np.zeros(slots, dtype=bool)
        self.slot_rewards = np.zeros(slots, dtype=np.float32)
        self.acted = np.zeros(slots, dtype=bool)
        self.terminated = np.zeros(slots, dtype=bool)
        self.episode_start = np.zeros(slots, dtype=bool)
        # Slots ever written per environment; the newest is `count - 1`, the oldest still held `count - buffer_size`.
        self.count = np.zeros(n_envs, dtype=np.int64)
        self.newest: np.ndarray | None = None  # (n_envs, ...), the observation in each environment's newest slot
        self.open = np.zeros(n_envs, dtype=bool)  # the newest slot waits for its action

    # --- writing

    def add(
        self,
        obs: np.ndarray | dict[str, np.ndarray],
        next_obs: np.ndarray | dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Store one transition per environment; ``next_obs`` holds terminal observations where ``done``, as in SB3.

        Raises:
            ValueError: NaN or infinity from an environment (nothing is stored), or an observation that is no stack.
        """
        shape = (self.n_envs, *self.obs_shape)
        actions, rewards = (
            np.asarray(action).reshape(self.n_envs, *self.action_shape),
            np.asarray(reward).reshape(self.n_envs),
        )
        checked = [("reward", rewards)]
        for given in (obs, next_obs):
            parts = given.items() if isinstance(given, dict) else [("", given)]
            checked += [(f"observation {key!r}" if key else "observation", np.asarray(part)) for key, part in parts]
        for name, values in checked:
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                i = int(np.argwhere(~np.isfinite(values))[0, 0])
                raise ValueError(f"the {name} of environment {i} holds NaN or infinity: repair the environment")
        obs, next_obs = (
            (np.asarray(given) if self.flat is None else self.flat.encode(given)).reshape(shape)  # type: ignore[arg-type]
            for given in (obs, next_obs)
        )
        if self.newest is None:
            self.newest = np.empty(shape, dtype=self.frames.dtype)
        for i in range(self.n_envs):
            if not (self.open[i] and np.array_equal(obs[i], self.newest[i])):
                stack = self._frames_of(obs[i])
                for age, frame in enumerate(stack, start=1 - len(stack)):
                    self._write(i, frame, episode_start=age == 0)
            slot = (self.count[i] - 1) % self.buffer_size
            truncated = self.handle_timeout_termination and infos[i].get("TimeLimit.truncated", False)
            self.slot_actions[i, slot] = actions[i]
            self.slot_rewards[i, slot] = rewards[i]
            self.acted[i, slot] = True
            self.terminated[i, slot] = bool(done[i]) and not truncated
            # A terminal observation went through VecNormalize and back: its older frames match to rounding only.
            if self.frame_stack > 1 and not done[i] and not self._follows(obs[i], next_obs[i]):
                raise ValueError(
                    f"frame_stack is {self.frame_stack}, but the observation of environment {i} is not its predecessor "
                    "moved on by one frame; pass replay_buffer_kwargs=dict(frame_stack=1)"
                )
            self._write(i, self._frames_of(next_obs[i])[-1], episode_start=False)
            self.open[i] = not done[i]
        self.newest[:] = next_obs
        self.full = bool((self.count >= self.buffer_size).all())
        self.pos = int(self.count.min() % self.buffer_size)

    def label(self, labels: np.ndarray) -> None:
        """What a teacher says, (n_envs, label_size), of the observations that were last acted on, after `add`."""
        env = np.arange(self.n_envs)
        slot = (self.count - 2) % self.buffer_size  # the newest holds the observation that followed
        self.labels[env, slot] = labels
        self.labelled[env, slot] = True

    def _frames_of(self, observation: np.ndarray) -> list[np.ndarray]:
        """The frames of one stacked observation, oldest first."""
        return np.split(observation, self.frame_stack, axis=self.axis)

    def _follows(self, obs: np.ndarray, next_obs: np.ndarray) -> bool:
        return all(map(np.array_equal, self._frames_of(obs)[1:], self._frames_of(next_obs)[:-1]))

    def _write(self, i: int, frame: np.ndarray, *, episode_start: bool) -> None:
        slot = self.count[i] % self.buffer_size
        self.frames[i, slot] = frame
        self.acted[i, slot] = self.terminated[i, slot] = self.labelled[i, slot] = False
        self.slot_actions[i, slot] = self.slot_rewards[i, slot] = 0
        self.episode_start[i, slot] = episode_start
        self.count[i] += 1

    def reset(self) -> None:
        """Forget everything that was stored."""
        super().reset()
        self.count[:] = 0
        self.open[:] = False

    def size(self) -> int:
        """Slots held per environment (the least of all environments)."""
        return int(min(self.count.min(), self.buffer_size))

    # --- reading

    def _observations(self, env: np.ndarray, slot: np.ndarray, normalizer: VecNormalize | None) -> Tensor:
        """Rebuild the observations of any shape of ``env`` and absolute ``slot`` indices: (*env.shape, *obs_shape)."""
        offsets = np.arange(1 - self.frame_stack, 1)
        stacks = self.frames[env[..., None], (slot[..., None] + offsets) % self.buffer_size]  # (..., stack, *frame)
        # the stack goes right before the axis along which frames are concatenated
        stacks = np.moveaxis(stacks, slot.ndim, slot.ndim + self.axis)
        flat = stacks.reshape(-1, *self.obs_shape)
        observations = torch.as_tensor(self._normalised(flat, normalizer), device=self.device)
        return self._fast(observations).reshape(*slot.shape, *self.obs_shape)

    def _normalised(self, observations: np.ndarray, normalizer: VecNormalize | None) -> np.ndarray:
        """Observations (n, *obs_shape) as ``normalizer`` makes them."""
        if self.flat is None or normalizer is None:
            return self._normalize_obs(observations, normalizer)  # type: ignore[return-value]
        parts = self.flat.decode(torch.from_numpy(observations))
        return self.flat.encode(normalizer.normalize_obs({key: part.numpy() for key, part in parts.items()}))  # type: ignore[arg-type]

    def _stacks(self, env: np.ndarray, start: np.ndarray, length: int) -> Tensor:
        """`_observations` of ``length`` slots in sequence, (length, batch, *obs_shape): each frame is copied once."""
        slot = start + np.arange(1 - self.frame_stack, length)[:, None]
        frames = torch.as_tensor(self.frames[env, slot % self.buffer_size], device=self.device)
        stacks = frames.unfold(0, self.frame_stack, 1)  # (length, batch, *frame, stack)
        observations = stacks.movedim(-1, 2 + self.axis).reshape(-1, *self.obs_shape)
        return self._fast(observations).reshape(length, -1, *self.obs_shape)

    @staticmethod
    def _fast(observations: Tensor) -> Tensor:
        """Images in the order that convolutions walk fastest; changing it is cheapest while a pixel is a byte."""
        return observations.contiguous(memory_format=torch.channels_last) if observations.dim() == 4 else observations

    def _rewards(self, env: np.ndarray, slot: np.ndarray, normalizer: VecNormalize | None) -> np.ndarray:
        rewards = self.slot_rewards[env, slot % self.buffer_size]
        return self._normalize_reward(rewards, normalizer).astype(np.float32)

    def _oldest(self) -> np.ndarray:
        """The oldest absolute slot of each environment whose whole stack is still held."""
        return np.maximum(self.count - self.buffer_size, 0) + self.frame_stack - 1

    def holds_windows(self, length: int) -> bool:
        """Whether every environment has stored at least one window of ``length`` slots."""
        return bool((self.count - self._oldest() >= length).all())

    def sample_windows(self, batch_size: int, length: int, env: VecNormalize | None = None) -> Windows:
        """``batch_size`` windows of ``length`` contiguous slots, each within one environment's timeline.

        Raises:
            ValueError: the timelines are still shorter than a window.
        """
        oldest, starts = self._oldest(), self.count - self._oldest() - length + 1
        if (starts < 1).any():
            raise ValueError(
                f"a window of {length} slots was asked for, but only {int((self.count - oldest).min())} are stored per "
                "environment; collect more steps first (learning_starts)"
            )
        # Long timelines weigh as much as they hold, so that every window is as likely as any other.
        column = np.random.choice(self.n_envs, size=batch_size, p=starts / starts.sum())
        start = oldest[column] + np.random.randint(0, starts[column])
        slot = start + np.arange(length)[:, None]  # (length, batch)
        observations = self._stacks(column, start, length) if env is None else self._observations(column, slot, env)
        column = np.broadcast_to(column, slot.shape)
        ring = slot % self.buffer_size

        def tensor(array: np.ndarray) -> Tensor:
            return torch.as_tensor(array[column, ring], device=self.device)

        return Windows(
            observations=observations,
            actions=tensor(self.slot_actions),
            rewards=torch.as_tensor(self._rewards(column, slot, env), device=self.device),
            acted=tensor(self.acted),
            terminated=tensor(self.terminated),
            episode_start=tensor(self.episode_start),
            labels=tensor(self.labels),
            labelled=tensor(self.labelled),
        )

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """Single n-step transitions, as SB3's ``NStepReplayBuffer`` samples them, for a feed-forward DQN."""
        oldest = self._oldest()
        held = self.count - oldest
        if (held < 2).any():
            raise ValueError("no transition is stored yet; collect steps first (learning_starts)")
        column = np.empty(0, dtype=np.int64)
        slot = np.empty(0, dtype=np.int64)
        while len(slot) < batch_size:  # redraw the few slots from which no action was taken
            drawn = np.random.choice(self.n_envs, size=batch_size, p=held / held.sum())
            at = oldest[drawn] + np.random.randint(0, held[drawn])
            acted = self.acted[drawn, at % self.buffer_size]
            column = np.concatenate([column, drawn[acted]])[:batch_size]
            slot = np.concatenate([slot, at[acted]])[:batch_size]
        returns = np.zeros(batch_size, dtype=np.float32)
        steps = np.zeros(batch_size, dtype=np.int64)
        going = np.ones(batch_size, dtype=bool)
        terminated = np.zeros(batch_size, dtype=bool)
        for _ in range(self.n_steps):
            here = slot + steps
            going &= self.acted[column, here % self.buffer_size]
            returns += going * self.gamma**steps * self._rewards(column, here, env)
            terminated |= going & self.terminated[column, here % self.buffer_size]
            steps += going
        before, after = (self._observations(column, at, env) for at in (slot, slot + steps))
        return ReplayBufferSamples(
            observations=before if self.flat is None else self.flat.decode(before),  # type: ignore[arg-type]
            actions=self.to_torch(self.slot_actions[column, slot % self.buffer_size].reshape(batch_size, -1)),
            next_observations=after if self.flat is None else self.flat.decode(after),  # type: ignore[arg-type]
            dones=self.to_torch(terminated[:, None].astype(np.float32)),
            rewards=self.to_torch(returns[:, None].astype(np.float32)),
            discounts=self.to_torch((self.gamma**steps)[:, None].astype(np.float32)),
        )
