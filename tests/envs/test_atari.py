from __future__ import annotations

import itertools
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import DQN
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor

from envs.atari import SCREEN, AtariVecEnv, VecClipReward, make_atari

Frames = list[np.ndarray]


def small(num_envs: int = 2, *, game: str = "pong", seed: int = 0, **options: Any) -> AtariVecEnv:
    return AtariVecEnv(game, num_envs, seed=seed, **({"image_size": 42} | options))


def actions_of(num_envs: int, steps: int, n: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(n, size=(steps, num_envs))


def play(env: VecEnv, actions: np.ndarray) -> Frames:
    return [env.reset(), *(env.step(a)[0] for a in actions)]  # type: ignore[list-item]


def same(a: Frames, b: Frames) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("num_envs", "image_size", "frame_stack"), [(1, 84, 4), (3, 36, 1), (2, 42, 5)])
def test_shapes_and_types(num_envs: int, image_size: int, frame_stack: int) -> None:
    env = make_atari("pong", num_envs, seed=0, image_size=image_size, frame_stack=frame_stack)
    assert env.num_envs == num_envs
    assert env.observation_space == gym.spaces.Box(0, 255, (frame_stack, image_size, image_size), np.uint8)
    assert env.action_space == gym.spaces.Discrete(6)
    observations = env.reset()
    assert isinstance(observations, np.ndarray)
    assert observations.shape == (num_envs, *env.observation_space.shape)
    observations, rewards, dones, infos = env.step(np.zeros(num_envs, dtype=np.int64))
    assert isinstance(observations, np.ndarray)
    assert observations.shape == (num_envs, *env.observation_space.shape)
    assert observations.dtype == np.uint8
    assert (rewards.shape, rewards.dtype) == ((num_envs,), np.float32)
    assert (dones.shape, dones.dtype) == ((num_envs,), np.bool_)
    assert len(infos) == num_envs


def test_the_game_fixes_the_actions() -> None:
    assert small(game="breakout").action_space == gym.spaces.Discrete(4)


def test_newest_frame_is_last() -> None:
    env = small()
    frames = play(env, actions_of(2, 8))
    for before, after in itertools.pairwise(frames):
        np.testing.assert_array_equal(after[:, :-1], before[:, 1:])
    assert not np.array_equal(frames[-1][:, -1], frames[-1][:, -2])


def test_observations_are_not_overwritten_by_later_steps() -> None:
    env = small()
    first = env.reset()
    kept = first.copy()
    for a in actions_of(2, 20):
        env.step(a)
    np.testing.assert_array_equal(first, kept)


# Seeds


def test_same_seed_same_game() -> None:
    actions = actions_of(2, 60)
    assert same(play(small(seed=3, sticky=0.25), actions), play(small(seed=3, sticky=0.25), actions))


def test_copy_i_is_the_game_of_seed_plus_i() -> None:
    actions = actions_of(3, 40)
    batch = play(small(3, seed=5, sticky=0.25), actions)
    for i in range(3):
        alone = play(small(1, seed=5 + i, sticky=0.25), actions[:, i : i + 1])
        assert same([frame[i : i + 1] for frame in batch], alone)


def test_copies_differ_under_the_same_actions() -> None:
    # without sticky actions only the number of no-ops tells the copies apart, and two may draw the same
    frames = play(small(4, sticky=0.25), np.repeat(actions_of(1, 40), 4, axis=1))
    assert len({np.stack([frame[i] for frame in frames]).tobytes() for i in range(4)}) == 4


def test_only_the_first_reset_after_seeding_starts_afresh() -> None:
    env, actions = small(4), actions_of(4, 40)
    first, second = play(env, actions), play(env, actions)
    assert not same(first, second)
    env.seed(0)
    assert same(play(env, actions), first)
    assert same(play(env, actions), second)


def test_seed_none_is_drawn_from_numpy_and_always_accepted() -> None:
    env = small()
    for state in range(5):  # SB3 draws 32 unsigned bits, half of which the emulator cannot take
        np.random.seed(state)
        drawn = env.seed(None)
        first = env.reset()
        np.random.seed(state)
        assert env.seed(None) == drawn
        np.testing.assert_array_equal(env.reset(), first)


@pytest.mark.parametrize("seed", [-1, 2**31 - 2, 2**32])
def test_seeds_outside_the_emulators_integers_are_refused(seed: int) -> None:
    env = small()
    with pytest.raises(ValueError, match=rf"seed must lie in \[0, 2\*\*31 - num_envs\), got {seed}$"):
        env.seed(seed)
    with pytest.raises(ValueError, match="seed must lie in"):
        small(seed=seed)
    env.seed(2**31 - 3)
    assert env.reset().shape == (2, 4, 42, 42)


# Ends of episodes


