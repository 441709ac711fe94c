"""Runs that meet with faults: environments that misbehave, kills, folders of other runs, a stderr that is gone."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from agents import RECIPES
from snn_rl import Student, load_policy
from snn_rl.base.progress import bar, digits, show_log
from snn_rl.runs import life, task, taught
from snn_rl.runs._run import Run
from snn_rl.runs.agent import run
from snn_rl.runs.agent_training import AgentTraining
from snn_rl.runs.ann import Ann
from snn_rl.runs.callbacks import CollectionCallback, StageCallback
from snn_rl.runs.recipe import TEST_SEEDS, AnnConfig, NetworkConfig, Recipe, SnnConfig
from snn_rl.runs.stages import Stage

ROOT = Path(__file__).resolve().parents[2]


class Episode(gym.Env[np.ndarray, np.int64]):
    """Random observations and a reward for action 1, for twenty steps."""

    observation_space: spaces.Space = spaces.Box(-1, 1, (3,), np.float32)
    action_space: spaces.Space = spaces.Discrete(2)

    def __init__(self, length: int = 20, fails_at: int = -1, **of: spaces.Space) -> None:
        vars(self).update(of)
        self.length, self.fails_at, self.steps = length, fails_at, 0

    def seen(self) -> np.ndarray:
        low, high = (np.float64(bound) for bound in (-1, 1))
        return self.np_random.uniform(low, high, 3).astype(np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.at = 0
        return self.seen(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.at, self.steps = self.at + 1, self.steps + 1
        if self.steps == self.fails_at:
            raise KeyError("my environment\nbroke")
        return self.seen(), float(action), self.at == self.length, False, {}


class Squares(Episode):
    """A light on the left or on the right of an image, channels last; the action is to say which."""

    observation_space = spaces.Box(0, 255, (9, 12, 3), np.uint8)

    def seen(self) -> np.ndarray:
        self.side = int(self.np_random.integers(2))
        image = np.zeros((9, 12, 3), np.uint8)
        image[2:7, 6 * self.side : 6 * self.side + 6, 1] = 255
        return image

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        right = float(action == self.side)
        obs, _, over, truncated, info = super().step(action)
        return obs, right, over, truncated, info


def of(env: Callable[[], gym.Env[Any, Any]], wrap: Callable[[VecEnv], VecEnv] = VecMonitor) -> Callable[..., VecEnv]:
    """A `make_env` of copies of ``env``."""

    def make(num_envs: int, *, seed: int) -> VecEnv:
        made = wrap(DummyVecEnv([env] * num_envs))
        made.seed(seed)
        return made

    return make


EPISODES = of(Episode)


def recipe(make_env: Callable[..., Any] = EPISODES, **changes: Any) -> Recipe:
    """Stages of a second or two."""
    made = Recipe(
        name="mine",
        env_id="Mine-v0",
        make_env=make_env,
        num_envs=4,
        network=NetworkConfig(net_arch=(16,)),
        ann=AnnConfig(env_steps=512, learning_starts=64, buffer_size=1_000, exploration_steps=128),
        snn=SnnConfig(parent_steps=128, distillation_updates=40, env_steps=64, buffer_size=1_000),
        schedule=(2, 1),
        validate_every=10_000,
        validation_episodes=2,
        eval_episodes=2,
    )
    return dataclasses.replace(made, **changes)


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Killed(BaseException):
    pass


class Clock:
    """``time.monotonic`` as a test wants it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (life, task):
        monkeypatch.setattr(module, "monotonic", made)
    return made


# --- environments that are refused before anything is trained


def normalized_inside(env: VecEnv) -> VecEnv:
    return VecFrameStack(VecNormalize(VecMonitor(env), norm_reward=False), 2)


