"""Shipping a run: files that are half as large and play the same games, and a table made of what they returned."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import snn_rl.base.files as files
import snn_rl.share.publish as publish
from agents import RECIPES
from scripts.publish import main
from snn_rl.rl.evaluation import Evaluation, evaluate
from snn_rl.rl.policy_file import LoadedPolicy, load_policy
from snn_rl.runs.agent import run
from snn_rl.runs.recipe import SEEDS_PER_RUN, TEST_SEEDS

STAGES = ("ann", "T2", "T1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = dataclasses.replace(RECIPES["cartpole"].smoke(), schedule=(2, 1), eval_episodes=20)
    directory = tmp_path_factory.mktemp("run")
    run(recipe, directory, 3, device="cpu")
    return directory


def test_what_is_shipped_is_what_is_listed(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(finished), "--command", "python train.py --seed 3", "--into", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    results = json.loads((tmp_path / "cartpole" / "results.json").read_text())
    listed = (tmp_path / "README.md").read_text()
    assert "`python train.py --seed 3`" in listed
    assert [s["stage"] for s in results["stages"]] == list(STAGES)
    for stage, line in zip(results["stages"], printed, strict=False):
        path = tmp_path / "cartpole" / f"{stage['stage']}.safetensors"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == stage["sha256"]
        env = RECIPES["cartpole"].build_env(20, TEST_SEEDS + 3 * SEEDS_PER_RUN)
        played = evaluate(load_policy(path), env, 20)
        assert played.returns == stage["eval"]["returns"]
        assert line == f"{stage['stage']}: {played.mean:.2f} +- {played.std:.2f}, {stage['precision']}"
        assert f"| {played.mean:.2f} ± {played.std:.2f} | 20 |" in listed
        assert f"[{stage['stage']}](cartpole/{stage['stage']}.safetensors)" in listed
        dtype = torch.float16 if stage["precision"] == "half" else torch.float32
        assert {w.dtype for w in load_file(path).values()} == {dtype}
        trained = load_policy(finished / stage["stage"] / "policy.safetensors")
        for name, weight in load_policy(path).policy.net.state_dict().items():
            torch.testing.assert_close(weight, trained.policy.net.state_dict()[name], rtol=2e-3, atol=1e-6)


def first_weight(policy: LoadedPolicy) -> torch.Tensor:
    return next(iter(policy.policy.net.state_dict().values()))


def test_weights_whose_rounding_changes_a_return_are_shipped_whole(finished: Path, tmp_path: Path) -> None:
    def play(policy: LoadedPolicy) -> Evaluation:  # as if the game depended on the last bit of a weight
        return Evaluation([first_weight(policy).double().sum().item()], [1], None)

    shipped = publish.publish(finished, tmp_path, play, "-", "-")["stages"]
    assert {stage["precision"] for stage in shipped} == {"single"}
    for stage in STAGES:
        ours = load_file(tmp_path / f"{stage}.safetensors")
        theirs = load_file(finished / stage / "policy.safetensors")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_weights_whose_rounding_changes_nothing_are_shipped_in_half(finished: Path, tmp_path: Path) -> None:
    shipped = publish.publish(finished, tmp_path, lambda _: Evaluation([1.0], [1], None), "-", "-")["stages"]
    assert {stage["precision"] for stage in shipped} == {"half"}
    for stage in STAGES:
        whole = (finished / stage / "policy.safetensors").stat().st_size
        assert (tmp_path / f"{stage}.safetensors").stat().st_size < 0.7 * whole


def test_what_half_precision_cannot_hold_is_found(finished: Path) -> None:
    policy = load_policy(finished / "T1" / "policy.safetensors")
    assert publish._fits_half(policy)
    with torch.no_grad():
        next(iter(policy.network.lif_layers.values())).raw_threshold.fill_(1e6)  # type: ignore[operator, union-attr]
    assert not publish._fits_half(policy)


def test_a_run_that_has_not_finished_is_not_shipped(finished: Path, tmp_path: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    (tmp_path / "run.json").write_text((finished / "run.json").read_text())
    for stages in ([], results["stages"][:2]):
        (tmp_path / "results.json").write_text(json.dumps({**results, "stages": stages}))
        with pytest.raises(ValueError, match=r"has not finished its stages|holds no finished stage yet"):
            publish.publish(tmp_path, tmp_path / "out", lambda _: Evaluation([], [], None), "-", "-")
    assert not (tmp_path / "out").exists()


def test_minutes_are_listed_of_stages_that_were_trained(finished: Path, tmp_path: Path) -> None:
    published = publish.publish(finished, tmp_path / "a", lambda _: Evaluation([1.0], [1], None), "-", "-")
    for seconds, listed in ((90.0, "1.5"), (0.0, "-")):  # the latter of an ANN that was given
        published["stages"][0]["wall_seconds"] = seconds
        (tmp_path / "a" / "results.json").write_text(json.dumps(published))
        row = next(row for row in publish.table_of_contents(tmp_path).read_text().splitlines() if "[ann]" in row)
        assert row.split(" | ")[6] == listed


def test_what_cannot_be_shipped_is_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([str(tmp_path), "--command", "-", "--into", str(tmp_path)]) == 2
    assert "no results at" in capsys.readouterr().err
    results = json.loads((finished / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({**results, "recipe": "../../cartpole"}))
    assert main([str(tmp_path), "--command", "-", "--into", str(tmp_path)]) == 2
    assert "is no run of a recipe here: breakout-lite, cartpole, " in capsys.readouterr().err
    (tmp_path / "results.json").unlink()
    with pytest.raises(ValueError, match="no results at"):
        publish.publish(tmp_path, tmp_path, lambda policy: None, "-", "-")  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(publish, "MAX_BYTES", 1_000)
    assert main([str(finished), "--command", "-", "--into", str(tmp_path)]) == 2
    assert "error: ann has " in (error := capsys.readouterr().err)
    assert "a file to ship has 1,000 at most" in error
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"the command must be text of one line, got 'a\\nb'"):
        publish.publish(finished, tmp_path, one_return, "a\nb", "-")


def one_return(_: LoadedPolicy) -> Evaluation:
    return Evaluation([1.0], [1], None)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copied(finished: Path, to: Path, results: Any = None, begun: Any = None) -> Path:
    """The run in another folder, with other results.json and run.json."""
    shutil.copytree(finished, to)
    for name, value in (("results.json", results), ("run.json", begun)):
        if value is not None:
            (to / name).write_text(json.dumps(value))
    return to


@pytest.mark.parametrize(
    "name", ["../../x", "/x", "", ".", "..", "T1/../../../x", "T1/x", "T2", 1, None, ["T1"], "a\nb"]
)
def test_a_stage_of_another_name_writes_nowhere(finished: Path, tmp_path: Path, name: Any) -> None:
    results = json.loads((finished / "results.json").read_text())
    name = str(tmp_path / "x") if name == "/x" else name
    results["stages"][-1]["stage"] = name
    run = copied(finished, tmp_path / "a" / "b" / "run", results)
    for place in (run / "../../x", tmp_path / "x", run / "T1" / "x"):  # where the name leads when the file is read
        shutil.copytree(run / "T1", place.resolve())
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"results\.json: stages\[2\]\.stage must be (a|another) name"):
        publish.publish(run, tmp_path / "a" / "b" / "out", one_return, "-", "-")
    assert contents(tmp_path) == before


def test_damaged_files_of_a_run_are_named_and_nothing_is_written(finished: Path, tmp_path: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    for key in ("env_steps", "updates", "wall_seconds", "hardware", "spike_rate", "eval", "timesteps"):
        stages = [*results["stages"][:2], {k: v for k, v in results["stages"][2].items() if k != key}]
        run = copied(finished, tmp_path / key, {**results, "stages": stages})
        with pytest.raises(ValueError, match=rf"results\.json: stages\[2\]\.{key} is missing; restore it"):
            publish.publish(run, tmp_path / "out", one_return, "-", "-")
    for number, damaged in enumerate(([], {}, {"recipe": 1}, {"recipe": {}}, {"recipe": {"schedule": ["2"]}})):
        run = copied(finished, tmp_path / str(number), begun=damaged)
        with pytest.raises(ValueError, match=r"run\.json: (it|recipe|recipe\.schedule|recipe\.schedule\[0\]) "):
            publish.publish(run, tmp_path / "out", one_return, "-", "-")
    (run / "run.json").unlink()
    with pytest.raises(ValueError, match=r"no .*run\.json; give the folder of a run as it was trained"):
        publish.publish(run, tmp_path / "out", one_return, "-", "-")
    for schedule in ([], [1], [2, 1, 1]):
        run = copied(finished, tmp_path / f"schedule-{len(schedule)}", begun={"recipe": {"schedule": schedule}})
        with pytest.raises(ValueError, match="has not finished its stages"):
            publish.publish(run, tmp_path / "out", one_return, "-", "-")
    classifiers = [{**stage, "accuracy": {"top1": 1.0, "top5": 1.0, "images": 1}, "epochs": 1} for stage in stages]
    for stage in classifiers:
        stage |= {"curve": {"epochs": [], "accuracy": []}, "timesteps": None}
    run = copied(finished, tmp_path / "classifiers", {**results, "stages": classifiers})
    with pytest.raises(ValueError, match="holds classifiers; agents alone are published"):
        publish.publish(run, tmp_path / "out", one_return, "-", "-")
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_run_or_stage_is_not_shipped(finished: Path, tmp_path: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    run = copied(finished, tmp_path / "seed", {**results, "seed": 4})
    with pytest.raises(ValueError, match=r"ann.policy\.safetensors must be of \(\('cartpole', 4, 'ann'\), None\)"):
        publish.publish(run, tmp_path / "out", one_return, "-", "-")
    run = copied(finished, tmp_path / "stage")
    shutil.copy(run / "T2" / "policy.safetensors", run / "T1" / "policy.safetensors")
    with pytest.raises(ValueError, match=r"T1.policy\.safetensors must be of .*'T1'\), 1\).*got .*'T2'\), 2\)"):
        publish.publish(run, tmp_path / "out", one_return, "-", "-")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_publication_takes_the_place_of_an_earlier_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, exchanges: bool
) -> None:
    if not exchanges:  # a file system, or a system, without it
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    out = tmp_path / "out"
    publish.publish(finished, out, one_return, "first", "-")
    assert sorted(contents(out)) == ["T1.safetensors", "T2.safetensors", "ann.safetensors", "results.json"]
    results = json.loads((finished / "results.json").read_text())
    fewer = {**results, "stages": [results["stages"][0], results["stages"][2]]}
    run = copied(finished, tmp_path / "run", fewer, {"recipe": {"schedule": [1]}})
    publish.publish(run, out, one_return, "second", "-")
    assert sorted(contents(out)) == ["T1.safetensors", "ann.safetensors", "results.json"]
    assert json.loads((out / "results.json").read_text())["command"] == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize("earlier", [True, False])
def test_a_failure_at_the_last_stage_leaves_what_was_there(finished: Path, tmp_path: Path, *, earlier: bool) -> None:
    out = tmp_path / "out"
    if earlier:
        publish.publish(finished, out, one_return, "first", "-")
    before = contents(tmp_path)

    def play(policy: LoadedPolicy) -> Evaluation:
        if policy.timesteps == 1:
            raise RuntimeError("the emulator has crashed")
        return one_return(policy)

    with pytest.raises(RuntimeError, match="crashed"):
        publish.publish(finished, out, play, "second", "-")
    assert contents(tmp_path) == before
    assert out.exists() == earlier
    assert not [path for path in tmp_path.iterdir() if path != out]


# In a process of its own, whose children are killed at the first, second, third ... change of a file below PARENT.
KILLED = """
import os, signal, sys
from pathlib import Path
from snn_rl.rl.evaluation import Evaluation
from snn_rl.share.publish import publish

