"""Sweeps on a real Ray of two workers, one of which dies on the way, and the table against figures made otherwise."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import snn_rl.cli.sweeping.cluster as module
from agents import RECIPES
from envs.classic import make_cartpole
from scripts import sweep as script
from snn_rl.base.files import alone_in, write_json
from snn_rl.cli.sweeping.cluster import cluster, sweep
from snn_rl.cli.sweeping.jobs import Job, jobs
from snn_rl.cli.sweeping.table import gather, markdown, summary
from snn_rl.runs.recipe import SEEDS_PER_RUN, Recipe

ray = pytest.importorskip("ray")
ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = 512  # environment steps


def tiny(make_env: Callable[..., Any] = make_cartpole) -> Recipe:
    recipe = RECIPES["cartpole"].smoke()
    network = dataclasses.replace(recipe.network, net_arch=(16,))
    return dataclasses.replace(
        recipe, make_env=make_env, schedule=(1,), network=network, checkpoint_every=CHECKPOINT, validation_episodes=2
    )


@pytest.fixture(scope="module")
def workers() -> Iterator[None]:
    with cluster(num_cpus=2):
        yield


def dangerous(root: Path, notes: Path) -> Callable[..., VecEnv]:
    """Environments that kill seed 0's process once, when its first checkpoint stands, and fail for seed 3."""

    class Dangerous(VecEnvWrapper):
        def reset(self) -> Any:
            return self.venv.reset()

        def step_wait(self) -> Any:
            if (root / "cartpole" / "seed-0" / "ann" / "checkpoint.zip").is_file() and not (notes / "killed").exists():
                (notes / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return self.venv.step_wait()

    def make_env(num_envs: int, *, seed: int, render_mode: str | None = None, **kwargs: Any) -> VecEnv:
        env = make_cartpole(num_envs, seed=seed, render_mode=render_mode, **kwargs)
        if seed == 3 * SEEDS_PER_RUN:
            raise RuntimeError("no such\nplanet")
        if seed >= SEEDS_PER_RUN or num_envs == 1:  # of another run, to evaluate in, or to ask for its spaces
            return env
        with (notes / "processes").open("a") as file:
            print(os.getpid(), file=file)
        return Dangerous(env)

    return make_env


def belongs_to_another(folder: Path) -> None:
    write_json(folder / "ann" / "metrics.json", {})
    write_json(folder / "run.json", {"seed": 7})


def steps_of(events: Path) -> list[int]:
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    return [event.step for event in accumulator.Scalars("train/loss")]


def test_a_killed_worker_and_runs_that_fail_lose_no_other(workers: None, tmp_path: Path) -> None:
    root, notes = tmp_path / "sweep", tmp_path / "notes"
    notes.mkdir()
    belongs_to_another(root / "cartpole" / "seed-2")
    todo = jobs([tiny(dangerous(root, notes))], [[]], [0, 1, 2, 3], root)
    said: list[str] = []
    gathered = sweep(todo, root, say=said.append)

    # elsewhere, from the checkpoint, to the end
    assert (notes / "killed").exists()
    first, *others = (notes / "processes").read_text().split()
    assert others
    assert first not in others
    begun, resumed = sorted((root / "cartpole" / "seed-0" / "ann").glob("events*"), key=lambda p: p.stat().st_mtime)
    assert steps_of(begun)[0] < CHECKPOINT < steps_of(resumed)[0]
    results = [json.loads((root / "cartpole" / f"seed-{seed}" / "results.json").read_text()) for seed in (0, 1)]
    for result in results:
        assert [stage["stage"] for stage in result["stages"]] == ["ann", "T1"]
        assert result["stages"][0]["env_steps"] == 1_024
        assert result["hardware"].endswith("1 threads")
    assert not list(root.rglob(module.MARK))

    assert [(row["stage"], row["seeds"]) for row in gathered["rows"]] == [("ann", 2), ("T1", 2)]
    for index, row in enumerate(gathered["rows"]):
        returns = [result["stages"][index]["eval"]["mean"] for result in results]
        assert row["returns"] == {"0": returns[0], "1": returns[1]}
        assert row["mean"] == pytest.approx(np.mean(returns))
    assert [run["run"] for run in gathered["failed"]] == ["cartpole/seed-2", "cartpole/seed-3"]
    foreign, broken = (run["error"] for run in gathered["failed"])
    assert "seed-2 belongs to another run" in foreign
    assert broken == "the environment of cartpole cannot be built: RuntimeError: no such planet"
    assert gathered["missing"] == []
    assert len(said) == 4
    assert json.loads((root / "sweep.json").read_text()) == gathered
    assert (root / "sweep.md").read_text() == markdown(gathered)

    # the same sweep again trains nothing
    before = {path: path.stat().st_mtime_ns for path in root.rglob("model.zip")}
    assert sweep(todo[:2], root, say=said.append)["rows"] == gathered["rows"]
    assert {path: path.stat().st_mtime_ns for path in root.rglob("model.zip")} == before


def test_a_worker_that_always_dies_is_a_run_that_failed(
    workers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_env(num_envs: int, **_: Any) -> VecEnv:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    monkeypatch.setattr(module, "RETRIES", 1)
    gathered = sweep(jobs([tiny(make_env)], [[]], [0], tmp_path), tmp_path, say=lambda _: None)
    assert gathered["rows"] == []
    assert [run["run"] for run in gathered["failed"]] == ["cartpole/seed-0"]
    assert "WorkerCrashedError" in gathered["failed"][0]["error"]
    assert "\n" not in gathered["failed"][0]["error"]


def test_the_script_gathers_what_it_can_and_names_what_failed(workers: None, tmp_path: Path) -> None:
    belongs_to_another(tmp_path / "cartpole-smoke-schedule=1_snn.spike_weight=0.01" / "seed-1")
    variant = ["--set", "schedule=1", "snn.spike-weight=0.01", "--seeds", "0", "1"]
    address = ray.get_runtime_context().gcs_address
    command = ["scripts/sweep.py", "cartpole", "--smoke", *variant, "--root", str(tmp_path), "--address", address]
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: 1 of 2 runs failed")
    assert lines[0].endswith("cartpole-smoke-schedule=1_snn.spike_weight=0.01/seed-1")
    assert (tmp_path / "sweep.md").read_text() in result.stdout
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert [(row["override"], row["stage"], row["seeds"]) for row in rows] == [
        ("schedule=1 snn.spike_weight=0.01", "ann", 1),
        ("schedule=1 snn.spike_weight=0.01", "T1", 1),
    ]
    trained = json.loads((tmp_path / "cartpole-smoke-schedule=1_snn.spike_weight=0.01/seed-0/run.json").read_text())
    assert trained["recipe"]["snn"]["spike_weight"] == 0.01


def test_what_no_machine_can_run_is_refused(workers: None, tmp_path: Path) -> None:
    todo = jobs([tiny()], [[]], [0], tmp_path)
    with pytest.raises(ValueError, match="no machine of the cluster has 1000 CPUs and 0 GPUs for a run"):
        sweep(todo, tmp_path, cpus_per_run=1_000)
    with pytest.raises(ValueError, match="--cpus-per-run must be >= 1"):
        sweep(todo, tmp_path, cpus_per_run=0)
    threads = jobs([tiny()], [["cpu_threads=2"]], [0], tmp_path)
    with pytest.raises(ValueError, match=r"--cpus-per-run must be >= 2, .*/seed-0's cpu_threads, got 1"):
        sweep(threads, tmp_path)
    assert not list(tmp_path.iterdir())


# --- taking over a folder


def test_a_run_waits_for_the_process_before_to_let_go(tmp_path: Path) -> None:
    held, enough = threading.Event(), threading.Event()

    def hold() -> None:
        with alone_in(tmp_path):
            held.set()
            enough.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert held.wait(60)
        threading.Timer(0.3, enough.set).start()
        results = module._train(tiny(), tmp_path, 0, "cpu", 1)
    finally:
        enough.set()
        holder.join()
    assert [stage["stage"] for stage in results["stages"]] == ["ann", "T1"]
    assert not (tmp_path / module.MARK).exists()


def test_a_folder_that_stays_held_is_an_error_and_keeps_its_holders_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.0)
    mark = tmp_path / module.MARK

    def others(*_: Any, **__: Any) -> None:
        write_json(mark, {"host": "another", "pid": 1})  # who holds the folder
        raise ValueError("another process trains in it")

    monkeypatch.setattr(module, "run", others)
    with pytest.raises(ValueError, match="another process trains in"):
        module._train(tiny(), tmp_path, 0, "cpu", 1)
    assert json.loads(mark.read_text())["host"] == "another"


def test_another_machines_worker_is_given_time_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    module._mark(tmp_path)
    module._mark(tmp_path)  # this machine's own: its lock tells
    assert slept == []
    write_json(tmp_path / module.MARK, {"host": "another", "pid": 1})
    module._mark(tmp_path)
    assert slept == [module.GRACE_SECONDS]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"host": ["another"]}'])