@pytest.mark.parametrize(
    "make_env",
    [
        of(Episode, normalized_inside),
        of(lambda: gym.wrappers.NormalizeObservation(Episode())),
        of(lambda: gym.wrappers.NormalizeReward(gym.wrappers.TimeLimit(Episode(), 10))),
    ],
    ids=["inside", "gymnasium", "gymnasium rewards"],
)
def test_running_statistics_that_no_policy_can_hold_are_refused(
    make_env: Callable[..., VecEnv], tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"make_env of mine must not normalize by running statistics below its outermost wrapper: put"
    ):
        run(recipe(make_env), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (lambda: Episode(observation_space=spaces.Dict(a=spaces.Discrete(3, start=1))), "'a' must count from 0 on"),
        (lambda: Episode(observation_space=spaces.Discrete(4, start=1)), "subtract the start"),
        (
            lambda: Episode(observation_space=spaces.MultiDiscrete([2, 2], dtype=np.int32)),
            "cannot give .* back; take the default dtype",
        ),
        (lambda: Episode(observation_space=spaces.Box(-1, 1, (), np.float32)), r"shape \(1,\)"),
        (lambda: Episode(observation_space=spaces.Box(0, 1, (2**13, 2**12), np.float32)), "16,777,216 entries"),
        (lambda: Episode(action_space=spaces.Discrete(2, start=1)), "TransformAction, to add 1"),
        (lambda: Episode(action_space=spaces.Discrete(2**17)), r"number of actions must lie in \[1, 65536\]"),
        (lambda: Episode(action_space=spaces.MultiDiscrete([2, 2])), "discretise the actions"),
        (lambda: Episode(action_space=spaces.Box(-1, 1, (1,))), "discretise the actions"),
    ],
    ids=["dict", "counts from 1", "dtype", "no shape", "huge", "start", "actions", "multidiscrete", "box"],
)
def test_spaces_that_some_stage_would_refuse_are_refused_at_once(
    env: Callable[[], Episode], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^mine: .*{message}"):
        run(recipe(of(env)), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_an_environment_without_a_monitor_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="make_env of mine must return monitored environments: wrap them in VecMonitor"
    ):
        run(recipe(of(Episode, lambda env: env)), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_convolutions_that_do_not_fit_are_refused_at_once(tmp_path: Path) -> None:
    large = NetworkConfig(convolutions=((4, 3, 1), (4, 8, 1)), features_dim=8, net_arch=())
    for env, message in ((Squares, r"convolutions\[1\]: kernel 8 does not fit its input of 7x10"), (Episode, "height")):
        with pytest.raises(ValueError, match=message):
            run(recipe(of(env), network=large), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-5, 5, (3,), np.int64),
        spaces.Box(-1, 1, (3,), np.float64),
        spaces.Box(-1, 1, (1, 3), np.float32),
        spaces.Box(-1, 1, (3,), np.float16),
        spaces.Box(0, 200, (3,), np.uint16),
        spaces.Box(0, 1, (3,), np.bool_),
        spaces.Discrete(4),
        spaces.MultiDiscrete([2, 2]),
        spaces.MultiBinary(4),
    ],
    ids=str,
)
def test_other_spaces_go_through_every_stage(space: spaces.Space, tmp_path: Path) -> None:
    class Other(Episode):
        observation_space = space

        def seen(self) -> np.ndarray:
            return space.sample()

    results = run(recipe(of(Other), schedule=(1,)), tmp_path, device="cpu")
    policy = load_policy(tmp_path / "T1" / "policy.safetensors")
    assert policy.observation_space == space
    inputs = 3 if isinstance(space, spaces.Box) else 4  # one-hot
    assert results["stages"][1]["energy"]["ann_ops"] == inputs * 16 + 16 * 2


def test_one_action_is_enough(tmp_path: Path) -> None:
    only = recipe(of(lambda: Episode(action_space=spaces.Discrete(1))), schedule=(1,))
    assert [stage["eval"]["mean"] for stage in run(only, tmp_path, device="cpu")["stages"]] == [0.0, 0.0]


def test_arguments_that_the_run_sets_are_refused() -> None:
    cartpole = RECIPES["cartpole"]
    for given in ({"num_envs": 5}, {"seed": 1}):
        with pytest.raises(ValueError, match="env_kwargs must not hold num_envs or seed, which the caller sets, got"):
            cartpole.build_env(1, 0, **given)
        for name in ("env_kwargs", "ann_env_kwargs"):
            with pytest.raises(ValueError, match=f"^{name} must not hold num_envs or seed, which the run sets, got"):
                dataclasses.replace(cartpole, **{name: given})
    with pytest.raises(ValueError, match=r"the environment of cartpole does not take {'self': 1}: .*'self'"):
        cartpole.build_env(1, 0, self=1)


