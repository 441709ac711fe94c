"""Returns as SB3 counts them; spikes of the counted episodes alone."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from snn_rl import SpikingDQN, count_spikes
from snn_rl.evaluation import evaluate


def agent(**kwargs: Any) -> SpikingDQN:
    env = make_vec_env("CartPole-v1", 1, seed=0)
    return SpikingDQN("MlpPolicy", env, policy_kwargs={"net_arch": [16]}, buffer_size=100, seed=0, device="cpu")


def test_returns_are_those_of_sb3s_evaluate_policy() -> None:
    model = agent()
    ours = evaluate(model, make_vec_env("CartPole-v1", 3, seed=5), 7)
    returns, lengths = evaluate_policy(
        model, make_vec_env("CartPole-v1", 3, seed=5), 7, return_episode_rewards=True, deterministic=True
    )
    assert ours.returns == returns
    assert ours.lengths == lengths


def test_spikes_are_counted_in_the_counted_episodes_alone() -> None:
    """Two environments at once, whose episodes differ in length, against the same episodes one at a time."""
    model = agent()
    seeds = (3, 8)
    lengths, spikes, inferences = [], 0.0, 0
    for seed in seeds:
        with count_spikes(model.q_net.network) as counter:
            alone = evaluate(model, make_vec_env("CartPole-v1", 1, seed=seed), 1)
        lengths += alone.lengths
        spikes += sum(counter.spikes.values())
        inferences += sum(counter.inferences.values())
    assert lengths[0] != lengths[1]
    assert inferences == sum(lengths)
    env = make_vec_env("CartPole-v1", 2, seed=0)
    env._seeds = list(seeds)  # type: ignore[attr-defined]  # of the next reset
    together = evaluate(model, env, 2)
    assert sorted(together.lengths) == sorted(lengths)
    assert together.activity is not None
    assert together.activity.mean == pytest.approx(spikes / inferences / 16)


def test_environments_without_a_monitor_are_refused() -> None:
    with pytest.raises(ValueError, match="must be monitored: wrap them in VecMonitor"):
        evaluate(agent(), DummyVecEnv([lambda: gym.make("CartPole-v1")]), 1)


def test_other_spaces_and_no_episodes_are_refused() -> None:
    env = make_vec_env("Acrobot-v1", 1)
    with pytest.raises(ValueError, match=r"the agent's observation_space is Box.*, the environment's Box"):
        evaluate(agent(), env, 1)
    with pytest.raises(ValueError, match="episodes must be >= 1, got 0"):
        evaluate(agent(), env, 0)
    assert np.isfinite(evaluate(agent(), make_vec_env("CartPole-v1", 1, seed=0), 1).mean)
