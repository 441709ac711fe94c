from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import DQN

from envs.classic import make_cartpole

BALANCE = np.array([0.1, 0.3, 1.0, 1.0])  # a linear controller that holds the pole for as long as it is let


def actions_of(num_envs: int, steps: int) -> np.ndarray:
    return np.random.default_rng(0).integers(2, size=(steps, num_envs))


@pytest.mark.parametrize("velocities", [True, False])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_shapes_and_types(num_envs: int, velocities: bool) -> None:
    env = make_cartpole(num_envs, seed=0, velocities=velocities)
    width = 4 if velocities else 2
    assert env.num_envs == num_envs
    assert env.action_space == gym.spaces.Discrete(2)
    assert env.observation_space.shape == (width,)
    assert env.observation_space.dtype == np.float32
    observations = env.reset()
    assert isinstance(observations, np.ndarray)
    assert (observations.shape, observations.dtype) == ((num_envs, width), np.float32)
    for a in actions_of(num_envs, 30):
        observations, rewards, dones, infos = env.step(a)
        assert isinstance(observations, np.ndarray)
        assert (observations.shape, observations.dtype) == ((num_envs, width), np.float32)
        assert all(env.observation_space.contains(o) for o in observations)
        assert rewards.shape == dones.shape == (num_envs,)
        assert len(infos) == num_envs


@pytest.mark.parametrize("velocities", [True, False])
def test_copy_i_is_gymnasiums_game_of_seed_plus_i(velocities: bool) -> None:
    kept = [0, 1, 2, 3] if velocities else [0, 2]
    env = make_cartpole(3, seed=11, velocities=velocities)
    games = [gym.make("CartPole-v1") for _ in range(3)]
    expected = np.stack([game.reset(seed=11 + i)[0] for i, game in enumerate(games)])
    observations = env.reset()
    np.testing.assert_array_equal(observations, expected[:, kept])
    steps, ends = np.zeros(3), 0
    for a in actions_of(3, 120):
        observations, rewards, dones, infos = env.step(a)
        steps += 1
        for i, game in enumerate(games):
            last, reward, terminated, truncated, _ = game.step(a[i])
            assert rewards[i] == reward
            assert dones[i] == terminated
            assert not truncated
            if terminated:
                # the observation returned is the next episode's first, the old one's last is beside it
                np.testing.assert_array_equal(infos[i]["terminal_observation"], last[kept])
                assert infos[i]["TimeLimit.truncated"] is False
                assert infos[i]["episode"]["r"] == infos[i]["episode"]["l"] == steps[i]
                last, steps[i], ends = game.reset()[0], 0, ends + 1
            np.testing.assert_array_equal(observations[i], last[kept])  # type: ignore[index]
    assert ends >= 3


def test_time_limit_arrives_as_a_truncation() -> None:
    env = make_cartpole(2, seed=0)
    observations = env.reset()
    for step in range(500):
        observations, _, dones, infos = env.step((observations @ BALANCE > 0).astype(int))  # type: ignore[operator]
        assert dones.tolist() == [step == 499] * 2
    for info, first in zip(infos, observations, strict=True):
        assert info["TimeLimit.truncated"] is True
        assert info["terminal_observation"].shape == (4,)
        assert not np.array_equal(info["terminal_observation"], first)
        assert np.abs(first).max() <= 0.05  # where CartPole starts its episodes
        assert info["episode"]["r"] == 500


def test_seeds_are_reproducible_and_distinct() -> None:
    a, b = make_cartpole(4, seed=2), make_cartpole(4, seed=2)
    first = a.reset()
    np.testing.assert_array_equal(first, b.reset())
    assert len(np.unique(first, axis=0)) == 4  # type: ignore[arg-type]
    second = a.reset()
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(second, b.reset())


def test_screen_is_drawn_on_demand() -> None:
    env = make_cartpole(1, seed=0, velocities=False, render_mode="rgb_array")
    env.reset()
    (image,) = env.get_images()
    assert image is not None
    assert image.shape[2] == 3
    assert len(np.unique(image)) > 2
    env.close()


@pytest.mark.parametrize("num_envs", [0, -1])
def test_num_envs_out_of_range(num_envs: int) -> None:
    with pytest.raises(ValueError, match=f"num_envs must be >= 1, got {num_envs}"):
        make_cartpole(num_envs, seed=0)


@pytest.mark.parametrize("seed", [-1, 2**31 - 2, 2**32])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed must lie in \[0, 2\*\*31 - num_envs\), got {seed}"):
        make_cartpole(2, seed=seed)


def test_dqn_learns_on_it() -> None:
    env = make_cartpole(2, seed=0, velocities=False)
    agent = DQN("MlpPolicy", env, buffer_size=100, learning_starts=10, batch_size=4, device="cpu")
    agent.learn(50)
    actions, _ = agent.predict(env.reset(), deterministic=True)  # type: ignore[arg-type]
    assert env.action_space.contains(actions[0])


def test_stacked_positions_are_the_last_ones_newest_last() -> None:
    single, stacked = (make_cartpole(2, seed=3, velocities=False, frame_stack=k) for k in (1, 3))
    assert stacked.observation_space.shape == (6,)
    frames = [np.zeros((2, 2)), np.zeros((2, 2)), single.reset()]
    np.testing.assert_array_equal(stacked.reset(), np.concatenate(frames, axis=1))
    for a in actions_of(2, 6):  # too few for an episode to end
        frames.append(single.step(a)[0])
        np.testing.assert_array_equal(stacked.step(a)[0], np.concatenate(frames[-3:], axis=1))
    with pytest.raises(ValueError, match="frame_stack must be >= 1, got 0"):
        make_cartpole(1, seed=0, frame_stack=0)
    with pytest.raises(ValueError, match="frame_stack must be <= 1,048,576, got 1048577"):
        make_cartpole(1, seed=0, frame_stack=2**20 + 1)
