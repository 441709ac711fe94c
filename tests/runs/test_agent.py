"""The pipeline on a recipe of seconds: stages, resuming, kills, and runs that are not this one's."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import snn_rl.runs._run as agent_run
from agents import RECIPES
from snn_rl import Student, load_policy
from snn_rl.base.files import alone_in
from snn_rl.cli.status import exit_status
from snn_rl.runs import agent_training, life, task
from snn_rl.runs import ann as ann_stage
from snn_rl.runs.agent import run
from snn_rl.runs.callbacks import StageCallback
from snn_rl.runs.recipe import SEEDS_PER_RUN, TEST_SEEDS, VALIDATION_SEEDS, NetworkConfig, Recipe
from snn_rl.runs.stages import Stage

ROOT = Path(__file__).resolve().parents[2]


def tiny(**changes: Any) -> Recipe:
    recipe = RECIPES["cartpole"].smoke()
    recipe = dataclasses.replace(
        recipe, schedule=(2, 1), network=dataclasses.replace(recipe.network, net_arch=(16,)), validation_episodes=2
    )
    return dataclasses.replace(recipe, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    run(tiny(), directory, 3, device="cpu")
    return directory


def test_results_hold_what_the_format_promises(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["recipe"] == "cartpole"
    assert results["env_id"] == "CartPole-v1"
    assert results["seed"] == 3
    assert {"torch", "stable-baselines3"} <= set(results["versions"])
    assert [stage["stage"] for stage in results["stages"]] == ["ann", "T2", "T1"]
    assert [stage["timesteps"] for stage in results["stages"]] == [None, 2, 1]
    assert [stage["parent"] for stage in results["stages"]] == [None, "ann", "T2"]
    for stage in results["stages"]:
        returns = stage["eval"]["returns"]
        assert len(returns) == stage["eval"]["episodes"] == 2
        assert stage["eval"]["mean"] == pytest.approx(np.mean(returns))
        assert stage["eval"]["std"] == pytest.approx(np.std(returns))
        assert stage["env_steps"] > 0
        assert stage["updates"] > 0
        spiking = stage["timesteps"] is not None
        assert (stage["spike_rate"] is not None) == spiking
        assert len(stage["threshold"]) == len(stage["leak"]) == (1 if spiking else 0)
        if spiking:
            assert set(stage["spike_rate"]["layers"]) == set(stage["threshold"])
            assert stage["energy"]["ann_ops"] == 4 * 16 + 16 * 2


def test_each_stage_leaves_its_files_and_no_leftovers(finished: Path) -> None:
    for stage in ("ann", "T2", "T1"):
        names = {p.name for p in (finished / stage).iterdir()}
        events = {name for name in names if name.startswith("events")}
        assert events
        assert names - events == {"model.zip", "policy.safetensors", "metrics.json"}
    assert load_policy(finished / "T1" / "policy.safetensors").timesteps == 1
    assert load_policy(finished / "ann" / "policy.safetensors").timesteps is None


def test_tensorboard_has_curves_of_every_stage(finished: Path) -> None:
    for stage in ("ann", "T2", "T1"):
        events = EventAccumulator(str(finished / stage))
        events.Reload()
        tags = {"train/loss", "validation/mean_reward"}
        if stage != "ann":
            tags |= {f"{name}/mlp_1" for name in ("spike_rate", "threshold", "leak")}
        assert tags <= set(events.Tags()["scalars"])
        # not only where an episode happened to end
        assert len(events.Scalars("train/loss")) >= 5


def test_a_finished_run_is_not_run_again(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("model.zip")}
    results = run(tiny(), finished, 3, device="cpu")
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("model.zip")} == before
    assert len(results["stages"]) == 3


def test_the_parents_weights_are_the_childs_start(
    finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[Any] = []
    original = Student.collect

    def collect(self: Student, actor: DQN, *args: Any) -> None:
        started.append((self, actor, {k: v.clone() for k, v in self.net.state_dict().items()}))
        original(self, actor, *args)

    monkeypatch.setattr(Student, "collect", collect)
    run(tiny(), tmp_path, 3, device="cpu")
    (_, _, _), (child, parent, start) = started
    assert isinstance(parent, Student)
    assert parent.timesteps == 2
    assert child.timesteps == 1
    for name, tensor in parent.net.state_dict().items():
        assert (start[name] == tensor).all()


def test_training_validation_and_test_never_share_a_seed() -> None:
    width = 100_000 * SEEDS_PER_RUN
    starts = [0, VALIDATION_SEEDS, TEST_SEEDS]
    for a, b in itertools.pairwise(starts):
        assert a + width <= b
    assert TEST_SEEDS + width < 2**31


def record_seeds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of all resets of training environments of the ANN stage."""
    seeds: list[int] = []
    original = DummyVecEnv.reset

    def reset(self: DummyVecEnv) -> Any:
        if len(self._seeds) == 8 and self._seeds[0] is not None:
            seeds.extend(self._seeds)  # type: ignore[arg-type]
        return original(self)

    monkeypatch.setattr(DummyVecEnv, "reset", reset)
    return seeds


def test_no_two_runs_train_on_the_same_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = record_seeds(monkeypatch)
    ranges = []
    for seed in (0, 1):
        seeds.clear()
        run(tiny(), tmp_path / str(seed), seed, device="cpu")
        assert seeds
        assert all(seed * SEEDS_PER_RUN <= s < (seed + 1) * SEEDS_PER_RUN for s in seeds)
        ranges.append(set(seeds))
    assert not ranges[0] & ranges[1]


