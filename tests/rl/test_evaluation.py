"""Returns as SB3 counts them; spikes of the counted episodes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    sync_envs_normalization,
)

from snn_rl import SpikingDQN, count_spikes, load_policy, save_policy
from snn_rl.rl.evaluation import evaluate


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


# --- normalized observations


def normalized(n: int, seed: int, **kwargs: Any) -> VecNormalize:
    return VecNormalize(make_vec_env("CartPole-v1", n, seed=seed), norm_reward=False, **kwargs)


@pytest.fixture(scope="module")
def trained() -> DQN:
    """In a `VecNormalize`, whose statistics have moved."""
    model = DQN(
        "MlpPolicy", normalized(2, 0), policy_kwargs={"net_arch": [16]}, learning_starts=600, device="cpu", seed=0
    )
    return model.learn(500)


def synced(model: DQN, **kwargs: Any) -> VecNormalize:
    env = normalized(3, 5, **kwargs)
    sync_envs_normalization(model.get_env(), env)
    env.training = False
    return env


def test_normalized_episodes_are_those_of_evaluate_policy(trained: DQN) -> None:
    env = synced(trained)
    before = env.obs_rms.mean.copy()
    ours = evaluate(trained, env, 6)
    returns, lengths = evaluate_policy(trained, synced(trained), 6, return_episode_rewards=True)
    assert (ours.returns, ours.lengths) == (returns, lengths)
    np.testing.assert_array_equal(env.obs_rms.mean, before)


def test_other_statistics_than_the_agents_are_refused(trained: DQN) -> None:
    fresh, moved = normalized(3, 5), synced(trained)
    moved.obs_rms.var[0] *= 1.001
    fresh.training = False
    for env in (fresh, moved, synced(trained, clip_obs=1.0), make_vec_env("CartPole-v1", 3, seed=5)):
        with pytest.raises(
            ValueError, match=r"was trained on normalized observations; .* copy the statistics: SB3's sync"
        ):
            evaluate(trained, env, 3)
    frozen = normalized(3, 5, training=False)
    with pytest.raises(ValueError, match="was trained on observations as they are; leave VecNormalize out"):
        evaluate(agent(), frozen, 3)
    rewards = VecNormalize(make_vec_env("CartPole-v1", 3, seed=5), norm_obs=False, training=False)
    assert evaluate(agent(), rewards, 3) == evaluate(agent(), make_vec_env("CartPole-v1", 3, seed=5), 3)


def test_statistics_that_evaluation_would_change_are_refused(trained: DQN) -> None:
    own = trained.get_env()
    assert isinstance(own, VecNormalize)
    before = own.obs_rms.count
    with pytest.raises(ValueError, match="would change its statistics while it evaluates; set its training = False"):
        evaluate(trained, own, 2)
    assert own.obs_rms.count == before


def test_an_agent_without_an_environment_needs_statistics_that_were_collected(trained: DQN, tmp_path: Path) -> None:
    trained.save(tmp_path / "model.zip")
    alone = DQN.load(tmp_path / "model.zip", device="cpu")
    with pytest.raises(ValueError, match="has no statistics yet; copy those that the agent was trained with"):
        evaluate(alone, normalized(3, 5, training=False), 3)
    assert evaluate(alone, synced(trained), 6) == evaluate(trained, synced(trained), 6)
    moving = synced(trained)
    moving.training = True
    with pytest.raises(ValueError, match="would change its statistics"):
        evaluate(alone, moving, 3)


def test_a_policy_file_holds_the_statistics_and_takes_observations_as_they_are(trained: DQN, tmp_path: Path) -> None:
    save_policy(trained, tmp_path / "policy.safetensors", {})
    policy = load_policy(tmp_path / "policy.safetensors")
    with pytest.raises(ValueError, match=r"normalizes its observations itself.*; leave VecNormalize out"):
        evaluate(policy, synced(trained), 3)
    plain = make_vec_env("CartPole-v1", 3, seed=5)
    assert evaluate(policy, plain, 6) == evaluate(trained, synced(trained), 6)


def test_normalized_rewards_are_not_returns() -> None:
    env = VecMonitor(VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")]), norm_obs=False, training=False))
    with pytest.raises(ValueError, match="VecMonitor would count normalized rewards: put it inside VecNormalize"):
        evaluate(agent(), env, 1)


# --- images, and episodes that do not end


class Pixels(gym.Env[np.ndarray, np.int64]):
    """The number of the episode's step, as the colour of an image."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, length: int = 10, *, channels_last: bool = True) -> None:
        self.length = length
        self.observation_space = gym.spaces.Box(0, 255, (40, 36, 3) if channels_last else (3, 40, 36), np.uint8)

    def _image(self) -> np.ndarray:
        return np.full(self.observation_space.shape, 20 * self.t % 256, np.uint8)  # type: ignore[arg-type]

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._image(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self._image(), float(self.t * (2 * action - 1)), self.t == self.length, False, {}


def pixels(**kwargs: Any) -> VecEnv:
    return VecMonitor(DummyVecEnv([lambda: Pixels(**kwargs)] * 2))


def test_images_with_channels_last_are_transposed_as_evaluate_policy_does() -> None:
    model = SpikingDQN("CnnPolicy", pixels(), policy_kwargs={"net_arch": [8]}, buffer_size=100, seed=1, device="cpu")
    expected, _ = evaluate_policy(model, pixels(), 4, return_episode_rewards=True)
    for env in (pixels(), pixels(channels_last=False), VecTransposeImage(pixels())):
        assert evaluate(model, env, 4).returns == expected
    with pytest.raises(ValueError, match=r"observation_space is Box\(0, 255, \(3, 40, 36\)"):
        evaluate(model, make_vec_env("CartPole-v1", 1), 1)


def test_an_episode_that_does_not_end_is_refused() -> None:
    model = SpikingDQN("CnnPolicy", pixels(), policy_kwargs={"net_arch": [8]}, buffer_size=100, seed=1, device="cpu")
    assert evaluate(model, pixels(), 6, max_episode_steps=10).lengths == [10] * 6
    with pytest.raises(ValueError, match=r"an episode has not ended after 9 steps; wrap .* or raise max_episode_steps"):
        evaluate(model, pixels(), 6, max_episode_steps=9)
    # of the episodes that count: the second environment has none to play
    one_of_them = VecMonitor(DummyVecEnv([lambda: Pixels(10**9), lambda: Pixels(10)]))
    assert evaluate(model, one_of_them, 1, max_episode_steps=10).lengths == [10]
    with pytest.raises(ValueError, match="max_episode_steps must be >= 1, got 0"):
        evaluate(model, pixels(), 1, max_episode_steps=0)


def test_a_bar_shows_the_episodes(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = evaluate(agent(), make_vec_env("CartPole-v1", 1, seed=0), 3)
    assert capsys.readouterr().err == ""
    assert evaluate(agent(), make_vec_env("CartPole-v1", 1, seed=0), 3, progress_bar=True) == quiet
    assert "evaluation:   0%|          | 0/3 [" in capsys.readouterr().err