def test_truncation_resets_in_the_same_step() -> None:
    short, long = small(max_episode_frames=40), small()
    actions = actions_of(2, 12)
    start, reference = short.reset(), long.reset()
    np.testing.assert_array_equal(start, reference)
    for step, a in enumerate(actions[:10]):
        observations, _, dones, infos = short.step(a)
        reference, _, reference_dones, _ = long.step(a)
        assert not reference_dones.any()
        assert dones.tolist() == [step == 9] * 2  # 40 frames are 10 steps of 4
        if step < 9:
            np.testing.assert_array_equal(observations, reference)
            assert not any("terminal_observation" in info or "TimeLimit.truncated" in info for info in infos)
    # the old episode's last observation is what the longer game saw at this step, but for what moves: where an
    # episode ends, the emulator's maximum over two frames still holds one of the step before ...
    for i in range(2):
        terminal = infos[i]["terminal_observation"]
        np.testing.assert_array_equal(terminal[:-1], reference[i, :-1])
        assert (terminal[-1] != reference[i, -1]).mean() < 0.01
        assert infos[i]["TimeLimit.truncated"] is True
    # ... and the one returned starts an episode: nothing but its newest frame, as after `reset`
    for frames in (start, observations):
        assert not frames[:, :-1].any()
        assert frames[:, -1].any(axis=(1, 2)).all()
    following, _, dones, _ = short.step(actions[10])
    np.testing.assert_array_equal(following[:, :-1], observations[:, 1:])
    assert not dones.any()


def test_a_lost_game_is_a_termination_with_its_score() -> None:
    env = make_atari("pong", 2, seed=0, image_size=20, frame_stack=1)
    env.reset()
    totals, ended = np.zeros(2), np.zeros(2, dtype=bool)
    steps = 0
    while not ended.all():
        _, rewards, dones, infos = env.step(np.zeros(2, dtype=np.int64))
        steps += 1
        assert steps < 2_000
        totals += np.where(ended, 0, rewards)
        for i in np.flatnonzero(dones & ~ended):
            assert infos[i]["TimeLimit.truncated"] is False
            assert infos[i]["episode"]["r"] == -21  # a paddle that never moves loses every point
            assert infos[i]["episode"]["l"] == steps
        ended |= dones
    assert totals.tolist() == [-21, -21]


def test_lives_are_reported() -> None:
    env = small(game="breakout")
    env.reset()
    assert [info["lives"] for info in env.step(np.zeros(2, dtype=np.int64))[3]] == [5, 5]


# Rewards


def test_learner_sees_clipped_rewards_and_monitor_the_score() -> None:
    clipped = make_atari("ms_pacman", 2, seed=1, image_size=20, frame_stack=1)
    plain = make_atari("ms_pacman", 2, seed=1, image_size=20, frame_stack=1, clip_reward=False)
    clipped.reset(), plain.reset()
    totals, episodes = np.zeros(2), 0
    for a in actions_of(2, 1_500, n=9):
        rewards, infos = clipped.step(a)[1::2]
        score, dones = plain.step(a)[1:3]
        np.testing.assert_array_equal(rewards, np.sign(score))
        totals += score
        for i in np.flatnonzero(dones):
            assert infos[i]["episode"]["r"] == totals[i] > 100  # each pellet is worth ten points
            totals[i], episodes = 0, episodes + 1
        if episodes:
            break
    assert episodes


class Rewards(gym.Env[np.ndarray, int]):
    observation_space = gym.spaces.Box(0, 1, (1,))
    action_space = gym.spaces.Discrete(5)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.ones(1, dtype=np.float32), [-400.0, -0.25, 0.0, 0.5, 10.0][action], action == 4, False, {}


def test_clip_reward_keeps_everything_else() -> None:
    env = VecClipReward(VecMonitor(DummyVecEnv([Rewards] * 5)))
    np.testing.assert_array_equal(env.reset(), np.zeros((5, 1)))
    observations, rewards, dones, infos = env.step(np.arange(5))
    assert rewards.tolist() == [-1, -1, 0, 1, 1]
    assert observations.tolist() == [[1], [1], [1], [1], [0]]
    assert dones.tolist() == [False] * 4 + [True]
    assert infos[4]["episode"]["r"] == 10


# Sticky actions


def test_sticky_actions_change_the_game() -> None:
    actions = actions_of(2, 60)
    assert not same(play(small(), actions), play(small(sticky=0.25), actions))


def test_actions_matter_unless_they_always_stick() -> None:
    left, right = np.full((40, 2), 3), np.full((40, 2), 2)
    assert not same(play(small(), left), play(small(), right))
    assert same(play(small(sticky=1.0), left), play(small(sticky=1.0), right))


# The RGB twin