def test_a_resumed_stage_goes_on_with_other_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def finish(_: StageCallback) -> None:
        raise Killed

    seeds = record_seeds(monkeypatch)
    recipe = tiny(checkpoint_every=256)
    with monkeypatch.context() as patch:
        patch.setattr(StageCallback, "finish", finish)
        with pytest.raises(Killed):
            run(recipe, tmp_path, 5, device="cpu")
    begun = set(seeds)
    seeds.clear()
    run(recipe, tmp_path, 5, device="cpu")
    resumed = seeds[:8]
    assert resumed
    assert not begun & set(resumed)
    assert all(5 * SEEDS_PER_RUN <= seed < 6 * SEEDS_PER_RUN for seed in resumed)


def test_the_best_of_before_a_kill_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validated behind the last checkpoint and saved, then killed: what is kept is in the history."""

    class Killed(BaseException):
        pass

    scores = iter([10.0, 400.0])
    evaluated = agent_run.evaluate

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        result = evaluated(*args, **kwargs)
        score = next(scores, 3.0)
        return dataclasses.replace(result, returns=[score])

    original = StageCallback._validate

    def validate(self: StageCallback) -> None:
        original(self)
        if len(self.history.validation) == 2:
            raise Killed

    monkeypatch.setattr(agent_run, "evaluate", evaluate)
    recipe = tiny(schedule=(1,), checkpoint_every=400, validate_every=300)
    with monkeypatch.context() as patch:
        patch.setattr(StageCallback, "_validate", validate)
        with pytest.raises(Killed):
            run(recipe, tmp_path, 0, device="cpu")
    ann = run(recipe, tmp_path, 0, device="cpu")["stages"][0]
    steps = [at for at, _ in ann["validation"]]
    assert steps == sorted(set(steps))  # the validation at 600 steps was made twice, and counts once
    assert [600, 400.0] in ann["validation"]
    assert DQN.load(tmp_path / "ann" / "model.zip").validated == [600, 400.0]  # type: ignore[attr-defined]


def test_what_a_kill_left_half_written_is_removed(finished: Path) -> None:
    for name in (".writing-checkpoint.replay.pkl", "checkpoint.replay.pkl", "best.zip"):
        (finished / "T2" / name).write_bytes(b"half")
    run(tiny(), finished, 3, device="cpu")
    assert {p.name for p in (finished / "T2").iterdir() if not p.name.startswith("events")} == {
        "model.zip",
        "policy.safetensors",
        "metrics.json",
    }


def test_results_name_the_machine_that_trained(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (finished / "results.json").read_text()
    monkeypatch.setattr(task, "hardware", lambda _: "another machine")
    run(tiny(), finished, 3, device="cpu")
    assert (finished / "results.json").read_text() == before


def test_an_early_stop_ends_every_stage_at_its_first_validation(tmp_path: Path) -> None:
    recipe = tiny(target_return=1.0, validations_at_target=1, validate_every=128)
    results = run(recipe, tmp_path, 0, device="cpu")
    for stage in results["stages"]:
        assert len(stage["validation"]) == 1
        assert stage["validation"][0][0] <= 256


def test_the_best_validation_is_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([5.0, 9.0, 3.0, 1.0])
    kept: list[int] = []

    def validate(self: StageCallback) -> None:
        score = next(scores)
        best = max((m for _, m in self.history.validation), default=-np.inf)
        self.history.validation.append([self.num_timesteps, score])
        if score >= best:
            kept.append(self.num_timesteps)
            self.model.save(self.folder / "best.zip")

    monkeypatch.setattr(StageCallback, "_validate", validate)
    monkeypatch.setattr(ann_stage.Ann, "export", lambda self: kept.append(self.model.num_timesteps))
    this = agent_run.Run(tiny(validate_every=256), tmp_path, 0, "cpu")
    life.train_stage(this, ann_stage.Ann(this, Stage(None, None)))
    assert kept[-1] == kept[1]


def test_an_sb3_dqn_from_elsewhere_takes_the_anns_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny(schedule=(1,))
    env = recipe.build_env(1, 0)
    dqn = DQN("MlpPolicy", env, policy_kwargs={"net_arch": [24]}, learning_starts=10, device="cpu").learn(60)
    dqn.save(tmp_path / "mine.zip")
    results = run(recipe, tmp_path / "run", 0, device="cpu", ann=tmp_path / "mine.zip")
    assert results["stages"][0]["parent"] == str(tmp_path / "mine.zip")
    monkeypatch.chdir(tmp_path)  # by whatever path it is named
    assert run(recipe, tmp_path / "run", 0, device="cpu", ann=Path("mine.zip")) == results
    assert (results["stages"][0]["env_steps"], results["stages"][0]["updates"]) == (60, dqn._n_updates)
    assert load_policy(tmp_path / "run" / "T1" / "policy.safetensors").metadata["net_arch"] == [24]


def test_a_policy_file_takes_the_anns_place(finished: Path, tmp_path: Path) -> None:
    file = finished / "ann" / "policy.safetensors"
    results = run(tiny(schedule=(1,)), tmp_path, 3, device="cpu", ann=file)
    ann, t1 = results["stages"]
    assert (ann["parent"], ann["env_steps"], t1["parent"]) == (str(file), 0, "ann")
    algorithm = DQN.load(tmp_path / "ann" / "model.zip")  # as good for a program to go on with as a trained one
    assert (algorithm.gamma, algorithm.exploration_rate) == (tiny().ann.gamma, tiny().ann.exploration_eps)
    # the very network: by its weights, and by how it plays the test seeds of the run that it is from
    assert ann["eval"]["returns"] == json.loads((finished / "results.json").read_text())["stages"][0]["eval"]["returns"]
    ours, theirs = (load_policy(path).network.state_dict() for path in (tmp_path / "ann" / "policy.safetensors", file))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=0)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert run(tiny(schedule=(1,)), tmp_path, 3, device="cpu", ann=file) == results
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_dead_units_are_left_out_at_the_end_of_the_ann_stage(tmp_path: Path) -> None:
    recipe = tiny()
    recipe = dataclasses.replace(recipe, ann=dataclasses.replace(recipe.ann, drop_dead_units=True))
    dqn = DQN("MlpPolicy", recipe.build_env(1, 0), policy_kwargs={"net_arch": [24]}, seed=0, device="cpu")
    with torch.no_grad():
        dqn.q_net.q_net[0].bias[:9] = -1e3
    dqn.save(tmp_path / "dqn.zip")
    results = run(recipe, tmp_path / "run", 0, device="cpu", ann=tmp_path / "dqn.zip")
    (width,) = load_policy(tmp_path / "run" / "ann" / "policy.safetensors").metadata["net_arch"]
    assert 1 <= width <= 15
    for stage in results["stages"][1:]:
        assert stage["energy"]["ann_ops"] == 4 * width + width * 2
    # the same play: by the whole network's own actions on the same seeds
    whole = run(tiny(schedule=(1,)), tmp_path / "whole", 0, device="cpu", ann=tmp_path / "dqn.zip")
    assert results["stages"][0]["eval"]["returns"] == whole["stages"][0]["eval"]["returns"]
    assert DQN.load(tmp_path / "run" / "ann" / "model.zip").exploration_rate == recipe.ann.exploration_eps


def test_dead_are_units_in_the_same_play_for_the_same_seed(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny()
    ann, snn = (
        dataclasses.replace(recipe.ann, drop_dead_units=True),
        dataclasses.replace(recipe.snn, parent_steps=61, sequence_length=8),
    )
    recipe = dataclasses.replace(recipe, num_envs=4, ann=ann, snn=snn)
    plays: list[np.ndarray] = []

    class Seen(Exception):
        pass

    def see(_: DQN, observations: Any) -> DQN:
        plays.append(np.stack(list(observations)))
        raise Seen

    monkeypatch.setattr(ann_stage, "without_dead_units", see)
    changed = {
        "first": (0, {}),
        "again": (0, {}),
        "seed": (1, {}),
        "greedy": (0, {"parent_eps": 0.0}),
        "restarts": (0, {"restart_every": 5}),
    }
    for name, (seed, fields) in changed.items():
        this = dataclasses.replace(recipe, snn=dataclasses.replace(snn, **{"parent_eps": 0.5, **fields}))
        with pytest.raises(Seen):
            run(this, tmp_path / name, seed, device="cpu", ann=finished / "ann" / "policy.safetensors")
    first, again, other, greedy, restarts = plays
    assert first.shape == (16, 4, 4)  # 61 steps of 4 environments, rounded up
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    # from the same starts, by other actions
    np.testing.assert_array_equal(first[0], greedy[0])
    assert not np.array_equal(first, greedy)
    # as a student will see it: half of the environments have fallen back to a start (within 0.05 of upright)
    np.testing.assert_array_equal(first[:5], restarts[:5])
    assert (abs(restarts[5::5, 2:]) <= 0.05).all()
    assert (abs(first[5, 2:]) > 0.05).any(axis=1).all()


def test_a_parent_explores_at_a_rate_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect, rates = Student.collect, []

    def seen(self: Student, actor: Any, *args: Any) -> None:
        rates.append(actor.exploration_rate)
        collect(self, actor, *args)

    monkeypatch.setattr(Student, "collect", seen)
    snn = dataclasses.replace(tiny().snn, parent_eps=0.3, exploration_eps=0.1)
    run(tiny(snn=snn), tmp_path, 0, device="cpu")
    assert rates == [0.3, 0.3]
    for stage in ("T2", "T1"):
        assert Student.load(tmp_path / stage / "model.zip", device="cpu").exploration_rate == 0.1


def test_an_ann_on_a_stack_teaches_an_agent_on_one_frame(tmp_path: Path) -> None:
    recipe = RECIPES["cartpole-no-velocity"].smoke()
    recipe = dataclasses.replace(recipe, schedule=(2, 1), network=tiny().network)
    run(recipe, tmp_path, 0, device="cpu")
    for stage, width in (("ann", 16), ("T2", 2), ("T1", 2)):
        policy = load_policy(tmp_path / stage / "policy.safetensors")
        assert policy.observation_space.shape == (width,)
        # enough to build the environment again
        env = recipe.build_env(1, 0, **policy.metadata["provenance"]["env_kwargs"])
        assert env.observation_space == policy.observation_space


def test_a_total_budget_is_divided_among_the_stages(tmp_path: Path) -> None:
    recipe = tiny(total_snn_steps=256)
    assert [recipe.snn_steps(t) for t in recipe.schedule] == [128, 128]
    results = run(recipe, tmp_path, 0, device="cpu")
    parent_steps = recipe.snn.parent_steps
    assert [stage["env_steps"] for stage in results["stages"][1:]] == [parent_steps + 128] * 2


def test_stages_of_the_same_compute_play_and_learn_more_as_t_falls() -> None:
    snn = dataclasses.replace(tiny().snn, env_steps=1_000, distillation_updates=101, same_compute=True)
    recipe = tiny(snn=snn)
    assert [recipe.snn_steps(t) for t in (5, 2, 1)] == [200, 500, 1_000]
    assert [recipe.distillation_updates(t) for t in (5, 2, 1)] == [21, 51, 101]
    assert [tiny(snn=dataclasses.replace(snn, same_compute=False)).snn_steps(t) for t in (5, 1)] == [1_000, 1_000]


def test_an_ann_whose_loss_is_not_finite_stops_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    recipe = tiny(ann=dataclasses.replace(tiny().ann, learning_rate=1e-3, final_learning_rate=1e-3))
    original = StageCallback._checkpoint

    class Poisoned(StageCallback):
        def _checkpoint(self) -> None:
            original(self)
            with torch.no_grad():
                for parameter in self.model.policy.parameters():
                    parameter.fill_(torch.nan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent_training, "StageCallback", Poisoned)
        with pytest.raises(ValueError, match=r"the loss of ann is nan after \d+ updates; train with a lower"):
            run(recipe, tmp_path, 0, device="cpu")
    kept = DQN.load(tmp_path / "ann" / "checkpoint.zip", device="cpu")
    assert all(torch.isfinite(p).all() for p in kept.policy.parameters())
    assert len(run(recipe, tmp_path, 0, device="cpu")["stages"]) == 3  # and goes on from it


def test_a_stage_starts_with_its_parents_spike_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thresholds: list[tuple[float, float]] = []
    original = Student.keep_rates

    def keep_rates(self: Student, parent: Student, windows: int = 64) -> None:
        original(self, parent, windows)
        thresholds.append(
            tuple(next(iter(m.net.network.lif_layers.values())).threshold.item() for m in (parent, self))  # type: ignore[arg-type]
        )

    monkeypatch.setattr(Student, "keep_rates", keep_rates)
    run(tiny(), tmp_path / "a", 3, device="cpu")
    ((before, after),) = thresholds
    assert after < before
    run(tiny(snn=dataclasses.replace(tiny().snn, keep_rates=False)), tmp_path / "b", 3, device="cpu")
    assert len(thresholds) == 1


@pytest.mark.parametrize("kill_after", ["replay", "json", "model"])
def test_a_kill_between_the_files_of_a_checkpoint_is_survived(
    kill_after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    original = StageCallback._checkpoint
    count = 0

    def checkpoint(self: StageCallback) -> None:
        nonlocal count
        count += 1
        if count == 1:
            return original(self)
        with monkeypatch.context() as patch:

            def die(*_: Any, **__: Any) -> None:
                raise Killed

            if kill_after == "replay":
                patch.setattr(agent_training, "write_json", die)
            elif kill_after == "json":
                patch.setattr(self.model, "save", die, raising=False)
            original(self)
        raise Killed

    recipe = tiny(checkpoint_every=256)
    monkeypatch.setattr(StageCallback, "_checkpoint", checkpoint)
    with pytest.raises(Killed):
        run(recipe, tmp_path, 0, device="cpu")
    assert count == 2
    monkeypatch.setattr(StageCallback, "_checkpoint", original)
    results = run(recipe, tmp_path, 0, device="cpu")
    assert [stage["stage"] for stage in results["stages"]] == ["ann", "T2", "T1"]
    assert results["stages"][0]["env_steps"] == recipe.ann.env_steps
    steps = results["stages"][0]["curve"]["env_steps"]
    assert steps == sorted(set(steps))


def test_ten_kills_at_random_moments(tmp_path: Path) -> None:
    script = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "runs")!r}]
import dataclasses
from pathlib import Path
from agents import RECIPES
from snn_rl.runs.agent import run
recipe = RECIPES["cartpole"].smoke()
network = dataclasses.replace(recipe.network, net_arch=(16,))
recipe = dataclasses.replace(recipe, schedule=(2, 1), network=network, validation_episodes=2, checkpoint_every=128)
print("started", flush=True)
run(recipe, Path({str(tmp_path)!r}), 0, device="cpu")
"""
    rng = np.random.default_rng(0)
    kills = 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(40):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        try:
            # the first ten are killed early enough to hit every part of a stage, later ones run to the end
            process.wait(timeout=rng.uniform(0.05, 2.5) if kills < 10 else 300)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            results = tmp_path / "results.json"
            if results.exists():
                json.loads(results.read_text())  # whole, whenever the kill came
            continue
        finally:
            process.stdout.close()
        assert process.returncode == 0
        if kills >= 10:
            break
        # it ended before the tenth kill: the next run has all of it to do again
        for path in tmp_path.iterdir():
            subprocess.run(["rm", "-rf", str(path)], check=True)
    assert kills >= 10
    stages = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["ann", "T2", "T1"]
    assert all(len(stage["eval"]["returns"]) == 2 for stage in stages)
    assert not list(tmp_path.rglob("checkpoint*"))


