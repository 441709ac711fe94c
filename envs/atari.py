"""Atari games: ale-py's C++ vector environment as a stable-baselines3 ``VecEnv``.

Preprocessing is the usual one (Machado et al. 2018): up to 30 no-ops at a start, frame skip 4 with a maximum
over the last two frames, grey scale, resize, frame stack. Rewards are clipped for learning only: the monitor,
and so every reported return, sees the game's own score.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecMonitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

SCREEN = (210, 160)  # height and width of the RGB screen that `render_mode="rgb_array"` shows
MAX_OBSERVATION = 2**24  # pixels, as many as a policy file takes; more would fill the memory before anything says so


class AtariVecEnv(VecEnv):
    """``num_envs`` copies of one Atari game; observations are uint8, (frame_stack, image_size, image_size).

    Copy ``i`` is seeded with ``seed + i``. ``frame_stack`` frames are stacked along axis 0, newest last.
    With ``render_mode="rgb_array"`` a second emulator per copy, same seed and same actions, draws the RGB screen;
    ALE's random numbers come from the seed alone, so both stay in step, sticky actions included.

    Raises:
        ValueError: unknown game, or a size, stack, episode length, probability or seed out of range.
    """

    def __init__(
        self,
        game: str,
        num_envs: int,
        *,
        seed: int,
        image_size: int = 84,
        frame_stack: int = 4,
        sticky: float = 0.0,
        max_episode_frames: int = 108_000,
        render_mode: str | None = None,
    ) -> None:
        if game not in roms.get_all_rom_ids():
            raise ValueError(
                f"unknown Atari game {game!r}; names are ale-py's snake_case ones such as 'pong' or 'ms_pacman'"
            )
        for name, value in (
            ("num_envs", num_envs),
            ("image_size", image_size),
            ("frame_stack", frame_stack),
            ("max_episode_frames", max_episode_frames),
        ):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if frame_stack * image_size**2 > MAX_OBSERVATION:
            raise ValueError(
                f"an observation must have at most {MAX_OBSERVATION:,} pixels, got frame_stack {frame_stack} of "
                f"image_size {image_size}"
            )
        if not 0.0 <= sticky <= 1.0:
            raise ValueError(f"sticky must be a probability in [0, 1], got {sticky}")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be None or 'rgb_array', got {render_mode!r}")

        def emulators(height: int, width: int, *, grayscale: bool, stack: int) -> AtariVectorEnv:
            return AtariVectorEnv(
                game,
                num_envs,
                num_threads=min(num_envs, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1),
                max_num_frames_per_episode=max_episode_frames,
                repeat_action_probability=sticky,
                autoreset_mode=AutoresetMode.SAME_STEP,
                img_height=height,
                img_width=width,
                grayscale=grayscale,
                stack_num=stack,
                reward_clipping=False,  # the monitor records the game's own score; see `make_atari`
            )

        self.game = game
        self.frame_stack = frame_stack
        self.render_mode = render_mode
        self._envs = emulators(image_size, image_size, grayscale=True, stack=frame_stack)
        self._screens = emulators(*SCREEN, grayscale=False, stack=1) if render_mode else None
        self._images: np.ndarray | None = None  # (num_envs, 1, 210, 160, 3)
        self._actions: np.ndarray | None = None
        super().__init__(num_envs, self._envs.single_observation_space, self._envs.single_action_space)
        self.seed(seed)

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed copy ``i`` with ``seed + i`` at the next reset; None draws a seed from numpy's global generator.

        Raises:
            ValueError: a seed that does not fit the emulator's 32-bit signed integer.
        """
        limit = 2**31 - self.num_envs
        if seed is None:  # drawn here because SB3's own draw is unsigned, which the emulator refuses every other time
            seed = int(np.random.randint(limit))
        if not 0 <= seed < limit:
            raise ValueError(f"seed must lie in [0, 2**31 - num_envs), got {seed}")
        return super().seed(seed)

    def reset(self) -> np.ndarray:
        # -1 lets an emulator's generator run on: only the first reset after `seed` starts it afresh
        seeds = np.array([-1 if seed is None else seed for seed in self._seeds])
        observations, _ = self._envs.reset(seed=seeds)
        if self._screens is not None:
            self._images = self._screens.reset(seed=seeds)[0]
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        # Checked here because an out-of-range action ends the emulator's worker thread and blocks for ever.
        actions = np.asarray(actions)
        n = int(self.action_space.n)  # type: ignore[attr-defined]
        if actions.shape != (self.num_envs,) or not np.issubdtype(actions.dtype, np.integer):
            raise ValueError(
                f"actions must be {self.num_envs} integers, got shape {actions.shape} of dtype {actions.dtype}"
            )
        if actions.min() < 0 or actions.max() >= n:
            raise ValueError(f"actions of {self.game} lie in [0, {n - 1}], got {actions.tolist()}")
        self._actions = actions.astype(np.int64)

    def step_wait(self) -> VecEnvStepReturn:
        if self._actions is None:
            raise ValueError("step_wait called before step_async")
        observations, rewards, terminations, truncations, info = self._envs.step(self._actions)
        if self._screens is not None:
            self._images = self._screens.step(self._actions)[0]
        self._actions = None
        dones = terminations | truncations
        infos: list[dict[str, Any]] = [{"lives": int(lives)} for lives in info["lives"]]
        for i in np.flatnonzero(dones):
            infos[i]["terminal_observation"] = info["final_obs"][i]
            infos[i]["TimeLimit.truncated"] = bool(truncations[i] and not terminations[i])
        return observations, rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        # The C++ workers end with their object; there is nothing else to release.
        self._envs = self._screens = None  # type: ignore[assignment]

    def get_images(self) -> Sequence[np.ndarray | None]:
        return [None] * self.num_envs if self._images is None else list(self._images[:, 0])

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        raise AttributeError(f"the copies of {self.game} share one C++ object: {attr_name!r} cannot be set per copy")

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        raise AttributeError(f"the copies of {self.game} live in C++ and have no method {method_name!r}")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))


