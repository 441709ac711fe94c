"""The command lines: the real mains on seconds of budget, and bad input as one line and exit status 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import evaluate, report, train_cartpole, train_pong, watch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pong_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pong-lite` through two spiking stages on the real game."""
    directory = tmp_path_factory.mktemp("pong")
    budget = ["--ann.env-steps", "512", "--snn.env-steps", "64", "--snn.parent-steps", "128", "--eval-episodes", "1"]
    # a minute of play at most: a game that is played to its end takes longer than the rest of this test together
    short = ["--env-kwargs.max-episode-frames", "600"]
    arguments = ["--smoke", "--schedule", "2", "1", "--run-dir", str(directory), "--device", "cpu", *budget, *short]
    assert train_pong.main([*arguments, "--validation-episodes", "1"]) == 0
    return directory


def test_train_pong_goes_through_all_stages(pong_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads((pong_run / "results.json").read_text())
    assert results["recipe"] == "pong-lite"
    assert [stage["stage"] for stage in results["stages"]] == ["ann", "T2", "T1"]
    assert len(results["stages"][1]["spike_rate"]["layers"]) == 4


def test_evaluate_reports_and_writes_json(pong_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(pong_run / "T1" / "policy.safetensors")
    out = tmp_path / "out.json"
    arguments = [file, "--episodes", "2", "--seed", "5", "--sticky", "0.25", "--json", str(out), "--device", "cpu"]
    assert evaluate.main(arguments) == 0
    result = json.loads(out.read_text())
    assert len(result["eval"]["returns"]) == 2
    assert "sticky 0.25" in result["eval"]["protocol"]
    assert "over 2 episodes" in capsys.readouterr().out
    first = result["eval"]["returns"]
    assert evaluate.main(arguments) == 0
    assert json.loads(out.read_text())["eval"]["returns"] == first
    assert evaluate.main([file, "--episodes", "1", "--clear", "--device", "cpu"]) == 0


def test_watch_and_report_take_a_runs_files(pong_run: Path, tmp_path: Path) -> None:
    for stage in ("ann", "T2"):
        file = str(pong_run / stage / "policy.safetensors")
        assert watch.main([file, "--video", str(tmp_path / f"{stage}.gif"), "--steps", "3"]) == 0
    assert report.main([str(pong_run)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "chess"], "unknown recipe 'chess'; there are breakout-lite, cartpole"),
        (["--seed", "-1"], "seed must lie in [0, 100000), got -1"),
        (["--schedule", "1", "2"], "schedule must be decreasing timesteps"),
        (["--snn.percentile", "101"], "snn.percentile must lie in (0, 100], got 101.0"),
        (["--snn.leak", "1.5"], "snn.leak must lie in [0, 1], got 1.5"),
        (["--device", "tpu9"], "unknown device 'tpu9'"),
        (["--ann", "nowhere.zip"], "no file at nowhere.zip"),
        (["--name", "other"], "choose another with --recipe"),
        (["--env-kwargs", "velocity", "False"], "unexpected keyword argument 'velocity'"),
        (["--run-dir", "/dev/null/run"], "Not a directory"),
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
    assert train_cartpole.main(["--smoke", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_an_unknown_game_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--smoke", "--env-kwargs.image-size", "0", "--run-dir", str(tmp_path)]
    assert train_pong.main(arguments) == 2
    assert "image_size must be >= 1, got 0" in capsys.readouterr().err


def test_unknown_flags_are_refused_before_anything_runs() -> None:
    command = [sys.executable, "scripts/train_cartpole.py", "--smoke", "--snn.no-such-field", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "no-such-field" in result.stderr + result.stdout


def test_bad_policy_files_are_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "truncated").write_bytes(b"\x10\x00")
    for name, message in (("none", "no policy file at"), ("truncated", "not a readable safetensors file")):
        assert evaluate.main([str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert evaluate.main([str(tmp_path / "none"), "--episodes", "0"]) == 2
    assert "episodes must be >= 1, got 0" in capsys.readouterr().err


def test_help_lists_the_recipes_fields() -> None:
    command = [sys.executable, "scripts/train_pong.py", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0
    for word in ("--recipe", "--smoke", "--ann FILE", "--schedule", "--snn.learning-rate", "--total-snn-steps"):
        assert word in result.stdout