run, parent = Path(sys.argv[1]), Path(sys.argv[2])
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "ctypes.dlsym", "shutil.rmtree", "os.chmod", "open"}

def publish_as(command):
    publish(run, parent / "out", lambda policy: Evaluation([1.0], [1], None), command, "-")

def contents():
    folder = parent / "out"
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else None

publish_as("first")
states = {"first": contents()}
publish_as("second")
states["second"] = contents()
seen, kills = [], 0
publish_as("first")
while True:
    child = os.fork()
    if child == 0:
        left = [kills]
        def kill(event, args):
            if event in CHANGES and (event == "ctypes.dlsym" or str(parent) in str(args[0])):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(kill)
        publish_as("second")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found = contents()
    (name,) = [name for name, state in states.items() if state == found] or ["broken"]
    seen.append(name)
    if status == 0:
        break
    if name != "first":
        publish_as("first")
    kills += 1
publish_as("first")
print(*seen, sorted(path.name for path in parent.iterdir()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a kill may come between two renamings")
def test_a_kill_leaves_the_old_publication_or_the_new_one(finished: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(finished), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    *seen, beside = done.stdout.split()
    assert beside == "['out']"
    changes = seen.index("second")
    assert changes > 20
    assert seen == ["first"] * changes + ["second"] * (len(seen) - changes)


def test_what_a_kill_left_between_two_renamings_is_put_back(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish.publish(finished, out, one_return, "first", "-")
    before = contents(out)
    out.rename(tmp_path / f"{files.TEMPORARY}before-out")

    def play(policy: LoadedPolicy) -> Evaluation:
        raise RuntimeError("the emulator has crashed")

    with pytest.raises(RuntimeError, match="crashed"):
        publish.publish(finished, out, play, "second", "-")
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("foreign", ["notes.txt", "seed-0/results.json", "best.safetensors", "T1.safetensors/x"])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_folder_with_anything_else_in_it_is_left_alone(
    finished: Path, tmp_path: Path, foreign: str, *, earlier: bool
) -> None:
    out = tmp_path / "out"
    if earlier:
        publish.publish(finished, out, one_return, "first", "-")
    if foreign.startswith("T1") and earlier:
        (out / "T1.safetensors").unlink()
    (out / foreign).parent.mkdir(parents=True, exist_ok=True)
    (out / foreign).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"out holds what is not of an earlier publication: {foreign.split('/')[0]}; "):
        publish.publish(finished, out, one_return, "second", "-")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file; give a folder"):
        publish.publish(finished, tmp_path / "file", one_return, "second", "-")
    (tmp_path / "file").unlink()
    assert contents(tmp_path) == before


def test_the_table_names_a_damaged_publication_and_passes_over_a_half_one(finished: Path, tmp_path: Path) -> None:
    publish.publish(finished, tmp_path / "agent", one_return, "-", "-")
    shutil.copytree(tmp_path / "agent", tmp_path / f"{files.TEMPORARY}agent")
    listed = publish.table_of_contents(tmp_path).read_text()
    assert listed.count("## cartpole") == 1
    assert "[T1](agent/T1.safetensors)" in listed
    results = json.loads((tmp_path / "agent" / "results.json").read_text())
    for key in ("precision", "sha256", "eval", "wall_seconds", "spike_rate", "energy", "stage"):
        stages = [{k: v for k, v in stage.items() if k != key} for stage in results["stages"]]
        (tmp_path / "agent" / "results.json").write_text(json.dumps({**results, "stages": stages}))
        with pytest.raises(ValueError, match=rf"agent.results\.json: stages\[0\]\.{key} is missing"):
            publish.table_of_contents(tmp_path)
    assert (tmp_path / "README.md").read_text() == listed