@pytest.mark.parametrize("error", [MemoryError("no room"), gym.error.NameNotFound("no Mine-v0\nhere"), EOFError()])
def test_an_environment_that_cannot_be_built_is_one_line(error: Exception) -> None:
    def make(num_envs: int, *, seed: int, size: int = 1) -> VecEnv:
        raise error

    with pytest.raises(ValueError, match=r"the environment of mine cannot be built with {'size': 9}: ") as raised:
        recipe(make).build_env(1, 0, size=9)
    assert raised.value.__cause__ is error
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": (2_000, 1)}, "timesteps in schedule must be <= 1,024, got 2000"),
        ({"num_envs": np.int64(4)}, r"num_envs must be a plain Python value, got .*4.* \(int64\); convert it"),
        ({"env_kwargs": {"size": np.float32(1)}}, r"env_kwargs.size must be a plain Python value.*\(float32\)"),
        ({"network": NetworkConfig(net_arch=(np.int64(8),))}, "network.net_arch must be a plain Python value"),  # type: ignore[arg-type]
        ({"max_episode_steps": 0}, "max_episode_steps must be >= 1, got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be >= 1, got 0"),
        # burn-in 8 and 16 frames are 24, and 3 more with rewards; of the first of 1 + 23 steps nothing came before
        ({"snn": SnnConfig(parent_steps=91, burn_in=8)}, "snn.parent_steps must be >= 92, a window of each environ"),
        ({"snn": SnnConfig(parent_steps=103, burn_in=8, rewards=True)}, "snn.parent_steps must be >= 104, a window"),
        ({"ann": AnnConfig(buffer_size=7)}, "ann.buffer_size must be >= 8, a window of each environment, got 7"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_by_the_recipe(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def test_the_smallest_replays_are_large_enough(tmp_path: Path) -> None:
    snn = dataclasses.replace(recipe().snn, parent_steps=76, buffer_size=80, env_steps=32)
    small = recipe(snn=snn, ann=dataclasses.replace(recipe().ann, buffer_size=8))
    assert len(run(small, tmp_path, device="cpu")["stages"]) == 3


def test_every_recipe_has_a_smoke_recipe() -> None:
    snn = SnnConfig(parent_steps=100_000, buffer_size=100_000, train_every=1_000)
    wide = recipe(num_envs=1_000, ann=AnnConfig(train_every=1_000), snn=snn, env_kwargs={"frame_stack": 4})
    smoke = wide.smoke()
    assert (smoke.ann.buffer_size, smoke.snn.buffer_size, smoke.snn.parent_steps) == (5_000, 23_000, 19_000)
    assert not wide.is_smoke(wide.as_dict())
    assert wide.is_smoke(wide.smoke().as_dict())
    assert RECIPES["pong"].smoke().snn.parent_steps == 256


def test_a_memory_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    huge = recipe(ann=dataclasses.replace(recipe().ann, buffer_size=10**15))
    with pytest.raises(ValueError, match=r"^ann takes more memory than there is \(.*\); lower buffer_size"):
        run(huge, tmp_path, device="cpu")


# --- images, channels last


def test_images_with_channels_last_go_through_every_stage(tmp_path: Path) -> None:
    """An ANN on a stack of two teaches agents on one image; dead units, restarts and a kill on the way."""

    def make(num_envs: int, *, seed: int, frame_stack: int = 1) -> VecEnv:
        env = of(Squares)(num_envs, seed=seed)
        return env if frame_stack == 1 else VecFrameStack(env, frame_stack)

    ann = AnnConfig(env_steps=1_024, learning_rate=3e-3, learning_starts=64, buffer_size=2_000, exploration_steps=512)
    images = recipe(
        make,
        ann_env_kwargs={"frame_stack": 2},
        network=NetworkConfig(convolutions=((4, 4, 2), (4, 2, 1)), features_dim=16, net_arch=()),
        ann=dataclasses.replace(ann, gamma=0.5, gradient_steps=2, drop_dead_units=True),
        snn=SnnConfig(
            parent_steps=512,
            distillation_updates=60,
            env_steps=64,
            buffer_size=2_000,
            restart_every=8,
            leak=0.2,
            learning_rate=5e-3,
        ),
    )
    results = run(images, tmp_path, device="cpu")
    for stage, channels in zip(results["stages"], (6, 3, 3), strict=True):
        policy = load_policy(tmp_path / stage["stage"] / "policy.safetensors")
        assert policy.observation_space == spaces.Box(0, 255, (channels, 9, 12), np.uint8)
        # SB3 itself, on the environment as it was made
        env = make(2, seed=TEST_SEEDS, frame_stack=channels // 3)
        returns, _ = evaluate_policy(policy, env, 2, return_episode_rewards=True)  # type: ignore[arg-type]
        assert stage["eval"]["returns"] == returns
    assert results["stages"][0]["eval"]["mean"] > 15  # of 20, half of which a blind agent has


def test_an_sb3_dqn_on_images_with_channels_last_takes_the_anns_place(tmp_path: Path) -> None:
    class Large(Squares):
        observation_space = spaces.Box(0, 255, (36, 48, 3), np.uint8)

        def seen(self) -> np.ndarray:
            return super().seen().repeat(4, 0).repeat(4, 1)

    dqn = DQN("CnnPolicy", of(Large)(1, seed=0), buffer_size=100, learning_starts=10, device="cpu", seed=0).learn(20)
    dqn.save(tmp_path / "mine.zip")
    small = recipe(of(Large), schedule=(1,), snn=SnnConfig(parent_steps=88, distillation_updates=1, env_steps=4))
    results = run(small, tmp_path / "run", device="cpu", ann=tmp_path / "mine.zip")
    returns, _ = evaluate_policy(dqn, of(Large)(2, seed=TEST_SEEDS), 2, return_episode_rewards=True)
    assert results["stages"][0]["eval"]["returns"] == returns


def test_images_are_transposed_once() -> None:
    env = recipe(of(Squares, lambda env: VecTransposeImage(VecMonitor(env)))).build_env(2, 5)
    raw = of(Squares)(2, seed=5)
    np.testing.assert_array_equal(env.reset(), np.moveaxis(np.asarray(raw.reset()), 3, 1))


# --- environments that fail on the way


def test_an_environment_that_raises_is_named_with_its_stage_and_goes_on_when_repaired(tmp_path: Path) -> None:
    broken = recipe(of(lambda: Episode(fails_at=100)), checkpoint_every=128)
    with pytest.raises(
        ValueError, match=r"^ann: the environment of mine failed: KeyError: .*; once that is repaired, the same call"
    ) as raised:
        run(broken, tmp_path, device="cpu")
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value.__cause__, KeyError)
    assert raised.value.__cause__.__traceback__ is not None
    kept = DQN.load(tmp_path / "ann" / "checkpoint.zip", device="cpu")
    assert kept.num_timesteps == 384
    results = run(recipe(checkpoint_every=128), tmp_path, device="cpu")
    assert results["stages"][0]["env_steps"] == 512


def test_the_stage_of_a_later_failure_is_named(tmp_path: Path) -> None:
    class Fails(Episode):
        broken: ClassVar[bool] = False

        def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            if self.broken:
                raise RuntimeError("no more")
            return super().step(action)

    collect = Student.collect

    def breaks(self: Student, *args: Any) -> None:
        collect(self, *args)
        Fails.broken = self.timesteps == 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Student, "collect", breaks)
        with pytest.raises(ValueError, match=r"^T1: the environment of mine failed: RuntimeError: no more; once"):
            run(recipe(of(Fails)), tmp_path, device="cpu")
    assert [s["stage"] for s in json.loads((tmp_path / "results.json").read_text())["stages"]] == ["ann", "T2"]


class Dies(Episode):
    """Its process is gone after 50 steps."""

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self.steps == 50:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


@pytest.mark.parametrize("drops", [False, True])
def test_a_process_of_an_environment_that_dies_is_one_line(drops: bool, tmp_path: Path) -> None:
    def make(num_envs: int, *, seed: int) -> VecEnv:
        env = VecMonitor(SubprocVecEnv([Dies] * num_envs, start_method="fork"))
        env.seed(seed)
        return env

    dying = recipe(make, num_envs=2)
    kwargs: dict[str, Any] = {}
    if drops:  # in the play that finds dead units
        dying = dataclasses.replace(dying, ann=dataclasses.replace(dying.ann, drop_dead_units=True))
        DQN("MlpPolicy", Episode(), device="cpu").save(tmp_path / "ann.zip")
        kwargs = {"ann": tmp_path / "ann.zip"}
    with pytest.raises(
        ValueError, match=r"^ann: the environment of mine failed: a process that it runs in has ended \(.*Error\); look"
    ):
        run(dying, tmp_path / "run", device="cpu", **kwargs)


def test_an_episode_that_never_ends_is_named_and_a_larger_limit_goes_on(tmp_path: Path) -> None:
    long = recipe(of(lambda: Episode(length=50)), max_episode_steps=49, checkpoint_every=128)
    with pytest.raises(
        ValueError, match=r"an episode has not ended after 49 steps; wrap .*TimeLimit, or raise max_epis"
    ):
        run(long, tmp_path, device="cpu")
    steps: list[int] = []
    learn = DQN.learn

    def seen(self: DQN, total_timesteps: int, *args: Any, **kwargs: Any) -> DQN:
        steps.append(total_timesteps)
        return learn(self, total_timesteps, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DQN, "learn", seen)
        results = run(dataclasses.replace(long, max_episode_steps=50), tmp_path, device="cpu")
    assert steps[0] == 512 - 384  # from the last checkpoint
    assert len(results["stages"]) == 3


# --- checkpoints


def test_a_minute_of_training_is_lost_at_most(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the recipe's own checkpoint_every, where a step of all four environments takes half a second."""
    assert recipe().checkpoint_every is None
    on_step = StageCallback._on_step

    def step(self: StageCallback) -> bool:
        clock.now += 0.5
        if self.num_timesteps == 1_000:
            raise Killed
        return on_step(self)

    monkeypatch.setattr(StageCallback, "_on_step", step)
    long = recipe(ann=dataclasses.replace(recipe().ann, env_steps=2_000))
    with pytest.raises(Killed):
        run(long, tmp_path, device="cpu")
    # 120 steps of four environments a minute: at 480 and 960
    assert DQN.load(tmp_path / "ann" / "checkpoint.zip", device="cpu").num_timesteps == 960
    resumed = Ann(Run(long, tmp_path, 0, "cpu"), Stage(None, None))
    assert resumed.resume() == "960 steps"
    assert resumed.history.wall_seconds == 120


def test_writing_takes_a_twentieth_of_the_time_at_most(clock: Clock) -> None:
    written: list[float] = []
    cost = 4.0

    def save(*_: Any, **__: Any) -> None:
        written.append(clock.now)
        clock.now += cost

    checkpoints = task.Checkpoints(task.History(), save)
    while clock.now < 1_000:
        clock.now += 1
        if checkpoints.are_due():
            checkpoints.write()
            cost = 1.0 if len(written) == 3 else cost
    # a minute; then 4 s / 5 % = 80 s after the end of the last one; from the fourth on 1 s is written, after 60
    assert written[:6] == [60, 144, 228, 312, 373, 434]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    run(recipe(), directory, device="cpu")
    return directory


@pytest.mark.parametrize("stage", ["T2", "T1"])
def test_a_kill_while_a_stage_collects_costs_a_minute_of_it(
    stage: str, whole: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(whole), str(folder)], check=True)
    for name in ("T2", "T1") if stage == "T2" else ("T1",):
        (folder / name / "metrics.json").unlink()
    on_step, collect, keep_rates = CollectionCallback._on_step, Student.collect, Student.keep_rates
    left: list[int] = []
    held: list[int] = []
    thresholds: list[bool] = []

    def step(self: CollectionCallback) -> bool:
        clock.now += 7  # 4 steps; a minute is over after 36
        if self.n_calls == 25:
            raise Killed
        return on_step(self)

    def collected(self: Student, actor: Any, steps: int, *args: Any) -> None:
        left.append(steps)
        collect(self, actor, steps, *args)
        assert self.replay_buffer is not None
        held.append(int(self.replay_buffer.acted.sum()))

    def lowered(self: Student, parent: Student) -> None:
        keep_rates(self, parent)
        thresholds.append(parent.timesteps == 2)

    monkeypatch.setattr(Student, "collect", collected)
    monkeypatch.setattr(Student, "keep_rates", lowered)
    with monkeypatch.context() as patch:
        patch.setattr(CollectionCallback, "_on_step", step)
        with pytest.raises(Killed):
            run(recipe(), folder, device="cpu")
    kept = json.loads((folder / stage / "checkpoint.json").read_text())
    assert kept["extra_steps"] == 68  # 36 and 72 steps were taken by the two checkpoints, whose last is not yet stored
    results = run(recipe(), folder, device="cpu")
    stages = ["T2", "T1"] if stage == "T2" else ["T1"]
    assert left == [128, 60] + [128] * (len(stages) - 1)
    assert held == [128] * len(stages)
    assert thresholds == [True]  # once, of T1, after all of the play
    for metrics in results["stages"][1:]:
        assert metrics["env_steps"] == 128 + 64


def test_a_kill_within_a_piece_of_distillation_costs_a_minute_of_it(
    whole: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(whole), str(folder)], check=True)
    (folder / "T1" / "metrics.json").unlink()
    monkeypatch.setattr(taught, "DISTILLATION_PIECES", 1)
    update, rates = Student._update, []

    def slow(self: Student, *args: Any, **kwargs: Any) -> float:
        clock.now += 7
        if self.distilled < 40:
            rates.append(self.policy.optimizer.param_groups[0]["lr"])
        if len(rates) == 24:
            raise Killed
        return update(self, *args, **kwargs)

    monkeypatch.setattr(Student, "_update", slow)
    falls = recipe(snn=dataclasses.replace(recipe().snn, play_learning_rate=1e-4))
    (folder / "run.json").write_text(json.dumps({"recipe": falls.as_dict(), "seed": 0, "ann": None}))
    with pytest.raises(Killed):
        run(falls, folder, device="cpu")
    assert Student.load(folder / "T1" / "checkpoint.zip", device="cpu").distilled == 18
    rates.append(0.0)
    run(falls, folder, device="cpu")
    expected = [1e-3 + (1e-4 - 1e-3) * i / 40 for i in range(40)]
    np.testing.assert_allclose(rates[:23], expected[:23])
    np.testing.assert_allclose(rates[25:], expected[18:])