def test_screen_stays_in_step_with_the_observations() -> None:
    # 210 x 160 shrinks to 10 x 10 by whole blocks, so that their means are the emulator's own reduction;
    # 30 steps an episode take both twins through automatic resets, with sticky actions throughout.
    size = 10
    env = small(image_size=size, sticky=0.25, max_episode_frames=120, render_mode="rgb_array")
    assert env.get_images() == [None, None]
    observations = env.reset()
    own, other, ends = 0.0, 0.0, 0
    for a in actions_of(2, 200):
        screens = np.stack([screen for screen in env.get_images() if screen is not None])
        assert (screens.shape, screens.dtype) == ((2, *SCREEN, 3), np.uint8)
        grey = screens @ np.array([0.299, 0.587, 0.114])
        means = grey.reshape(2, size, SCREEN[0] // size, size, SCREEN[1] // size).mean(axis=(2, 4))
        own = max(own, np.abs(means - observations[:, -1]).max())
        other = max(other, np.abs(means[::-1] - observations[:, -1]).max())
        observations, _, dones, _ = env.step(a)
        ends += dones.sum()
    assert ends == 2 * (200 // 30)
    assert own < 4 < 10 < other  # grey levels; `other` is what a twin out of step looks like


def test_rendering_does_not_change_the_game() -> None:
    actions = actions_of(2, 60)
    assert same(play(small(sticky=0.25), actions), play(small(sticky=0.25, render_mode="rgb_array"), actions))


def test_render_tiles_the_copies() -> None:
    env = make_atari("pong", 1, seed=0, render_mode="rgb_array")
    env.reset()
    image = env.render()
    assert image is not None
    np.testing.assert_array_equal(image, env.get_images()[0])


# What is refused


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.array([0]), r"actions must be 2 integers, got shape \(1,\)"),
        (np.array([[0, 1]]), r"actions must be 2 integers, got shape \(1, 2\)"),
        (np.array(0), r"actions must be 2 integers, got shape \(\)"),
        (np.array([0.0, 1.0]), "actions must be 2 integers, got .* of dtype float64"),
        (np.array([False, True]), "actions must be 2 integers, got .* of dtype bool"),
        (np.array([0, 6]), r"actions of pong lie in \[0, 5\], got \[0, 6\]"),
        (np.array([-1, 0]), r"actions of pong lie in \[0, 5\], got \[-1, 0\]"),
        (np.array([0, 2**63], dtype=np.uint64), "actions of pong lie in"),
    ],
)
def test_bad_actions_are_refused_and_leave_the_game_alone(actions: np.ndarray, message: str) -> None:
    env, reference = small(), small()
    env.reset(), reference.reset()
    with pytest.raises(ValueError, match=message):
        env.step(actions)
    good = actions_of(2, 3)
    for a in good:
        np.testing.assert_array_equal(env.step(a)[0], reference.step(a)[0])


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int64])
def test_any_integers_are_actions(dtype: type) -> None:
    env, reference = small(), small()
    env.reset(), reference.reset()
    np.testing.assert_array_equal(env.step(np.array([2, 3], dtype=dtype))[0], reference.step(np.array([2, 3]))[0])


def test_step_wait_needs_actions() -> None:
    env = small()
    env.reset()
    with pytest.raises(ValueError, match="step_wait called before step_async"):
        env.step_wait()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"game": "Pong"}, "unknown Atari game 'Pong'; names are .*snake_case"),
        ({"num_envs": 0}, "num_envs must be >= 1, got 0"),
        ({"image_size": 0}, "image_size must be >= 1, got 0"),
        ({"frame_stack": -1}, "frame_stack must be >= 1, got -1"),
        (
            {"image_size": 2**12, "frame_stack": 2},
            r"an observation must have at most 16,777,216 pixels, got frame_stack 2 of image_size 4096",
        ),
        ({"max_episode_frames": 0}, "max_episode_frames must be >= 1, got 0"),
        ({"sticky": 1.5}, r"sticky must be a probability in \[0, 1\], got 1.5"),
        ({"sticky": float("nan")}, "sticky must be a probability"),
        ({"render_mode": "human"}, "render_mode must be None or 'rgb_array', got 'human'"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


# As stable-baselines3 uses it


def test_copies_have_no_attributes_or_methods_of_their_own() -> None:
    env = small(3)
    assert env.get_attr("game") == ["pong"] * 3
    assert env.get_attr("render_mode", [0, 2]) == [None, None]
    assert env.env_is_wrapped(gym.Wrapper, 1) == [False]
    assert not env.has_attr("no_such_attribute")
    with pytest.raises(AttributeError, match="'game' cannot be set per copy"):
        env.set_attr("game", "breakout")
    with pytest.raises(AttributeError, match="no method 'reset'"):
        env.env_method("reset")
    env.close()
    env.close()


def test_dqn_learns_on_it() -> None:
    env = make_atari("pong", 2, seed=0, image_size=36)
    agent = DQN("CnnPolicy", env, buffer_size=100, learning_starts=10, batch_size=4, device="cpu")
    before = agent.q_net.state_dict()["q_net.0.weight"].clone()
    agent.learn(50)
    assert agent.num_timesteps >= 50
    assert not agent.q_net.state_dict()["q_net.0.weight"].equal(before)
    actions, _ = agent.predict(env.reset(), deterministic=True)  # type: ignore[arg-type]
    assert env.action_space.contains(actions[0])
