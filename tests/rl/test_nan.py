"""One observation of NaN: it stays in the membranes until the episode ends, and no longer, on every path."""

from __future__ import annotations

import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env

from snn_rl import SpikingDQN
from snn_rl.core.events import CALLS_BEFORE_LAYOUT


@pytest.mark.parametrize("n_envs", [1, 8])  # by events, and layer by layer
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_episode_start_clears_what_a_broken_observation_left(n_envs: int, value: float) -> None:
    kwargs = {"net_arch": [32, 32], "timesteps": 2}
    env = make_vec_env("CartPole-v1", n_envs, seed=0)
    agent = SpikingDQN("MlpPolicy", env, policy_kwargs=kwargs, buffer_size=1000, seed=0, device="cpu")
    rng = np.random.default_rng(0)
    for _ in range(CALLS_BEFORE_LAYOUT + 1):
        agent.predict(np.zeros((n_envs, 4), np.float32), deterministic=True)
    assert agent.q_net._events is not None
    assert (agent.q_net._events._layout is not None) == (n_envs == 1)
    broken = rng.normal(size=(n_envs, 4)).astype(np.float32)
    broken[0] = value
    _, state = agent.predict(broken, deterministic=True)
    assert not all(np.isfinite(carry).all() for carry in state)
    obs = rng.normal(size=(n_envs, 4)).astype(np.float32)
    starts = np.arange(n_envs) == 0
    actions, after = agent.predict(obs, state, starts, deterministic=True)
    clean = tuple(np.where(starts.reshape(-1, *[1] * (carry.ndim - 1)), 0, carry) for carry in state)
    expected, wanted = agent.predict(obs, clean, deterministic=True)
    np.testing.assert_array_equal(actions, expected)
    for ours, theirs in zip(after, wanted, strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_array_equal(ours, theirs)