def test_a_stage_that_has_ended_is_kept_before_its_evaluation(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate, validations = StageCallback._validate, []

    def slow(self: StageCallback) -> None:
        validate(self)
        validations.append(self.num_timesteps)
        clock.now += 90

    def dies(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(StageCallback, "_validate", slow)
    with monkeypatch.context() as patch:
        patch.setattr(AgentTraining, "export", dies)
        with pytest.raises(Killed):
            run(recipe(), tmp_path, device="cpu")
    results = run(recipe(), tmp_path, device="cpu")
    assert validations == [512, 64, 64]  # that of the ANN was not made again
    assert results["stages"][0]["env_steps"] == 512
    assert [at for at, _ in results["stages"][0]["validation"]] == [512]


# --- folders


def test_results_of_another_run_are_left_alone(tmp_path: Path, whole: Path) -> None:
    for name in ("results.json", "T1/policy.safetensors", "ann/checkpoint.zip"):
        folder = tmp_path / Path(name).name
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("of somebody else")
        before = files_of(folder)
        with pytest.raises(ValueError, match=f"holds {name} but no run.json, .*; use another --run-dir"):
            run(recipe(), folder, device="cpu")
        assert before.items() <= files_of(folder).items()
        assert not (folder / "run.json").exists()
    # a folder that this run had claimed before it trained anything
    folder = tmp_path / "claimed"
    folder.mkdir()
    (folder / "run.json").write_text((whole / "run.json").read_text())
    other = json.loads((whole / "results.json").read_text()) | {"seed": 7}
    (folder / "results.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"results.json is not of this run, which would replace it; move it"):
        run(recipe(), folder, device="cpu")
    assert json.loads((folder / "results.json").read_text()) == other


def test_a_folder_in_which_nothing_was_trained_yet_is_free(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe(num_envs=2).as_dict(), "seed": 3, "ann": None}))
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "events.out.tfevents.1").write_text("")
    run(recipe(schedule=(1,)), tmp_path, device="cpu")
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 0