def test_a_second_process_on_the_same_folder_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    holder = f"""
import sys, time; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from snn_rl.base.files import alone_in
with alone_in(Path({str(tmp_path)!r})):
    print("holds", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "holds\n"
        with pytest.raises(ValueError, match=r"another process trains in .*; wait for it, stop it, or use another"):
            run(tiny(), tmp_path, 3, device="cpu")
        assert not (tmp_path / "run.json").exists()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with alone_in(tmp_path), pytest.raises(ValueError, match="another process"), alone_in(tmp_path):
        pass


def test_a_clock_that_jumps_changes_nothing_that_is_kept(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()
    real, real_ns = time.time, time.time_ns
    # an hour back and a day ahead, in turns
    monkeypatch.setattr(time, "time", lambda: real() + (-3_600 if next(calls) % 2 else 86_400))
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() + (-3_600 if next(calls) % 2 else 86_400) * 10**9)
    jumped = run(tiny(), tmp_path, 3, device="cpu")
    assert next(calls) > 10
    undisturbed = json.loads((finished / "results.json").read_text())
    for stage, same in zip(jumped["stages"], undisturbed["stages"], strict=True):
        assert stage["eval"] == same["eval"]
        assert stage["curve"] == same["curve"]
        assert 0 <= stage["wall_seconds"] < 600


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    read_only = tmp_path / "read-only"
    read_only.mkdir()
    read_only.chmod(0o555)
    folders = [tmp_path / "file" / "run"]
    if os.geteuid():  # root may write anywhere
        folders.append(read_only)
    elif Path("/sys/kernel").is_dir():
        folders.append(Path("/sys/kernel/run"))  # root neither
    for folder in folders:
        assert exit_status(lambda folder=folder: run(tiny(), folder, 3, device="cpu")) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert str(folder) in lines[0]


# --- bad input


def test_another_runs_directory_is_refused_and_left_alone(finished: Path) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    refusal = "its seed is 3, not 4; give the options that began it, or use another --run-dir"
    with pytest.raises(ValueError, match=f"belongs to another run: {refusal}"):
        run(tiny(), finished, 4, device="cpu")
    # the seed before any field of a recipe
    with pytest.raises(ValueError, match=refusal):
        run(tiny(num_envs=4), finished, 4, device="cpu")
    with pytest.raises(ValueError, match=r"another run: its snn.leak is 0.9, not 0.5"):
        run(tiny(snn=dataclasses.replace(tiny().snn, leak=0.5)), finished, 3, device="cpu")
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_bad_device_ann_and_seed_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown device 'gpu'; use auto, cpu or cuda"):
        run(tiny(), tmp_path, device="gpu")
    for device in ("meta", "mps"):
        with pytest.raises(ValueError, match=f"unknown device '{device}'; use auto, cpu or cuda"):
            run(tiny(), tmp_path, device=device)
    with pytest.raises(ValueError, match=r"no file at .*none.zip; --ann takes the zip of an SB3 DQN"):
        run(tiny(), tmp_path, device="cpu", ann=tmp_path / "none.zip")
    with pytest.raises(ValueError, match=r"seed must lie in \[0, 100000\), got -1"):
        run(tiny(), tmp_path, -1, device="cpu")
    (tmp_path / "foreign.zip").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=r"foreign.zip: it is not a zip, or it is damaged"):
        run(tiny(), tmp_path, device="cpu", ann=tmp_path / "foreign.zip")


@pytest.mark.parametrize("file", ["model.zip", "policy.safetensors"])
def test_a_spiking_agent_is_no_ann(finished: Path, tmp_path: Path, file: str) -> None:
    with pytest.raises(ValueError, match=rf"{file}(: it is| holds) a spiking agent"):
        run(tiny(), tmp_path, device="cpu", ann=finished / "T1" / file)


def test_a_policy_file_that_does_not_fit_is_no_ann(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"foreign.safetensors is not a readable safetensors file"):
        run(tiny(), tmp_path / "run", device="cpu", ann=tmp_path / "foreign.safetensors")
    recipe = dataclasses.replace(RECIPES["cartpole-no-velocity"].smoke(), network=tiny().network)
    with pytest.raises(
        ValueError,
        match=r"policy.safetensors is of the recipe 'cartpole', trained with observation_space Box.*"
        "but cartpole-no-velocity has",
    ):
        run(recipe, tmp_path / "run", device="cpu", ann=finished / "ann" / "policy.safetensors")


def test_cuda_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda' was asked for, but torch sees no CUDA device here; use --device cpu"):
        run(tiny(), tmp_path, device="cuda")


def begun(recipe: Recipe, directory: Path, seed: int = 0) -> None:
    """A folder of this run, in which nothing has been trained yet."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "run.json").write_text(json.dumps({"recipe": recipe.as_dict(), "seed": seed, "ann": None}))


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    begun(tiny(), tmp_path)
    (tmp_path / "ann").mkdir(parents=True)
    (tmp_path / "ann" / "checkpoint.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"checkpoint.zip is not a readable DQN .*; remove .*/ann/checkpoint.zip"):
        run(tiny(), tmp_path, device="cpu")


@pytest.mark.parametrize("file", ["checkpoint.replay.pkl", "checkpoint.json"])
@pytest.mark.parametrize("damage", [b"", b"[1, 2]", None], ids=["empty", "other", "missing"])
def test_a_damaged_file_beside_the_checkpoint_is_named(file: str, damage: bytes | None, tmp_path: Path) -> None:
    begun(tiny(), tmp_path)
    this = agent_run.Run(tiny(), tmp_path, 0, "cpu")
    stage = Stage(None, None)
    env = this.env(stage, this.recipe.num_envs, 0)
    agent_training.save_checkpoint(tmp_path / "ann", ann_stage.new_ann(this, env), agent_run.History())
    if damage is None:
        (tmp_path / "ann" / file).unlink()
    else:
        (tmp_path / "ann" / file).write_bytes(damage)
    with pytest.raises(ValueError, match=r"beside .*ann/checkpoint.zip is not readable .*; remove that file"):
        run(tiny(), tmp_path, 0, device="cpu")


def test_a_damaged_parent_says_which_stage_to_train_again(tmp_path: Path) -> None:
    recipe = tiny(schedule=(1,))
    run(recipe, tmp_path, 0, device="cpu")
    (tmp_path / "T1" / "metrics.json").unlink()
    (tmp_path / "ann" / "model.zip").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"ann/model.zip is not a readable DQN .*; remove .*/ann$"):
        run(recipe, tmp_path, 0, device="cpu")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """A limit on the size of files fails a write in its middle, as a full disk does."""
    script = f"""
import resource, signal, sys; sys.path.insert(0, {str(ROOT)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from scripts.train_cartpole import main
if sys.argv[1] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
sys.exit(main(["--smoke", "--schedule", "1", "--run-dir", {str(tmp_path / "run")!r}, "--device", "cpu"]))
"""
    full = subprocess.run([sys.executable, "-c", script, "full"], capture_output=True, text=True)
    assert full.returncode == 2, full.stderr
    assert full.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "File too large" in full.stderr
    hidden = {path.name for path in (tmp_path / "run").rglob(".*")}
    assert hidden == {".lock"}  # no half-written file is left
    roomy = subprocess.run([sys.executable, "-c", script, "roomy"], capture_output=True, text=True)
    assert roomy.returncode == 0, roomy.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": ()}, "schedule must be decreasing"),
        ({"schedule": (1, 2)}, r"schedule must be decreasing timesteps >= 1, such as 5 4 3 2 1, got \(1, 2\)"),
        ({"schedule": (2, 0)}, "schedule must be decreasing"),
        ({"num_envs": 0}, "num_envs must be >= 1, got 0"),
        ({"num_envs": 3}, "train_every must be a multiple of num_envs"),
        ({"eval_episodes": 0}, "eval_episodes must be >= 1, got 0"),
        ({"eval_episodes": 5000}, "must be <= 1000"),
        ({"env_kwargs": {"frame_stack": 0}}, "env_kwargs.frame_stack must be >= 1, got 0"),
        ({"env_kwargs": {"frame_stack": float("inf")}}, "env_kwargs.frame_stack must be >= 1, got inf"),
        ({"env_kwargs": {"frame_stack": "many"}}, "env_kwargs.frame_stack must be >= 1, got many"),
        (
            {"env_kwargs": {"frame_stack": 3}, "ann_env_kwargs": {"frame_stack": 8}},
            r"ann_env_kwargs.frame_stack must be a multiple of env_kwargs.frame_stack \(3\), got 8",
        ),
        ({"network": NetworkConfig(net_arch=(64, 0))}, "network.net_arch must be >= 1, got 0"),
        ({"network": NetworkConfig(convolutions=((8, 0, 2),))}, "network.net_arch must be >= 1, got 0"),
        ({"target_return": float("nan")}, "target_return must be finite, got nan"),
        (
            {"network": NetworkConfig(net_arch=())},
            "network must have a hidden layer, whose units spike: set network.net",
        ),
        ({"total_snn_steps": 1}, "total_snn_steps must be >= 2, one for each stage, got 1"),
        ({"ann_env_kwargs": {"frame_stack": -1}}, "ann_env_kwargs.frame_stack must be >= 1, got -1"),
    ],
)
def test_bad_recipes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"percentile": 0.0}, r"snn.percentile must lie in \(0, 100\], got 0.0"),
        ({"leak": 1.5}, r"snn.leak must lie in \[0, 1\], got 1.5"),
        ({"leak": -0.5}, "snn.leak must be >= 0, got -0.5"),
        ({"learning_rate": float("nan")}, "snn.learning_rate must be >= 0, got nan"),
        ({"learning_rate": float("inf")}, "snn.learning_rate must be finite, got inf"),
        ({"leak": 2}, r"snn.leak must lie in \[0, 1\], got 2"),
        ({"spike_weight": -1}, "snn.spike_weight must be >= 0, got -1"),
        ({"batch_size": 2.5}, "snn.batch_size must be >= 1, got 2.5"),
        ({"max_grad_norm": 0.0}, "snn.max_grad_norm must be > 0, got 0.0"),
        (
            {"learning_rate": 1e-3, "play_learning_rate": 2e-3},
            r"snn.play_learning_rate must be <= snn.learning_rate \(0.001\), which falls to it, got 0.002",
        ),
        ({"batch_size": 0}, "snn.batch_size must be >= 1, got 0"),
        (
            {"rewards": True, "td_weight": 0.0, "distillation_weight": 0.0},
            "must not both be 0: nothing would be learnt",
        ),
        ({"buffer_size": 50}, "snn.buffer_size must be >= 160, a window of each environment, got 50"),
    ],
)
def test_bad_snn_fields_are_named_before_the_ann_is_trained(changes: dict[str, Any], message: str) -> None:
    recipe = tiny()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(recipe, snn=dataclasses.replace(recipe.snn, **changes))


