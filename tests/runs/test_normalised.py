"""Recipes whose environment is in a ``VecNormalize``: what its statistics are, where they are kept, who uses them."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    unwrap_vec_normalize,
)
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from snn_rl import SpikingDQN, load_policy
from snn_rl.cli.environments import named_environment
from snn_rl.rl.evaluation import Evaluation, evaluate
from snn_rl.rl.policy_file import LoadedPolicy, save_policy
from snn_rl.rl.statistics import Statistics, read_vecnormalize
from snn_rl.runs import ann
from snn_rl.runs._run import Run
from snn_rl.runs.agent import run
from snn_rl.runs.provenance import environment_of
from snn_rl.runs.recipe import TEST_SEEDS, AnnConfig, NetworkConfig, Recipe, SnnConfig
from snn_rl.runs.stages import Stage
from snn_rl.runs.taught import Rewarded

N_ENVS = 4
PRIOR = 1e-4  # what SB3's RunningMeanStd begins with: so many observations of mean 0 and variance 1


class Balance(gym.Env[np.ndarray, np.int64]):
    """A number around 1000 and one around 0.01; the action is to say whether the first is above its mean."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def seen(self) -> np.ndarray:
        self.x = float(self.np_random.normal())
        return np.array([1000 + 50 * self.x, 0.01 * float(self.np_random.normal())], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.at = 0
        return self.seen(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward, self.at = 10.0 * float(action == (self.x > 0)), self.at + 1
        return self.seen(), reward, self.at == 10 + int(self.np_random.integers(10)), self.at >= 20, {}


class Killed(BaseException):
    pass


class Recorder(VecEnvWrapper):
    """Keeps what the environments of a training show, and ends the process at a step of it."""

    seen: ClassVar[list[np.ndarray]] = []  # (N_ENVS, 2) each
    killed_at: ClassVar[int | None] = None  # environment steps

    def _keep(self, obs: Any) -> Any:
        if self.num_envs == N_ENVS:
            self.seen.append(obs.copy())
        return obs

    def reset(self) -> Any:
        return self._keep(self.venv.reset())

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, dones, infos = self.venv.step_wait()
        if self.num_envs == N_ENVS and len(self.seen) * N_ENVS == type(self).killed_at:
            raise Killed
        return self._keep(obs), rewards, dones, infos


@pytest.fixture(autouse=True)
def nothing_recorded() -> None:
    Recorder.seen.clear()
    Recorder.killed_at = None


def monitored(num_envs: int, seed: int) -> VecEnv:
    env = Recorder(VecMonitor(DummyVecEnv([Balance] * num_envs)))
    env.seed(seed)
    return env


def make_env(num_envs: int, *, seed: int) -> VecEnv:
    return VecNormalize(monitored(num_envs, seed), clip_obs=4.0)


def recipe(make_env: Callable[..., VecEnv] = make_env, **changes: Any) -> Recipe:
    made = Recipe(
        name="mine",
        env_id="Mine-v0",
        make_env=make_env,
        num_envs=N_ENVS,
        network=NetworkConfig(net_arch=(16,)),
        ann=AnnConfig(env_steps=512, learning_starts=64, buffer_size=1_000, exploration_steps=128),
        snn=SnnConfig(parent_steps=128, distillation_updates=40, env_steps=64, buffer_size=1_000),
        schedule=(2, 1),
        validate_every=10_000,
        validation_episodes=4,
        eval_episodes=8,
    )
    return dataclasses.replace(made, **changes)


def with_rewards(**changes: Any) -> SnnConfig:
    return dataclasses.replace(recipe().snn, rewards=True, **changes)


def rewards_alone(num_envs: int, *, seed: int) -> VecEnv:
    return VecNormalize(monitored(num_envs, seed), norm_obs=False)


def running(batches: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of all observations in ``batches``, and of what `PRIOR` adds to them (in SB3 in float32)."""
    seen = np.concatenate(batches).astype(np.float64)
    n = len(seen) + PRIOR
    mean = seen.sum(0) / n
    return mean, (((seen - mean) ** 2).sum(0) + PRIOR * (1 + mean**2)) / n


def assert_are(statistics: Statistics | None, batches: list[np.ndarray]) -> None:
    assert statistics is not None
    mean, var = running(batches)
    np.testing.assert_allclose(statistics.mean, mean, rtol=1e-5)  # type: ignore[arg-type]
    np.testing.assert_allclose(statistics.var, var, rtol=1e-4)  # type: ignore[arg-type]


def saved(directory: Path) -> VecNormalize:
    """What the ANN stage has stored, by SB3's own reader, around environments of the test."""
    env = VecNormalize.load(str(directory / "ann" / "vecnormalize.pkl"), monitored(8, TEST_SEEDS))
    env.training = env.norm_reward = False
    return env


def policy_of(directory: Path, stage: str) -> LoadedPolicy:
    return load_policy(directory / stage / "policy.safetensors")


def assert_same(ours: Statistics | None, theirs: Statistics | None) -> None:
    assert ours is not None
    assert theirs is not None
    np.testing.assert_array_equal(ours.mean, theirs.mean)  # type: ignore[arg-type]
    np.testing.assert_array_equal(ours.var, theirs.var)  # type: ignore[arg-type]
    assert (ours.clip, ours.epsilon) == (theirs.clip, theirs.epsilon)


def test_a_run_in_a_normalised_environment(tmp_path: Path) -> None:
    wanted = recipe()
    results = run(wanted, tmp_path, device="cpu")
    stages = {stage["stage"]: stage for stage in results["stages"]}
    assert list(stages) == ["ann", "T2", "T1"]

    normalized = saved(tmp_path)
    dqn = DQN.load(tmp_path / "ann" / "model.zip", device="cpu")
    policy = policy_of(tmp_path, "ann")
    raw = np.random.default_rng(0).normal([1000, 0], [200, 0.01], (64, 2)).astype(np.float32)
    with torch.no_grad():
        theirs = dqn.q_net(torch.as_tensor(normalized.normalize_obs(raw)))
        ours, _, _ = policy.policy.outputs(raw)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-6)
    assert np.abs(normalized.normalize_obs(raw)).max() == 4.0  # the clip of the recipe

    # SB3 itself, in the environment of its own VecNormalize, plays the episodes of the results
    returns, _ = evaluate_policy(dqn, normalized, n_eval_episodes=8, return_episode_rewards=True)
    assert sorted(returns) == pytest.approx(sorted(stages["ann"]["eval"]["returns"]))  # type: ignore[arg-type, type-var]
    assert max(returns) > 20  # type: ignore[type-var, operator]  # unnormalised: VecNormalize clips a reward to 10, and scales it

    for name, stage in stages.items():
        shared = policy_of(tmp_path, name)
        assert_same(shared.policy.statistics, Statistics.of(normalized))
        env = environment_of(shared, {"mine": wanted}, 8, TEST_SEEDS)
        assert unwrap_vec_normalize(env) is None
        assert evaluate(shared, env, 8).returns == stage["eval"]["returns"]


def test_a_killed_ann_goes_on_with_the_statistics_of_its_checkpoint(tmp_path: Path) -> None:
    wanted = recipe(checkpoint_every=100)
    Recorder.killed_at = 348
    with pytest.raises(Killed):
        run(wanted, tmp_path, device="cpu")
    first = list(Recorder.seen)
    checkpoint = DQN.load(tmp_path / "ann" / "checkpoint.zip", device="cpu")
    steps = checkpoint.num_timesteps
    assert 100 <= steps < 344
    at_checkpoint = first[: 1 + steps // N_ENVS]  # a reset, and what each step shows
    normalize = checkpoint.get_vec_normalize_env()
    assert normalize is not None
    assert_are(Statistics.of(normalize), at_checkpoint)

    Recorder.seen.clear()
    Recorder.killed_at = None
    run(wanted, tmp_path, device="cpu")
    left = 1 + (512 - steps) // N_ENVS
    assert_are(
        read_vecnormalize(tmp_path / "ann" / "vecnormalize.pkl", Balance.observation_space),
        [*at_checkpoint, *Recorder.seen[:left]],
    )
    assert saved(tmp_path).ret_rms.count == pytest.approx(512 + PRIOR)  # of rewards, too


def test_the_best_checkpoint_keeps_its_own_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validated: list[int] = []
    plays = Run.evaluate

    def falling(self: Run, agent: Any, env: VecEnv, episodes: int) -> Evaluation:
        played = plays(self, agent, env, episodes)
        if not isinstance(agent, DQN):
            return played
        validated.append(len(Recorder.seen))
        return Evaluation([float(-len(validated))], [1], None)

    monkeypatch.setattr(Run, "evaluate", falling)
    run(recipe(validate_every=128), tmp_path, device="cpu")
    assert len(validated) >= 4
    statistics = read_vecnormalize(tmp_path / "ann" / "vecnormalize.pkl", Balance.observation_space)
    assert_are(statistics, Recorder.seen[: 1 + 128 // N_ENVS])
    for stage in ("ann", "T2", "T1"):
        assert_same(policy_of(tmp_path, stage).policy.statistics, statistics)


@pytest.mark.parametrize("snn", [recipe().snn, with_rewards()], ids=["student", "with rewards"])
def test_a_killed_spiking_stage_keeps_the_statistics(snn: SnnConfig, tmp_path: Path) -> None:
    wanted = recipe(snn=dataclasses.replace(snn, env_steps=128), checkpoint_every=32)
    run(wanted, tmp_path / "whole", device="cpu")
    Recorder.killed_at = len(Recorder.seen) * N_ENVS - 40  # in the play of T1
    Recorder.seen.clear()
    with pytest.raises(Killed):
        run(wanted, tmp_path / "killed", device="cpu")
    assert (tmp_path / "killed" / "T1" / "checkpoint.zip").is_file()
    Recorder.killed_at = None
    run(wanted, tmp_path / "killed", device="cpu")
    statistics = read_vecnormalize(tmp_path / "killed" / "ann" / "vecnormalize.pkl", Balance.observation_space)
    for stage in ("ann", "T2", "T1"):
        assert_same(policy_of(tmp_path / "killed", stage).policy.statistics, statistics)


def test_the_teacher_of_a_stage_takes_raw_observations(tmp_path: Path) -> None:
    run(recipe(), tmp_path, device="cpu")
    this = Run(recipe(), tmp_path, 0, "cpu")
    env = this.training_env(Stage(2, "ann"))
    assert unwrap_vec_normalize(env) is None
    raw = env.reset()
    assert isinstance(raw, np.ndarray)
    labels, _ = this.teacher(env).label(raw)
    dqn = DQN.load(tmp_path / "ann" / "model.zip", device="cpu")
    with torch.no_grad():
        wanted = dqn.q_net(torch.as_tensor(saved(tmp_path).normalize_obs(raw)))
    np.testing.assert_allclose(labels, wanted.numpy(), rtol=1e-5, atol=1e-6)


def test_spiking_stages_with_rewards_train_in_the_anns_statistics(tmp_path: Path) -> None:
    wanted = recipe(snn=with_rewards(restart_every=16))
    results = run(wanted, tmp_path, device="cpu")
    env = Rewarded(Run(wanted, tmp_path, 0, "cpu"), Stage(2, "ann")).environment()
    theirs = unwrap_vec_normalize(env)
    assert theirs is not None
    assert not theirs.training
    assert theirs.norm_reward  # as the ANN's Q-values were learnt
    assert theirs.ret_rms.var == saved(tmp_path).ret_rms.var
    agent = SpikingDQN.load(tmp_path / "T1" / "model.zip", device="cpu")
    normalized = saved(tmp_path)
    for stage in results["stages"][1:]:
        policy = policy_of(tmp_path, stage["stage"])
        assert_same(policy.policy.statistics, Statistics.of(normalized))
        assert evaluate(policy, wanted.build_env(8, TEST_SEEDS), 8).returns == stage["eval"]["returns"]
    returns = evaluate(agent, normalized, 8).returns  # the SB3 zip, in SB3's way
    assert returns == results["stages"][-1]["eval"]["returns"]


def test_normalised_rewards_alone_leave_observations_as_they_are(tmp_path: Path) -> None:
    wanted = recipe(rewards_alone)
    results = run(wanted, tmp_path, device="cpu")
    for stage in results["stages"]:
        policy = policy_of(tmp_path, stage["stage"])
        assert policy.policy.statistics is None
        env = environment_of(policy, {"mine": wanted}, 8, TEST_SEEDS)
        assert evaluate(policy, env, 8).returns == stage["eval"]["returns"]
    assert saved(tmp_path).ret_rms.count > 500


def test_dead_units_are_looked_for_on_normalised_observations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []

    def kept(dqn: DQN, observations: Any) -> DQN:
        seen.extend(observations)
        return dqn

    monkeypatch.setattr(ann, "without_dead_units", kept)
    run(recipe(ann=dataclasses.replace(recipe().ann, drop_dead_units=True)), tmp_path, device="cpu")
    played = np.concatenate(seen)
    assert len(played) == 128
    assert np.abs(played).max() <= 4.0
    assert np.abs(played.mean(0)).max() < 0.5


def test_statistics_stay_fixed_where_make_env_fixes_them(tmp_path: Path) -> None:
    def fixed(num_envs: int, *, seed: int) -> VecEnv:
        return Statistics(np.array([990.0, 0]), np.array([2500.0, 1e-4]), 5.0, 1e-8).around(monitored(num_envs, seed))

    run(recipe(fixed), tmp_path, device="cpu")
    statistics = policy_of(tmp_path, "T1").policy.statistics
    assert statistics is not None
    np.testing.assert_array_equal(statistics.mean, [990.0, 0])
    np.testing.assert_array_equal(statistics.var, [2500.0, 1e-4])


MODULE = """
from gymnasium import make
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize


def make_env(num_envs, *, seed, render_mode=None):
    env = VecMonitor(DummyVecEnv([lambda: make("CartPole-v1", render_mode=render_mode)] * num_envs))
    env.seed(seed)
    return VecNormalize(env)
"""


def test_the_command_line_evaluates_the_file_as_the_run_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_normalised_cartpole.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    make = importlib.import_module("my_normalised_cartpole").make_env
    results = run(recipe(make, env_id="CartPole-v1"), tmp_path / "run", device="cpu")
    policy = policy_of(tmp_path / "run", "T1")
    env = named_environment("my_normalised_cartpole:make_env", policy, 8, TEST_SEEDS)
    assert evaluate(policy, env, 8).returns == results["stages"][-1]["eval"]["returns"]
    # where a file holds no statistics, the environment's are fresh, and evaluation says so
    plain = DQN("MlpPolicy", env, policy_kwargs={"net_arch": [16]}, device="cpu")
    save_policy(plain, tmp_path / "plain.safetensors", {})
    plain_policy = load_policy(tmp_path / "plain.safetensors")
    env = named_environment("my_normalised_cartpole:make_env", plain_policy, 2, 0)
    with pytest.raises(ValueError, match="has no statistics yet; copy those that the agent was trained with"):
        evaluate(plain_policy, env, 2)


# --- an ANN that is given


def test_a_policy_file_with_statistics_takes_the_anns_place(tmp_path: Path) -> None:
    results = run(recipe(), tmp_path / "first", device="cpu")
    path = tmp_path / "first" / "ann" / "policy.safetensors"

    def plain(num_envs: int, *, seed: int) -> VecEnv:
        return monitored(num_envs, seed)

    for directory, wanted in (
        ("again", recipe()),
        ("plain", recipe(plain)),
        ("with rewards", recipe(plain, snn=with_rewards())),
    ):
        again = run(wanted, tmp_path / directory, device="cpu", ann=path)
        assert again["stages"][0]["eval"]["returns"] == results["stages"][0]["eval"]["returns"]
        for stage in ("ann", "T2", "T1"):
            assert_same(policy_of(tmp_path / directory, stage).policy.statistics, load_policy(path).policy.statistics)


def test_an_ann_without_statistics_is_refused(tmp_path: Path) -> None:
    dqn = DQN("MlpPolicy", monitored(1, 0), policy_kwargs={"net_arch": [16]}, device="cpu")
    dqn.save(tmp_path / "dqn.zip")
    save_policy(dqn, tmp_path / "policy.safetensors", {})
    for name in ("dqn.zip", "policy.safetensors"):
        with pytest.raises(
            ValueError,
            match=rf"{name} holds no statistics of observations, which make_env of mine norm.*; give the poli",
        ):
            run(recipe(), tmp_path / "run", device="cpu", ann=tmp_path / name)
    run(recipe(rewards_alone).smoke(), tmp_path / "rewards", device="cpu", ann=tmp_path / "dqn.zip")
    with pytest.raises(ValueError, match=r"normalizes rewards, of which .*dqn\.zip holds no statistics"):
        run(recipe(rewards_alone, snn=with_rewards()), tmp_path / "run", device="cpu", ann=tmp_path / "dqn.zip")
    assert not (tmp_path / "run").exists()


# --- what is refused before anything is trained


class Mine(VecNormalize):
    pass


class Images(Balance):
    observation_space = spaces.Box(0, 255, (36, 36, 3), np.uint8)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda env: VecMonitor(VecNormalize(env)), "below its outermost wrapper: put SB3's VecNormalize around"),
        (lambda env: VecFrameStack(VecNormalize(VecMonitor(env)), 2), "below its outermost wrapper"),
        (lambda env: VecNormalize(VecNormalize(VecMonitor(env))), "below its outermost wrapper"),
        (lambda env: VecNormalize(env), "return monitored environments: wrap them in VecMonitor"),
        (lambda env: Mine(VecMonitor(env)), "by SB3's VecNormalize itself, got Mine"),
    ],
    ids=["monitor", "stack", "twice", "no monitor", "subclass"],
)
def test_other_normalisations_are_refused(wrap: Callable[[VecEnv], VecEnv], message: str, tmp_path: Path) -> None:
    def make(num_envs: int, *, seed: int) -> VecEnv:
        return wrap(DummyVecEnv([Balance] * num_envs))

    with pytest.raises(ValueError, match=f"^make_env of mine must .*{message}"):
        run(recipe(make), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_normalised_images_are_refused(tmp_path: Path) -> None:
    def make(num_envs: int, *, seed: int) -> VecEnv:
        return VecNormalize(VecMonitor(DummyVecEnv([Images] * num_envs)))

    with pytest.raises(ValueError, match=r"^make_env of mine must not normalize images.*norm_obs=False"):
        run(recipe(make), tmp_path / "run", device="cpu")


def test_normalised_stacks_that_only_the_ann_sees_are_refused(tmp_path: Path) -> None:
    def make(num_envs: int, *, seed: int, frame_stack: int = 1) -> VecEnv:
        env = monitored(num_envs, seed)
        return VecNormalize(VecFrameStack(env, frame_stack) if frame_stack > 1 else env)

    with pytest.raises(ValueError, match=r"the ANN of mine must not see normalized stacks of frames.*norm_obs=False"):
        run(recipe(make, ann_env_kwargs={"frame_stack": 2}), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