def edited(whole: Path, folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    subprocess.run(["cp", "-r", str(whole), str(folder)], check=True)
    config = json.loads((folder / "run.json").read_text())
    edit(config["recipe"])
    (folder / "run.json").write_text(json.dumps(config))
    return folder


def test_fields_that_a_recipe_has_gained_since_count_as_their_defaults(whole: Path, tmp_path: Path) -> None:
    def forget(config: dict[str, Any]) -> None:
        del config["total_snn_steps"], config["ann_env_kwargs"], config["snn"]["keep_rates"], config["ann"]["n_steps"]

    folder = edited(whole, tmp_path / "older", forget)
    assert run(recipe(), folder, device="cpu") == json.loads((whole / "results.json").read_text())
    for changes, message in (
        ({"snn": dataclasses.replace(recipe().snn, keep_rates=False)}, "its snn.keep_rates is True, not False"),
        ({"total_snn_steps": 100}, "its total_snn_steps is None, not 100"),
        ({"ann_env_kwargs": {"frame_stack": 1}}, "its ann_env_kwargs.frame_stack is unset, not 1"),
    ):
        made = recipe(lambda n, *, seed, frame_stack=1: of(Episode)(n, seed=seed), **changes)
        with pytest.raises(ValueError, match=message):
            run(made, folder, device="cpu")
    del_snn = edited(whole, tmp_path / "much older", lambda config: config.pop("snn"))
    with pytest.raises(ValueError, match=r"its snn\.parent_steps is 10000, not 128"):
        run(recipe(), del_snn, device="cpu")
    for old in ({}, {"recipe": [], "seed": 0}, []):
        (folder / "run.json").write_text(json.dumps(old))
        with pytest.raises(ValueError, match=r"belongs to another run: its recipe is None, not 'mine'; give"):
            run(recipe(), folder, device="cpu")


def test_a_field_that_recipes_no_longer_have_is_named(whole: Path, tmp_path: Path) -> None:
    folder = edited(whole, tmp_path / "run", lambda config: config["snn"].update(warmth=3))
    with pytest.raises(ValueError, match=r"its snn.warmth is 3, and recipes no longer have this field"):
        run(recipe(), folder, device="cpu")


def test_what_changes_nothing_that_is_learnt_may_change(whole: Path) -> None:
    free = recipe(cpu_threads=1, checkpoint_every=64, max_episode_steps=1_000)
    assert run(free, whole, device="cpu") == json.loads((whole / "results.json").read_text())


def test_the_first_difference_is_one_that_a_person_would_name(tmp_path: Path, whole: Path) -> None:
    ann = str(whole / "ann" / "policy.safetensors")
    smoke = recipe().smoke()
    full = dataclasses.replace(recipe(), snn=dataclasses.replace(recipe().snn, leak=0.5))
    for began, wanted, message in (
        ((full, 3, None), (dataclasses.replace(smoke, name="other"), 4, ann), "its recipe is 'mine', not 'other'"),
        ((full, 3, None), (smoke, 4, ann), "it is no smoke run, as this is"),
        ((smoke, 3, None), (full, 4, ann), "it is a smoke run, and this is none"),
        ((full, 3, None), (recipe(num_envs=2), 4, ann), "its seed is 3, not 4"),
        ((full, 3, None), (recipe(num_envs=2), 3, ann), "its ann is None, not '.*policy.safetensors'"),
        ((full, 3, None), (recipe(num_envs=2), 3, None), "its num_envs is 4, not 2"),
    ):
        recorded, seed, file = began
        (tmp_path / "run.json").write_text(json.dumps({"recipe": recorded.as_dict(), "seed": seed, "ann": file}))
        (tmp_path / "results.json").write_text("{}")
        made, seed, file = wanted
        with pytest.raises(ValueError, match=f"belongs to another run: {message}; give the options that began it"):
            run(made, tmp_path, seed, device="cpu", ann=file)


def test_an_ann_that_cannot_be_used_leaves_no_folder(tmp_path: Path, whole: Path) -> None:
    (tmp_path / "foreign.zip").write_bytes(b"not a zip")
    other = recipe(of(lambda: Episode(action_space=spaces.Discrete(3))))
    for made, file, message in (
        (recipe(), tmp_path / "none.zip", "no file at .*none.zip; --ann takes the zip of an SB3 DQN"),
        (recipe(), tmp_path / "foreign.zip", "foreign.zip: it is not a zip, or it is damaged"),
        (recipe(), whole / "T1" / "policy.safetensors", "holds a spiking agent; --ann takes an ANN"),
        (other, whole / "ann" / "policy.safetensors", "is of the recipe 'mine', trained with action_space"),
    ):
        with pytest.raises(ValueError, match=message):
            run(made, tmp_path / "run", device="cpu", ann=file)
        assert not (tmp_path / "run").exists()


def test_a_finished_run_no_longer_needs_the_file_of_its_ann(tmp_path: Path, whole: Path) -> None:
    file = tmp_path / "ann.safetensors"
    file.write_bytes((whole / "ann" / "policy.safetensors").read_bytes())
    results = run(recipe(schedule=(1,)), tmp_path / "run", device="cpu", ann=file)
    file.unlink()
    assert run(recipe(schedule=(1,)), tmp_path / "run", device="cpu", ann=file) == results


# --- what a run says


PROGRAM = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "runs")!r}]
import logging
from test_run_faults import recipe, run
from snn_rl.runs.agent import run
%s
run(recipe(schedule=(1,)), sys.argv[1], device="cpu", progress_bar=%r)
print("done", logging.getLogger("snn_rl").handlers, logging.getLogger("snn_rl").level)
"""


def program(
    tmp_path: Path, before: str = "", *, bars: bool = False, shell: str = ""
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM % (before, bars), str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if shell:
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=300)
    return done.stdout.decode(), done.stderr.decode()


def test_a_run_in_a_program_says_what_it_does(tmp_path: Path) -> None:
    out, err = program(tmp_path)
    assert out == "done [] 0\n"  # nothing of it stays
    lines = err.splitlines()
    assert lines[0][2] == lines[0][5] == ":"
    said = [line[9:] for line in lines]
    folder = tmp_path / "run"
    assert said[0] == f"training into {folder}; watch it with: tensorboard --logdir {folder}"
    assert said[1] == "ann begins, from nothing"
    assert said[2].startswith("ann after 512 steps: ")
    assert "T1 begins, from ann" in said


@contextmanager
def logging_of(*handlers: logging.Handler) -> Iterator[None]:
    """The root logger with these handlers, and without those of pytest's own."""
    root = logging.getLogger()
    own, root.handlers = root.handlers, list(handlers)
    try:
        yield
    finally:
        root.handlers = own