def test_every_recipe_is_json_and_round_trips() -> None:
    for recipe in RECIPES.values():
        assert json.loads(json.dumps(recipe.as_dict()))["name"] == recipe.name


def test_a_kill_while_a_stage_distils_costs_a_piece_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny(schedule=(1,))
    recipe = dataclasses.replace(recipe, snn=dataclasses.replace(recipe.snn, distillation_updates=50))

    class Killed(BaseException):
        pass

    rates: list[float] = []
    collected: list[int] = []
    drawn: list[np.ndarray] = []
    distil, collect = Student.distil, Student.collect

    def dies_twice(self: Student, steps: int, schedule: Any, *rest: Any) -> float:
        drawn.append(np.random.get_state()[1].copy())  # type: ignore[index, union-attr]
        loss = distil(self, steps, schedule, *rest)
        rates.append(self.policy.optimizer.param_groups[0]["lr"])
        if len(rates) in (2, 5):
            raise Killed
        return loss

    def counted(self: Student, actor: Any, steps: int, *args: Any) -> None:
        collected.append(steps)
        collect(self, actor, steps, *args)

    monkeypatch.setattr(Student, "distil", dies_twice)
    monkeypatch.setattr(Student, "collect", counted)
    for pieces in (1, 3):
        with pytest.raises(Killed):
            run(recipe, tmp_path, 0, device="cpu")
        kept = Student.load(tmp_path / "T1" / "checkpoint.zip", device="cpu")
        assert kept.distilled == 3 * pieces  # 50 / 20, rounded up
    results = run(recipe, tmp_path, 0, device="cpu")
    assert collected == [recipe.snn.parent_steps]
    # The second and the fourth piece were made twice; the learning rate is that of one distillation without a break.
    assert (rates[1], rates[4]) == (rates[2], rates[5])
    assert len(rates) == 2 + 17
    # Other windows after each start, which would else be all that is ever replayed.
    assert not np.array_equal(drawn[2], drawn[5])
    ends = [min(3 * piece, 50) - 1 for piece in range(1, 18)]
    first, last = recipe.snn.learning_rate, recipe.snn.play_learning_rate
    expected = [first + (last - first) * at / 50 for at in ends]
    np.testing.assert_allclose(rates[:1] + rates[2:4] + rates[5:], expected)
    stage = results["stages"][1]
    assert stage["env_steps"] == recipe.snn.parent_steps + recipe.snn.env_steps
    assert stage["updates"] >= 50


