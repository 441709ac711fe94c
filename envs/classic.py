"""Gymnasium's classic control as a stable-baselines3 ``VecEnv``."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import TransformObservation
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecMonitor

POSITIONS = [0, 2]  # cart position and pole angle; 1 and 3 are their velocities
MAX_STACK = 2**20  # more would fill the memory before anything says so


def make_cartpole(
    num_envs: int, *, seed: int, velocities: bool = True, frame_stack: int = 1, render_mode: str | None = None
) -> VecEnv:
    """Build ``num_envs`` monitored copies of CartPole-v1, seeded ``seed, seed + 1, ...`` at their first reset.

    Args:
        num_envs: number of copies.
        seed: seed of the first copy.
        velocities: whether an observation has the two velocities. Without them it is (cart position, pole angle), of
            shape (2,), and the agent has to remember.
        frame_stack: number of latest observations in an observation, one behind the other, newest last.
        render_mode: ``rgb_array`` to draw the screen.

    Raises:
        ValueError: no environment asked for, or a stack or a seed out of range.
    """
    for name, value in (("num_envs", num_envs), ("frame_stack", frame_stack)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if frame_stack > MAX_STACK:
        raise ValueError(f"frame_stack must be <= {MAX_STACK:,}, got {frame_stack}")
    if not 0 <= seed < 2**31 - num_envs:
        raise ValueError(f"seed must lie in [0, 2**31 - num_envs), got {seed}")

    def make() -> gym.Env:
        env: gym.Env = gym.make("CartPole-v1", render_mode=render_mode)
        if velocities:
            return env
        full = env.observation_space
        assert isinstance(full, gym.spaces.Box)
        space = gym.spaces.Box(full.low[POSITIONS], full.high[POSITIONS], dtype=np.float32)
        return TransformObservation(env, lambda observation: observation[POSITIONS], space)

    env: VecEnv = VecMonitor(DummyVecEnv([make] * num_envs))
    env.seed(seed)
    return env if frame_stack == 1 else VecFrameStack(env, frame_stack)
