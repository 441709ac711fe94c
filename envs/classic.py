"""Gymnasium's classic control as a stable-baselines3 ``VecEnv``."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import TransformObservation
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor

POSITIONS = [0, 2]  # cart position and pole angle; 1 and 3 are their velocities


def make_cartpole(num_envs: int, *, seed: int, velocities: bool = True, render_mode: str | None = None) -> VecEnv:
    """Build ``num_envs`` monitored copies of CartPole-v1, seeded ``seed, seed + 1, ...`` at their first reset.

    With ``velocities=False`` an observation is (cart position, pole angle), shape (2,): the agent has to remember.

    Raises:
        ValueError: no environment asked for, or a seed out of range.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be >= 1, got {num_envs}")
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

    env = VecMonitor(DummyVecEnv([make] * num_envs))
    env.seed(seed)
    return env
