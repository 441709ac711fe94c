"""`distil`: by one call from a trained agent to a spiking one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from snn_rl import distil, load_policy
from snn_rl.runs.recipe import FRESH, SPIKING

TINY = {"parent_steps": 400, "distillation_updates": 5, "env_steps": 64}
SMALL = {"spiking": dataclasses.replace(SPIKING, **TINY), "fresh": dataclasses.replace(FRESH, **TINY), "episodes": 2}  # type: ignore[arg-type]


def test_a_relu_network_is_converted_and_pruned(tmp_path: Path) -> None:
    dqn = DQN("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [48, 32]}, device="cpu", seed=0)
    distilled = distil(dqn, "CartPole-v1", (3, 1), **SMALL)  # type: ignore[arg-type]
    assert [stage.name for stage in distilled.stages] == ["teacher", "T3", "T1"]
    assert distilled.agent is distilled["T1"].agent
    assert distilled.agent.timesteps == 1
    assert distilled.agent.policy.net_arch == [48, 32]
    assert all(len(stage.evaluation.returns) == 2 for stage in distilled.stages)
    agent = distilled.agent
    agent.save(tmp_path / "agent.safetensors")
    loaded = load_policy(tmp_path / "agent.safetensors")
    obs = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    ours, theirs = agent.predict(obs, deterministic=True), loaded.predict(obs)
    np.testing.assert_array_equal(ours[0], theirs[0])
    for a, b in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    before = agent.num_timesteps
    agent.learn(64, reset_num_timesteps=False)
    assert agent.num_timesteps == before + 64


def test_another_network_teaches_a_new_one_first() -> None:
    ppo = PPO("MlpPolicy", "Pendulum-v1", device="cpu", seed=0)
    distilled = distil(ppo, "Pendulum-v1", (2,), net_arch=(24,), **SMALL)  # type: ignore[arg-type]
    assert [stage.name for stage in distilled.stages] == ["teacher", "ann", "T2"]
    assert distilled["ann"].agent.timesteps is None  # type: ignore[union-attr]
    assert distilled.agent.policy.net_arch == [24]


def test_a_narrow_network_teaches_a_new_one_first() -> None:
    sac = SAC("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [16, 64]}, device="cpu", seed=0, buffer_size=10)
    distilled = distil(sac, "Pendulum-v1", (1,), **SMALL)  # type: ignore[arg-type]
    assert [stage.name for stage in distilled.stages] == ["teacher", "ann", "T1"]


def test_statistics_of_the_environment_move_into_the_agent(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("CartPole-v1", 2, seed=0))
    env.reset()
    for _ in range(50):
        env.step(np.ones(2, dtype=np.int64))
    env.training = False
    policy_kwargs = {"activation_fn": nn.ReLU}
    ppo = PPO("MlpPolicy", env, policy_kwargs=policy_kwargs, device="cpu", seed=0)
    agent = distil(ppo, env, (1,), **SMALL).agent  # type: ignore[arg-type]
    agent.save(tmp_path / "agent.safetensors")
    normalizer = load_policy(tmp_path / "agent.safetensors").policy.net.normalizer
    assert normalizer is not None
    raw = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    import torch

    np.testing.assert_array_equal(normalizer(torch.as_tensor(raw)).numpy(), env.normalize_obs(raw))


def test_bad_input_is_refused_before_anything_is_trained() -> None:
    ppo = PPO("MlpPolicy", "CartPole-v1", device="cpu")
    with pytest.raises(ValueError, match="schedule must be decreasing timesteps"):
        distil(ppo, "CartPole-v1", (1, 3))
    with pytest.raises(ValueError, match="a teacher must be an agent or a policy"):
        distil(gym.make("CartPole-v1"), "CartPole-v1")
    with pytest.raises(ValueError, match="gymnasium has no environment 'CartPole-v17'"):
        distil(ppo, "CartPole-v17")
    with pytest.raises(ValueError, match=r"observation_space is Box\(.*\(3,\).*the agent was trained on Box\("):
        distil(ppo, "Pendulum-v1")