@pytest.mark.parametrize("configured", ["level", "null handler", "root"])
def test_a_program_that_has_set_up_logging_keeps_what_it_set_up(
    configured: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log, null = logging.getLogger("snn_rl"), logging.NullHandler()
    if configured == "level":
        log.setLevel(logging.WARNING)
    if configured == "null handler":
        log.addHandler(null)
    try:
        with logging_of(*([null] if configured == "root" else [])):
            with show_log():
                log.info("never")
                if configured == "level":
                    log.warning("always")
            assert log.handlers == ([null] if configured == "null handler" else [])
            assert log.level == (logging.WARNING if configured == "level" else logging.NOTSET)
    finally:
        log.setLevel(logging.NOTSET)
        log.removeHandler(null)
    said = [line[9:] for line in capsys.readouterr().err.splitlines()]
    assert said == (["always"] if configured == "level" else [])


def test_bars_show_what_takes_long(tmp_path: Path) -> None:
    _, err = program(tmp_path, bars=True)
    for what in ("ann:", "evaluation:", "T1, play of ann:", "T1, distillation:", "T1:"):
        assert f"\r{what}" in err
    for said in ("T1 begins, from ann", "T1 after 40 of 40 updates of distillation"):
        assert re.search(rf"[\r\n]\d\d:\d\d:\d\d {said}", err)  # on a line of its own


@pytest.mark.parametrize("shell", ["2>&-", "2>/dev/full"])
def test_a_stderr_that_is_closed_or_full_ends_no_training(shell: str, tmp_path: Path) -> None:
    assert program(tmp_path, bars=True, shell=shell)[0] == "done [] 0\n"
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["stages"]) == 2