def test_a_damaged_mark_is_one_of_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    (tmp_path / module.MARK).write_text(content)
    module._mark(tmp_path)
    assert slept == [module.GRACE_SECONDS]
    assert json.loads((tmp_path / module.MARK).read_text())["pid"] == os.getpid()


def test_a_finished_stage_that_is_damaged_fails_its_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = {"stage": "T1", "timesteps": 1, "eval": {"returns": [], "mean": None, "std": 0.0, "episodes": 1}}
    rest = {"env_steps": 1, "curve": {"env_steps": [], "returns": []}, "threshold": {}, "leak": {}, "energy": None}
    stage |= {**rest, "spike_rate": {"mean": 0.1, "layers": {}}}
    head = {"recipe": "cartpole", "env_id": "CartPole-v1", "seed": 0, "versions": {}, "hardware": "-"}
    monkeypatch.setattr(module, "run", lambda *_, **__: {**head, "stages": [stage]})
    with pytest.raises(ValueError, match=r"results\.json: stages\[0\]\.eval\.mean must be a finite number, got None"):
        module._train(tiny(), tmp_path, 0, "cpu", 1)
    assert not (tmp_path / module.MARK).exists()
    stage["eval"]["mean"] = 1.0  # type: ignore[index]
    assert module._train(tiny(), tmp_path, 0, "cpu", 1)["stages"] == [stage]