def test_averaged_weights_are_validated_kept_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny(schedule=(1,), checkpoint_every=256, validate_every=512)
    recipe = dataclasses.replace(recipe, ann=dataclasses.replace(recipe.ann, average_steps=200))
    decay = math.exp(-recipe.ann.train_every / 200)
    by_hand: dict[str, torch.Tensor] = {}
    validated = 0

    class Killed(BaseException):
        pass

    best: dict[str, torch.Tensor] = {}
    evaluated, rollout = agent_run.evaluate, StageCallback._on_rollout_start
    checkpointed: dict[str, torch.Tensor] = {}

    def follow(self: StageCallback) -> None:
        if self.stage.timesteps is None and self.model._n_updates > self.averaged_updates:  # type: ignore[attr-defined]
            for name, weight in self.model.q_net.state_dict().items():  # type: ignore[attr-defined]
                old = by_hand.get(name, weight)
                by_hand[name] = decay * old + (1 - decay) * weight
            if self.num_timesteps == 768 and not checkpointed:
                rollout(self)
                checkpointed.update(by_hand)
                raise Killed
        rollout(self)

    def look(agent: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal validated
        if isinstance(agent, DQN):
            validated += 1
            for name, weight in agent.q_net.state_dict().items():
                torch.testing.assert_close(weight, by_hand[name])
            best.update(by_hand)  # as every validation is made to be
            return dataclasses.replace(evaluated(agent, *args, **kwargs), returns=[float(validated)])
        return evaluated(agent, *args, **kwargs)

    monkeypatch.setattr(StageCallback, "_on_rollout_start", follow)
    monkeypatch.setattr(agent_run, "evaluate", look)
    with pytest.raises(Killed):
        run(recipe, tmp_path, 0, device="cpu")
    by_hand.clear()
    by_hand.update(checkpointed)
    run(recipe, tmp_path, 0, device="cpu")
    assert validated >= 2
    kept = DQN.load(tmp_path / "ann" / "model.zip", device="cpu")
    assert kept.validated[1] == validated  # type: ignore[attr-defined]
    for name, weight in kept.q_net.state_dict().items():
        torch.testing.assert_close(weight, best[name])


def test_a_spiking_stage_averages_its_updates_and_goes_on_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(schedule=(1,), checkpoint_every=64)
    recipe = dataclasses.replace(recipe, snn=dataclasses.replace(recipe.snn, average_updates=3, train_every=16))
    by_hand: dict[str, torch.Tensor] = {}
    at_a_checkpoint: dict[str, torch.Tensor] = {}
    validated: list[dict[str, torch.Tensor]] = []
    distil, rollout = Student._update, StageCallback._on_rollout_start
    save, evaluated = agent_training.save_checkpoint, agent_run.evaluate
    saved = 0

    class Killed(BaseException):
        pass

    def take_in(agent: Student, made: int) -> None:
        keep = math.exp(-made / 3)
        for name, weight in agent.net.state_dict().items():
            by_hand[name] = keep * by_hand[name] + (1 - keep) * weight if name in by_hand else weight.clone()

    def update(self: Student, *args: Any, **kwargs: Any) -> float:
        loss = distil(self, *args, **kwargs)
        if args[1] == ("distil",):  # and not of own play
            take_in(self, 1)
        return loss

    def begin_rollout(self: StageCallback) -> None:
        made = self.model._n_updates - self.averaged_updates  # type: ignore[attr-defined]
        if self.stage.timesteps is not None and made:
            assert made == recipe.snn.gradient_steps
            take_in(self.model, made)  # type: ignore[arg-type]
        rollout(self)

    def save_and_die(folder: Path, agent: DQN, *args: Any, **kwargs: Any) -> None:
        nonlocal saved
        save(folder, agent, *args, **kwargs)
        saved += isinstance(agent, Student)
        if saved in (3, 7):  # while it distils, and on its own play
            at_a_checkpoint.update({name: average.clone() for name, average in by_hand.items()})
            saved += 1
            raise Killed

    def look(agent: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(agent, Student):
            validated.append({name: weight.clone() for name, weight in agent.net.state_dict().items()})
            for name, weight in validated[-1].items():
                torch.testing.assert_close(weight, by_hand[name])
        return evaluated(agent, *args, **kwargs)

    monkeypatch.setattr(Student, "_update", update)
    monkeypatch.setattr(StageCallback, "_on_rollout_start", begin_rollout)
    monkeypatch.setattr(agent_training, "save_checkpoint", save_and_die)
    monkeypatch.setattr(agent_run, "evaluate", look)
    for _ in range(2):
        with pytest.raises(Killed):
            run(recipe, tmp_path, 0, device="cpu")
        by_hand.clear()
        by_hand.update(at_a_checkpoint)
    run(recipe, tmp_path, 0, device="cpu")
    assert len(validated) == 1
    kept = Student.load(tmp_path / "T1" / "model.zip", device="cpu").net.state_dict()
    for name, weight in validated[0].items():
        assert torch.equal(kept[name], weight)


def test_a_checkpoint_without_its_average_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny(schedule=(1,))
    recipe = dataclasses.replace(recipe, snn=dataclasses.replace(recipe.snn, average_updates=3))

    def dies(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(Student, "learn", dies)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path, 0, device="cpu")
    (tmp_path / "T1" / "checkpoint.average.safetensors").unlink()
    with pytest.raises(ValueError, match="remove the checkpoint beside it to begin the stage again"):
        run(recipe, tmp_path, 0, device="cpu")


def test_environments_that_no_stage_can_learn_in_are_named_at_once(tmp_path: Path) -> None:
    def of(env_id: str, wrap: Any = lambda env: env, num_envs: int | None = None) -> Recipe:
        def make(n: int, *, seed: int) -> VecEnv:
            return DummyVecEnv([lambda: wrap(gym.make(env_id))] * (num_envs or n))

        return tiny(make_env=make, env_kwargs={})

    def from_one(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
        env.action_space = gym.spaces.Discrete(2, start=1)
        return env

    def in_a_dict(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
        inner = gym.spaces.Dict(x=env.observation_space)
        return gym.wrappers.TransformObservation(env, lambda x: {"y": {"x": x}}, gym.spaces.Dict(y=inner))

    def named(n: int, *, seed: int, name: str) -> VecEnv:
        return VecMonitor(DummyVecEnv([lambda: gym.make(name)] * n))

    other_for_the_ann = tiny(make_env=named, env_kwargs={"name": "CartPole-v1"}, ann_env_kwargs={"name": "Acrobot-v1"})
    for recipe, message in (
        (of("Pendulum-v1"), r"cartpole: DQN needs a Discrete action space, got Box.*; discretise the actions"),
        (
            of("CartPole-v1", from_one),
            r"cartpole: an agent needs Discrete actions from 0 on, got Discrete\(2, start=1\)",
        ),
        (of("CartPole-v1", in_a_dict), "of cartpole cannot be built: .*Nested observation spaces are not supported"),
        (of("CartPole-v1", num_envs=3), r"make_env of cartpole must return a VecEnv of 1 environments, got"),
        (tiny(make_env=lambda n, seed: gym.make("CartPole-v1"), env_kwargs={}), r"must return a VecEnv of 1 environ"),
        (tiny(make_env=lambda n, seed: gym.make_vec("CartPole-v1", n), env_kwargs={}), r"must return a VecEnv of 1"),
        (other_for_the_ann, r"ann_env_kwargs of cartpole may add a stack of frames alone, but {'name': 'Acrobot-v1'}"),
    ):
        with pytest.raises(ValueError, match=message):
            run(recipe, tmp_path / "run", 0, device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="run is a file, and a folder is needed; use another --run-dir"):
        run(tiny(), str(tmp_path / "run"), 0, device="cpu")


def test_another_recipe_is_named_before_its_fields(finished: Path) -> None:
    with pytest.raises(ValueError, match=r"its recipe is 'cartpole', not 'mine'"):
        run(tiny(name="mine", num_envs=4), finished, 4, device="cpu")


def test_progress_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "snn_rl")
    run(tiny(schedule=(1,)), tmp_path, 0, device="cpu")
    shutil.rmtree(tmp_path / "T1")
    run(tiny(schedule=(1,)), tmp_path, 0, device="cpu")
    said = "\n".join(caplog.messages)
    for message in (
        "ann begins, from nothing",
        r"ann after 1024 steps: \d+\.\d{1,2} on validation",
        "T1 begins, from ann",
        r"T1 after 4 of 4 updates of distillation: loss \d+\.\d+",
        r"T1 after 256 steps: \d+\.\d{1,2} on validation",
        "ann is already finished\nT1 begins, from ann",
    ):
        assert re.search(message, said), message