def test_a_stderr_that_a_program_closed_ends_no_training(tmp_path: Path) -> None:
    assert program(tmp_path, "sys.stderr.close()", bars=True)[0] == "done [] 0\n"


def test_a_log_is_said_once_and_to_stderr_as_it_is_by_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger("snn_rl")
    with logging_of():
        with show_log():
            monkeypatch.setattr(sys, "stderr", sys.stdout)
            with show_log():  # a run within another's log
                log.info("once")
            log.info("twice")
        log.info("never")
    assert [line[9:] for line in capsys.readouterr().out.splitlines()] == ["once", "twice"]


def test_without_tqdm_there_is_no_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def use(shown: bool) -> str:
        with bar(shown, "it", 10, "step", 3) as tick:
            tick(7)
        return capsys.readouterr().err

    assert "it:  30%" in use(True)
    assert use(False) == ""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert use(True) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (0.5123, "0.512"),
        (-0.95, "-0.950"),
        (0.0499, "0.0499"),
        (0.99951, "1.00"),
        (9.372, "9.37"),
        (9.96, "9.96"),
        (9.996, "10.0"),
        (-21.0, "-21.0"),
        (499.96, "500.0"),
        (13_500.0, "13500.0"),
    ],
)
def test_returns_have_three_digits(value: float, text: str) -> None:
    assert digits(value) == text