# --- the table


@pytest.mark.parametrize(
    ("scores", "mean", "iqm"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 800], 103.5, 4.5),  # 3, 4, 5, 6 are left
        ([0, 100, 10, 0], 27.5, 5.0),  # 0 and 10
        ([9, 1, 2], 4.0, 4.0),  # a quarter of three is no whole run
    ],
)
def test_means_by_hand(scores: list[float], mean: float, iqm: float) -> None:
    row = summary(scores)
    assert row["mean"] == pytest.approx(mean)
    assert row["iqm"] == pytest.approx(iqm)
    assert row["low"] is not None
    assert row["high"] is not None
    assert row["low"] <= iqm <= row["high"]


def test_the_interval_against_all_resamples_there_are() -> None:
    scores = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    resamples = np.sort(np.array(list(itertools.product(scores, repeat=6))), axis=1)
    exact = resamples[:, 1:5].mean(axis=1)
    row = summary(scores)
    assert row["low"] is not None
    assert row["high"] is not None
    for bound, share in ((row["low"], 0.025), (row["high"], 0.975)):
        assert (exact < bound).mean() <= share + 0.005
        assert (exact <= bound).mean() >= share - 0.005


def test_equal_runs_and_single_ones() -> None:
    assert summary([500.0] * 5) == {"mean": 500.0, "iqm": 500.0, "low": 500.0, "high": 500.0}
    assert summary([21.0]) == {"mean": 21.0, "iqm": 21.0, "low": None, "high": None}