class VecClipReward(VecEnvWrapper):
    """Replace each reward by its sign, as the Nature DQN does. Stands above the monitor, which keeps the score."""

    def reset(self) -> np.ndarray:
        return self.venv.reset()  # type: ignore[return-value]

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, dones, infos = self.venv.step_wait()
        return observations, np.sign(rewards), dones, infos


def make_atari(
    game: str,
    num_envs: int,
    *,
    seed: int,
    image_size: int = 84,
    frame_stack: int = 4,
    sticky: float = 0.0,
    max_episode_frames: int = 108_000,
    clip_reward: bool = True,
    render_mode: str | None = None,
) -> VecEnv:
    """Build ``num_envs`` monitored copies of an Atari game, seeded ``seed, seed + 1, ...``.

    Args:
        game: ale-py's name of the game, such as ``pong``.
        num_envs: number of copies.
        seed: seed of the first copy.
        image_size: height and width of an observation in pixels.
        frame_stack: number of latest frames in an observation.
        sticky: probability that the game repeats the last action: 0 in the paper, 0.25 in Machado et al. (2018).
        max_episode_frames: emulator frames, 60 a second, after which an episode is cut off.
        clip_reward: whether agents see the sign of a reward only; returns are those of the game either way.
        render_mode: ``rgb_array`` to draw the screen.

    Raises:
        ValueError: as `AtariVecEnv`.
    """
    env: VecEnv = VecMonitor(
        AtariVecEnv(
            game,
            num_envs,
            seed=seed,
            image_size=image_size,
            frame_stack=frame_stack,
            sticky=sticky,
            max_episode_frames=max_episode_frames,
            render_mode=render_mode,
        )
    )
    return VecClipReward(env) if clip_reward else env