def test_a_recipe_of_defaults_is_a_recipe() -> None:
    """A name, an environment and a way to build it are enough."""
    default = Recipe(name="mine", env_id="CartPole-v1", make_env=lambda num_envs, *, seed: None)
    for config in (default.ann, default.snn):
        assert config.train_every % default.num_envs == 0


def test_the_folder_of_a_run_in_another_environment_is_refused(whole: Path, tmp_path: Path) -> None:
    """The recipe's fields are the same: what makes the environment has changed."""
    shutil.copytree(whole, tmp_path / "run")
    before = (tmp_path / "run" / "results.json").read_bytes()
    with pytest.raises(
        ValueError, match=r"another run: its environment has the observation space Box\(-1.0, 1.0, \(3,\)"
    ):
        run(
            recipe(of(partial(Episode, observation_space=spaces.Box(-1, 1, (4,), np.float32)))),
            tmp_path / "run",
            device="cpu",
        )
    assert (tmp_path / "run" / "results.json").read_bytes() == before
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    del described["observation_space"], described["action_space"]  # as older runs have it
    (tmp_path / "run" / "run.json").write_text(json.dumps(described))
    assert len(run(recipe(), tmp_path / "run", device="cpu")["stages"]) == 3


def test_a_function_that_is_no_make_env_is_told_what_it_must_take() -> None:
    wrong = recipe(lambda: None)
    with pytest.raises(ValueError, match=r"make_env of mine must take \(num_envs, \*, seed, render_mode=None\): "):
        wrong.build_env(1, 0)