def test_the_table_names_what_is_not_in_it() -> None:
    def stage(mean: float, rate: float) -> dict[str, Any]:
        energy = {"ann_over_snn": 10 * rate}
        return {"stage": "T1", "eval": {"mean": mean}, "spike_rate": {"mean": rate}, "energy": energy}

    todo = jobs([tiny()], [[], ["snn.leak=0.8"]], [0, 1], Path("root"))
    finished = {todo[0]: {"stages": [stage(1.0, 0.1)]}, todo[1]: {"stages": [stage(3.0, 0.2)]}}
    gathered = gather(todo, finished, {todo[2]: "out of luck"})
    (row,) = gathered["rows"]
    assert (row["recipe"], row["override"], row["seeds"], row["mean"]) == ("cartpole", "", 2, 2.0)
    assert (row["spike_rate"], row["ann_over_snn"]) == (pytest.approx(0.15), pytest.approx(1.5))
    text = markdown(gathered)
    assert "- cartpole-snn.leak=0.8/seed-0: out of luck" in text
    assert "Not finished yet: cartpole-snn.leak=0.8/seed-1" in text


def test_the_documents_python_reads_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "sweep.md").read_text(), re.DOTALL)
    todo = jobs([tiny()], [[], ["snn.leak=0.8"]], [0, 1], Path("root"))
    means = (1.0, 2.0, 3.0, 4.0)
    finished = {
        job: {"stages": [{"stage": "T1", "eval": {"mean": mean}, "spike_rate": None, "energy": None}]}
        for job, mean in zip(todo, means, strict=True)
    }
    write_json(tmp_path / "runs" / "sweep" / "sweep.json", gather(todo, finished, {}))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(snippet, "sweep.md", "exec"), names)
    assert {name: scores.tolist() for name, scores in names["scores"].items()} == {
        "": [[1.0], [2.0]],
        "snn.leak=0.8": [[3.0], [4.0]],
    }


# --- what to run, and bad input


def test_every_run_has_its_own_recipe_seed_and_folder() -> None:
    overrides = [[], ["snn.spike-weight=0.02", "schedule=3 1"], ["snn.leak-reset"]]
    todo: list[Job] = jobs([RECIPES["cartpole"], RECIPES["pong-lite"]], overrides, [0, 4], Path("root"), "-smoke")
    assert len({job.directory for job in todo}) == 12
    assert todo[0].directory == Path("root/cartpole-smoke/seed-0")
    assert todo[0].recipe == RECIPES["cartpole"]
    changed = todo[3]
    assert changed.directory == Path("root/cartpole-smoke-snn.spike_weight=0.02_schedule=3_1/seed-4")
    assert (changed.recipe.snn.spike_weight, changed.recipe.schedule, changed.seed) == (0.02, (3, 1), 4)
    assert todo[4].recipe.snn.leak_reset


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chess"], "unknown recipe 'chess'; there are breakout-lite, cartpole"),
        (["cartpole", "--set", "snn.nope=1"], "--set snn.nope=1: cartpole has no such field"),
        (
            ["cartpole", "--set", "snn.leak=much"],
            "--set snn.leak=much: cartpole has no such field, or it does not take",
        ),
        (["cartpole", "--set", "snn.leak=0.5", "--set", "snn.leak=1.5"], "snn.leak must lie in [0, 1], got 1.5"),
        (["cartpole", "--set", "env-kwargs=velocity False"], "unexpected keyword argument 'velocity'"),
        (["pong-lite", "--set", "env_kwargs.image-size=0"], "image_size must be >= 1, got 0"),
        (["cartpole", "--set", "name=mine"], "name another recipe instead"),
        (["cartpole", "--seeds", "0", "-1"], "seed must lie in [0, 100000), got -1"),
        (["cartpole", "cartpole"], "two runs in runs/sweep/cartpole/seed-0: name each"),
        (["cartpole", "--set", "snn.leak=0.5", "--set", "snn.leak=0.5"], "name each recipe, seed and --set once"),
        (["cartpole", "--root", "/dev/null/sweep"], "Not a directory"),
        (["cartpole", "--address", "somewhere"], "address must be auto or HOST:PORT"),
        (["cartpole", "--address", "127.0.0.1:1"], "no cluster answers at 127.0.0.1:1"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert script.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("seed-*"))


@pytest.mark.parametrize("package", ["ray", "scipy"])
def test_a_missing_package_is_named(
    package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    assert script.main(["cartpole"]) == 2
    assert capsys.readouterr().err == f"error: this command needs {package}: pip install 'snn_rl[sweep]'\n"
