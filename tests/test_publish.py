"""Shipping a run: files that are half as large and play the same games, and a table made of what they returned."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import snn_rl.publish as publish
from agents import RECIPES
from scripts.publish import main
from snn_rl.evaluation import Evaluation, evaluate
from snn_rl.pipeline import run
from snn_rl.policy_file import LoadedPolicy, load_policy
from snn_rl.recipe import SEEDS_PER_RUN, TEST_SEEDS

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
        for name, weight in load_policy(path).policy.q_net.state_dict().items():
            torch.testing.assert_close(weight, trained.policy.q_net.state_dict()[name], rtol=2e-3, atol=1e-6)


def first_weight(policy: LoadedPolicy) -> torch.Tensor:
    return next(iter(policy.policy.q_net.state_dict().values()))


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
        with pytest.raises(ValueError, match="has not finished its stages"):
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
    assert "is no run of a recipe here: breakout-lite, cartpole, " in capsys.readouterr().err
    with pytest.raises(ValueError, match="no results at"):
        publish.publish(tmp_path, tmp_path, lambda policy: None, "-", "-")  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(publish, "MAX_BYTES", 1_000)
    assert main([str(finished), "--command", "-", "--into", str(tmp_path)]) == 2
    assert "a file to ship has 1,000 at most" in capsys.readouterr().err
