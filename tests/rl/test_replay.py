"""The replay memory against a plain list of everything that was played, and against SB3's own n-step buffer."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage

from snn_rl import SpikingDQN
from snn_rl.rl.replay import SequenceReplayBuffer, frame_stack_of


@dataclass
class Step:
    obs: np.ndarray
    next_obs: np.ndarray
    action: int
    reward: float
    terminated: bool
    truncated: bool
    start: bool


class Player:
    """Several environments of random episodes whose frames never repeat; keeps all that it played."""

    def __init__(self, n_envs: int, stack: int, shape: tuple[int, ...], seed: int, mean_length: float = 6.0) -> None:
        self.rng = np.random.default_rng(seed)
        self.n_envs, self.stack, self.shape = n_envs, stack, shape
        self.mean_length = mean_length
        self.counter = 0
        self.played: list[list[Step]] = [[] for _ in range(n_envs)]
        self.stacks = [self.fresh() for _ in range(n_envs)]
        self.start = [True] * n_envs

    def frame(self) -> np.ndarray:
        self.counter += 1
        return np.full(self.shape, self.counter, dtype=np.float32)

    def fresh(self) -> list[np.ndarray]:
        # some environments pad a first stack with zeros, some with copies: here with frames seen nowhere else
        return [self.frame() for _ in range(self.stack)]

    def obs(self, stack: list[np.ndarray]) -> np.ndarray:
        axis = 0 if len(self.shape) == 3 else -1
        return np.concatenate(stack, axis=axis)

    def step(self) -> tuple[Any, ...]:
        out: list[Step] = []
        for i in range(self.n_envs):
            following = [*self.stacks[i][1:], self.frame()]
            done = self.rng.random() < 1 / self.mean_length
            truncated = bool(done and self.rng.random() < 0.5)
            step = Step(
                self.obs(self.stacks[i]),
                self.obs(following),
                int(self.rng.integers(3)),
                float(self.rng.normal()),
                bool(done) and not truncated,
                truncated,
                self.start[i],
            )
            self.played[i].append(step)
            self.start[i] = bool(done)
            self.stacks[i] = self.fresh() if done else following
            out.append(step)
        return (
            np.stack([s.obs for s in out]),
            np.stack([s.next_obs for s in out]),
            np.array([s.action for s in out]),
            np.array([s.reward for s in out]),
            np.array([s.terminated or s.truncated for s in out]),
            [{"TimeLimit.truncated": s.truncated} for s in out],
        )


def filled(
    steps: int,
    n_envs: int = 2,
    stack: int = 1,
    shape: tuple[int, ...] = (3,),
    size: int = 1000,
    seed: int = 0,
    **kwargs: Any,
) -> tuple[SequenceReplayBuffer, Player]:
    player = Player(n_envs, stack, shape, seed)
    obs_shape = player.obs(player.stacks[0]).shape
    buffer = SequenceReplayBuffer(
        size,
        spaces.Box(-np.inf, np.inf, obs_shape, np.float32),
        spaces.Discrete(3),
        "cpu",
        n_envs,
        frame_stack=stack,
        **kwargs,
    )
    for _ in range(steps):
        buffer.add(*player.step())
    return buffer, player


@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(20, 120),
    n_envs=st.integers(1, 3),
    stack=st.integers(1, 4),
    image=st.booleans(),
    capacity=st.integers(30, 80),
    length=st.integers(1, 12),
    seed=st.integers(0, 10_000),
)
def test_windows_are_what_was_played(
    steps: int, n_envs: int, stack: int, image: bool, capacity: int, length: int, seed: int
) -> None:
    shape = (1, 2, 2) if image else (2,)
    buffer, player = filled(steps, n_envs, stack, shape, capacity * n_envs, seed)
    by_obs = {step.obs.tobytes(): (i, t) for i in range(n_envs) for t, step in enumerate(player.played[i])}
    terminal = {step.next_obs.tobytes() for played in player.played for step in played}
    np.random.seed(seed)
    windows = buffer.sample_windows(16, length)
    observations = windows.observations.numpy()
    for b in range(16):
        columns = set()
        for t in range(length):
            key = observations[t, b].tobytes()
            if not windows.acted[t, b]:
                # a terminal observation, the newest one, or an older frame of an episode's first stack
                assert windows.rewards[t, b] == 0
                assert not windows.terminated[t, b]
                continue
            i, at = by_obs[key]
            columns.add(i)
            step = player.played[i][at]
            assert windows.actions[t, b] == step.action
            assert windows.rewards[t, b] == pytest.approx(step.reward)
            assert windows.terminated[t, b] == step.terminated
            assert windows.episode_start[t, b] == step.start
            if t + 1 < length:  # what follows is the next slot, terminal observations included
                follower = observations[t + 1, b].tobytes()
                assert follower == step.next_obs.tobytes()
                assert follower in terminal
        assert len(columns) <= 1, "a window crossed from one environment to another"


@settings(max_examples=25, deadline=None)
@given(n_steps=st.integers(1, 5), seed=st.integers(0, 10_000), stack=st.integers(1, 3))
def test_samples_are_sb3s_n_step_transitions(n_steps: int, seed: int, stack: int) -> None:
    steps, n_envs, gamma = 60, 2, 0.9
    buffer, player = filled(steps, n_envs, stack, (2,), 1000, seed, n_steps=n_steps, gamma=gamma)
    theirs = NStepReplayBuffer(
        1000, buffer.observation_space, buffer.action_space, "cpu", n_envs, n_steps=n_steps, gamma=gamma
    )
    for t in range(steps):
        played = [player.played[i][t] for i in range(n_envs)]
        theirs.add(
            np.stack([s.obs for s in played]),
            np.stack([s.next_obs for s in played]),
            np.array([s.action for s in played]),
            np.array([s.reward for s in played]),
            np.array([s.terminated or s.truncated for s in played]),
            [{"TimeLimit.truncated": s.truncated} for s in played],
        )
    # every transition of theirs, by its observation (theirs draws the environment inside)
    expected = {}
    np.random.seed(0)
    for _ in range(40):
        batch = theirs._get_samples(np.arange(steps))
        for k in range(steps):
            expected[batch.observations[k].numpy().tobytes()] = [
                batch.actions[k], batch.next_observations[k], batch.dones[k], batch.rewards[k], batch.discounts[k]
            ]  # fmt: skip
    ours = buffer.sample(200)
    assert ours.discounts is not None
    for k in range(200):
        actions, next_obs, dones, rewards, discounts = expected[ours.observations[k].numpy().tobytes()]
        assert ours.actions[k] == actions
        assert (ours.next_observations[k] == next_obs).all()
        assert ours.dones[k] == dones
        assert ours.rewards[k].item() == pytest.approx(rewards.item(), abs=1e-5)
        assert ours.discounts[k].item() == pytest.approx(discounts.item(), abs=1e-5)


def test_all_windows_are_equally_likely_and_none_is_stale() -> None:
    buffer, player = filled(200, n_envs=1, size=40)
    newest = {step.obs.tobytes() for step in player.played[0][-45:]}
    seen: dict[bytes, int] = {}
    for _ in range(200):
        windows = buffer.sample_windows(32, 4)
        for b in range(32):
            key = windows.observations[0, b].numpy().tobytes()
            seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 40 - 4 + 1
    counts = np.array(list(seen.values()))
    assert counts.min() > 0.5 * counts.mean()
    acted_starts = [key for key in seen if key in newest]
    assert len(acted_starts) > 25


def test_frames_are_stored_once() -> None:
    space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    ours = SequenceReplayBuffer(800, space, spaces.Discrete(6), "cpu", 8, frame_stack=4)
    theirs_bytes = 2 * 4 * 84 * 84  # observations and next observations
    assert ours.frames.nbytes / 800 == 84 * 84
    assert theirs_bytes / (ours.frames.nbytes / 800) == 8


def test_a_break_without_done_starts_an_episode() -> None:
    buffer, player = filled(5, n_envs=1)
    player.stacks, player.start = [player.fresh()], [True]  # as if `learn` had reset the environment
    for _ in range(3):
        buffer.add(*player.step())
    assert buffer.episode_start[0, : buffer.count[0]].sum() == sum(step.start for step in player.played[0])


def test_an_observation_that_is_no_stack_is_refused() -> None:
    space = spaces.Box(-10, 10, (4,), np.float32)
    buffer = SequenceReplayBuffer(100, space, spaces.Discrete(2), "cpu", 1, frame_stack=2)
    with pytest.raises(ValueError, match="frame_stack is 2, but the observation of environment 0"):
        buffer.add(
            np.zeros((1, 4)), np.ones((1, 4)), np.zeros(1), np.zeros(1), np.zeros(1, dtype=bool), [{}]
        )  # fmt: skip


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("what", ["observation", "reward"])
def test_what_is_not_finite_is_refused_and_not_stored(what: str, bad: float) -> None:
    space = spaces.Box(-1, 1, (2,))
    memory = SequenceReplayBuffer(20, space, spaces.Discrete(2), "cpu", n_envs=2)
    obs, after, rewards = np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32), np.zeros(2, np.float32)
    (after if what == "observation" else rewards)[1] = bad
    with pytest.raises(ValueError, match=f"the {what} of environment 1 holds NaN or infinity"):
        memory.add(obs, after, np.zeros(2), rewards, np.zeros(2), [{}, {}])
    assert memory.count.tolist() == [0, 0]


def test_too_few_steps_are_named() -> None:
    buffer, _ = filled(3)
    assert not buffer.holds_windows(50)
    with pytest.raises(ValueError, match="a window of 50 slots was asked for, but only"):
        buffer.sample_windows(2, 50)
    empty, _ = filled(0)
    with pytest.raises(ValueError, match="no transition is stored yet"):
        empty.sample(2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"buffer_size": 2, "n_envs": 2}, "buffer_size must be at least 2 per environment"),
        ({"frame_stack": 3}, "frame_stack must divide axis 0"),
        ({"n_steps": 0}, "n_steps must be >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, int], message: str) -> None:
    arguments: dict[str, Any] = {"buffer_size": 100, **kwargs}
    with pytest.raises(ValueError, match=message):
        SequenceReplayBuffer(
            observation_space=spaces.Box(0, 1, (4,), np.float32),
            action_space=spaces.Discrete(2),
            device="cpu",
            **arguments,
        )


def test_rewards_and_observations_are_normalised_when_sampled() -> None:
    buffer, _ = filled(50, n_envs=2)
    env = VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")]))
    env.obs_rms.mean, env.obs_rms.var = np.full(3, 50.0), np.full(3, 100.0)  # type: ignore[union-attr,assignment]
    env.ret_rms.var = np.array(4.0)
    np.random.seed(0)
    plain = buffer.sample_windows(4, 3)
    np.random.seed(0)
    scaled = buffer.sample_windows(4, 3, env)
    assert np.allclose(scaled.observations, np.clip((plain.observations.numpy() - 50) / 10, -10, 10), atol=1e-4)
    assert np.allclose(scaled.rewards, np.clip(plain.rewards.numpy() / 2, -10, 10), atol=1e-4)


def test_a_pickled_memory_goes_on() -> None:
    buffer, player = filled(30)
    twin = pickle.loads(pickle.dumps(buffer))
    step = player.step()
    buffer.add(*step)
    twin.add(*step)
    assert (twin.count == buffer.count).all()
    assert (twin.frames == buffer.frames).all()
    assert (twin.episode_start == buffer.episode_start).all()


class Grey(gym.Env):
    observation_space = spaces.Box(0, 255, (6, 5, 1), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def observe(self) -> np.ndarray:
        return self.np_random.integers(0, 256, (6, 5, 1), dtype=np.uint8)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        return self.observe(), 1.0, self.t >= 7, False, {}


def test_vec_frame_stack_under_transpose_is_understood() -> None:
    env = VecTransposeImage(VecFrameStack(DummyVecEnv([Grey, Grey]), 3))
    env.seed(0)
    assert frame_stack_of(env) == 3
    buffer = SequenceReplayBuffer(200, env.observation_space, env.action_space, "cpu", 2, frame_stack=3)
    obs = env.reset()
    seen = {}
    for _ in range(40):
        new_obs, rewards, dones, infos = env.step(np.zeros(2, dtype=int))
        next_obs = np.array(new_obs)
        for i in np.flatnonzero(dones):
            next_obs[i] = infos[i]["terminal_observation"]
        buffer.add(obs, next_obs, np.zeros(2), rewards, dones, infos)
        for i in range(2):
            seen[obs[i].tobytes()] = next_obs[i]
        obs = new_obs
    batch = buffer.sample(100)
    for k in range(100):
        assert (batch.next_observations[k].numpy() == seen[batch.observations[k].numpy().tobytes()]).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "order", "axis"),
    [
        ((6, 5, 1), np.uint8, None, 0),  # an image: SB3 moves its channels to the front
        ((1, 6, 5), np.uint8, None, 0),
        ((6, 5, 1), np.uint8, "first", 1),
        ((6, 5, 1), np.float32, None, 2),  # no image to SB3: it is left as it is
        ((6, 5, 1), np.float32, "first", 0),
        ((6, 5), np.float32, None, 1),
        ((6, 5), np.float32, "first", 0),
        ((6,), np.float32, None, 0),
        ((6,), np.float32, "first", 0),
    ],
)
def test_frames_are_stored_once_where_they_are_stacked_along_the_axis_that_is_rebuilt(
    shape: tuple[int, ...], dtype: Any, order: str | None, axis: int
) -> None:
    """And whole observations otherwise: what is sampled is what the environment showed, along any axis."""

    class Env(Grey):
        observation_space = spaces.Box(0, 255, shape, dtype)

        def observe(self) -> np.ndarray:
            return self.np_random.integers(0, 256, shape).astype(dtype)

    env = VecFrameStack(DummyVecEnv([Env, Env]), 3, order)
    env.seed(0)
    agent = SpikingDQN("MlpPolicy", env, learning_starts=100, buffer_size=200, device="cpu")
    buffer = agent.replay_buffer
    assert buffer is not None
    single = DummyVecEnv([Env])
    one = (VecTransposeImage(single) if env.observation_space != agent.observation_space else single).observation_space
    assert one.shape is not None
    assert agent.observation_space.shape is not None
    assert agent.observation_space.shape[axis] == 3 * one.shape[axis]
    along = axis == (0 if len(shape) == 3 else len(shape) - 1)
    assert buffer.frame_stack == (3 if along else 1)

    seen: list[np.ndarray] = []
    agent.learn(40, callback=lambda of, _: seen.append(of["self"]._last_obs.copy()) or True)  # type: ignore[func-returns-value]
    batch = buffer.sample(50)
    shown = {obs.tobytes() for step in seen for obs in step}
    assert {obs.numpy().astype(dtype).tobytes() for obs in batch.observations} <= shown
