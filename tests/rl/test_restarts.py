"""Environments of which half start anew every so often."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecMonitor, VecNormalize

from agents import RECIPES
from snn_rl import SpikingDQN, Student
from snn_rl.rl.replay import frame_stack_of
from snn_rl.rl.restarts import RestartingVecEnv
from snn_rl.runs._run import Run
from snn_rl.runs.agent import run
from snn_rl.runs.stages import Stage


class Clock(gym.Env[np.ndarray, np.int64]):
    """Shows its seed and how many steps its episode has had; a reward of 1 each, and an end after ``length``."""

    observation_space = spaces.Box(-1, 1e4, (2,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, length: int) -> None:
        self.length, self.seed = length, -1

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        self.seed = self.seed if seed is None else seed
        self.at, self.options = 0, options
        return np.array([self.seed, 0], dtype=np.float32), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.at += 1
        obs = np.array([self.seed, self.at], dtype=np.float32)
        return obs, 1.0, self.at == self.length, False, {"action": int(action)}

    def ends_after(self, steps: int) -> bool:
        return self.at + steps >= self.length


def clocks(n: int, length: int = 7) -> VecEnv:
    return VecMonitor(DummyVecEnv([lambda: Clock(length)] * n))


def test_the_second_half_starts_anew_and_the_first_plays_to_its_end() -> None:
    env = RestartingVecEnv(clocks(2), clocks(1), every=3)
    env.seed(10)
    assert env.num_envs == 3
    np.testing.assert_array_equal(env.reset(), [[10, 0], [11, 0], [12, 0]])
    seen = []
    for t in range(1, 10):
        obs, rewards, dones, infos = env.step(np.array([0, 1, 2]))
        assert isinstance(obs, np.ndarray)
        assert [info["action"] for info in infos] == [0, 1, 2]
        np.testing.assert_array_equal(rewards, np.ones(3))
        for i, info in enumerate(infos):
            assert dones[i] == ("terminal_observation" in info)
        if t == 3:
            np.testing.assert_array_equal(infos[2]["terminal_observation"], [12, 3])
            assert infos[2]["TimeLimit.truncated"] is True
        if t == 7:
            assert infos[0]["episode"]["l"] == infos[1]["episode"]["l"] == 7
            assert infos[0]["TimeLimit.truncated"] is False
        seen.append((obs[:, 1].astype(int).tolist(), dones.tolist()))
    whole, restarting = [False] * 2, [False]
    assert seen == [
        ([1, 1, 1], whole + restarting),
        ([2, 2, 2], whole + restarting),
        ([3, 3, 0], [False, False, True]),
        ([4, 4, 1], whole + restarting),
        ([5, 5, 2], whole + restarting),
        ([6, 6, 0], [False, False, True]),
        ([0, 0, 1], [True, True, False]),
        ([1, 1, 2], whole + restarting),
        ([2, 2, 0], [False, False, True]),
    ]


def test_an_episode_that_ends_where_it_would_be_cut_has_ended() -> None:
    env = RestartingVecEnv(clocks(1, length=4), clocks(1, length=4), every=4)
    env.reset()
    for _ in range(4):
        obs, _, dones, infos = env.step(np.zeros(2, dtype=int))
    assert isinstance(obs, np.ndarray)
    assert dones.all()
    np.testing.assert_array_equal(obs[:, 1], [0, 0])
    for info in infos:
        assert info["TimeLimit.truncated"] is False
        assert info["terminal_observation"][1] == 4


def test_a_log_has_whole_episodes_alone() -> None:
    env = RestartingVecEnv(clocks(1, length=3), clocks(2, length=3), every=4)
    env.reset()
    steps = [env.step(np.zeros(3, dtype=int)) for _ in range(8)]
    assert [dones.tolist() for _, _, dones, _ in steps[2:4]] == [[True, True, True], [False, True, True]]
    logged = [(t, i) for t, (*_, infos) in enumerate(steps, 1) for i in range(3) if "episode" in infos[i]]
    assert logged == [(3, 0), (6, 0)]


def test_the_parts_may_run_in_processes_of_their_own() -> None:
    def part() -> VecEnv:  # which hands out its infos as a tuple
        return SubprocVecEnv([lambda: Clock(7)], start_method="fork")

    env = RestartingVecEnv(part(), part(), every=2)
    env.reset()
    env.step(np.zeros(2, dtype=int))
    obs, _, dones, infos = env.step(np.zeros(2, dtype=int))
    assert isinstance(obs, np.ndarray)
    assert (obs[:, 1].tolist(), dones.tolist()) == ([2, 0], [False, True])
    assert infos[1]["TimeLimit.truncated"] is True
    env.close()


def test_a_cut_game_goes_on_from_a_new_start_with_an_empty_stack() -> None:
    recipe = RECIPES["pong-lite"]
    env = RestartingVecEnv(recipe.build_env(1, 0), recipe.build_env(1, 1), every=30)
    whole, uncut = recipe.build_env(1, 0), recipe.build_env(1, 1)
    for vec_env in (env, whole, uncut):
        vec_env.reset()
    for t in range(1, 61):
        action = np.array([t % 6])
        obs, _, dones, infos = env.step(np.repeat(action, 2))
        assert isinstance(obs, np.ndarray)
        np.testing.assert_array_equal(obs[0], np.asarray(whole.step(action)[0])[0])
        assert dones.tolist() == [False, t % 30 == 0]
        if t <= 30:
            expected = np.asarray(uncut.step(action)[0])[0]
            np.testing.assert_array_equal(infos[1]["terminal_observation"] if t == 30 else obs[1], expected)
        if t == 30:
            assert not obs[1, :-1].any()
            assert obs[1, -1].any()
    for vec_env in (env, whole, uncut):
        vec_env.close()


def test_a_reset_begins_the_count_again() -> None:
    env = RestartingVecEnv(clocks(1), clocks(1), every=3)
    env.reset()
    env.step(np.zeros(2, dtype=int))
    env.step(np.zeros(2, dtype=int))
    env.reset()
    assert [env.step(np.zeros(2, dtype=int))[2].any() for _ in range(3)] == [False, False, True]


def test_attributes_and_methods_are_those_of_the_copies() -> None:
    env = RestartingVecEnv(clocks(2, length=5), clocks(1, length=9), every=3)
    assert env.get_attr("length") == [5, 5, 9]
    assert env.get_attr("length", [2, 0]) == [9, 5]
    env.set_attr("length", 6, [2])
    assert env.get_attr("length") == [5, 5, 6]
    env.reset()
    assert env.env_method("ends_after", 6) == [True, True, True]
    assert env.env_method("ends_after", 5, indices=[2, 0]) == [False, True]
    env.set_options([{"level": i} for i in range(3)])
    env.reset()
    assert env.get_attr("options") == [{"level": 0}, {"level": 1}, {"level": 2}]
    limited = DummyVecEnv([lambda: gym.wrappers.TimeLimit(Clock(9), 4)])
    assert RestartingVecEnv(clocks(2), limited, 3).env_is_wrapped(gym.wrappers.TimeLimit) == [False, False, True]
    stacked = RECIPES["pong-lite"]
    pong = RestartingVecEnv(stacked.build_env(1, 0), stacked.build_env(1, 1), 3)
    assert frame_stack_of(pong) == 4
    pong.close()


def other() -> VecEnv:
    return RECIPES["cartpole"].build_env(1, 0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RestartingVecEnv(clocks(1), clocks(1), 0), "every must be >= 1, got 0"),
        (lambda: RestartingVecEnv(clocks(1), other(), 3), "both must have the same observation_space"),
        (lambda: RestartingVecEnv(VecNormalize(clocks(1)), clocks(1), 3), "must not be normalized"),
    ],
)
def test_what_is_refused(build: Callable[[], VecEnv], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_the_replay_keeps_the_starts_and_what_a_cut_episode_saw_last() -> None:
    env = RestartingVecEnv(clocks(1, length=1000), clocks(1, length=1000), every=5)
    agent = SpikingDQN("MlpPolicy", env, buffer_size=200, learning_starts=100, train_freq=1, seed=3, device="cpu")
    agent.learn(40)
    replay = agent.replay_buffer
    assert replay is not None
    assert replay.episode_start.sum(1).tolist() == [1, 4]
    assert not replay.terminated.any()
    # five steps are six frames, the last of which bootstraps and is acted on in none
    assert replay.frames[1, :12, 1].astype(int).tolist() == [*range(6), *range(6)]
    assert replay.acted[1, :12].tolist() == ([True] * 5 + [False]) * 2


def test_only_the_training_of_spiking_stages_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(RECIPES["cartpole"].smoke(), num_envs=4, schedule=(2, 1))
    recipe = dataclasses.replace(recipe, snn=dataclasses.replace(recipe.snn, restart_every=5))
    this = Run(recipe, tmp_path, 1, "cpu")
    env = this.training_env(Stage(2, "ann"))
    assert isinstance(env, RestartingVecEnv)
    assert ([part.num_envs for part in env.parts], env.every) == ([2, 2], 5)
    np.testing.assert_array_equal(env.reset(), this.env(Stage(2, "ann"), 4, 0).reset())  # by the same seeds
    assert not isinstance(this.training_env(Stage(None, None)), RestartingVecEnv)

    class Killed(Exception):
        pass

    seen: list[tuple[str, bool]] = []

    def see(algorithm: type[DQN], name: str, *, kill: bool) -> None:
        method = getattr(algorithm, name)

        def wrapped(self: DQN, *args: Any, **kwargs: Any) -> Any:
            seen.append((f"{type(self).__name__}.{name}", isinstance(self.env, RestartingVecEnv)))
            if kill:
                raise Killed
            return method(self, *args, **kwargs)

        monkeypatch.setattr(algorithm, name, wrapped)

    see(Student, "collect", kill=False)
    see(Student, "learn", kill=True)
    with pytest.raises(Killed):
        run(recipe, tmp_path, 1, device="cpu")
    assert seen == [("Student.collect", True), ("Student.learn", True)]
    monkeypatch.undo()
    seen.clear()
    see(Student, "collect", kill=False)
    see(Student, "learn", kill=False)
    results = run(recipe, tmp_path, 1, device="cpu")  # goes on from the checkpoint after T2's distillation
    assert seen == [("Student.learn", True), ("Student.collect", True), ("Student.learn", True)]
    # whole episodes: no CartPole falls within five steps
    assert min(min(stage["eval"]["returns"]) for stage in results["stages"]) > 5
    with pytest.raises(ValueError, match=r"num_envs must be >= 2, of which snn\.restart_every restarts half, got 1"):
        dataclasses.replace(recipe, num_envs=1)
