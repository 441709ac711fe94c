"""The command lines: the real mains on seconds of budget, and bad input as one line and exit status 2."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agents import RECIPES
from scripts import evaluate, report, train_cartpole, train_pong, watch
from snn_rl import Recipe
from snn_rl.cli.overrides import overridden
from snn_rl.cli.status import exit_status
from snn_rl.vision import VISION_RECIPES

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))
# every script as it is, and the trainings with every recipe, whose fields are options
HELPS = [(name, ()) for name in SCRIPTS]
HELPS += [("train_pong", ("--recipe", name)) for name in RECIPES]
HELPS += [("train_vision", (name,)) for name in VISION_RECIPES]


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


# --- help -----------------------------------------------------------------------------------------------------------


def status_of(script: str, arguments: list[str]) -> int:
    """The exit status of a script that runs in this process."""
    try:
        return int(importlib.import_module(f"scripts.{script}").main(arguments))
    except SystemExit as end:
        return int(end.code or 0)


def entries(text: str) -> Iterator[tuple[str, str]]:
    """("--seed SEED", "seed of the run (default: 0)") of each option and argument, in argparse's and tyro's layout."""
    found: list[list[str]] = []
    positional = False
    for line in text.replace("│", " ").splitlines():
        positional = line == "positional arguments:" or (positional and line != "")
        if re.match(r"  \S" if positional else r"  --?[a-z]", line):
            found.append([line])
        elif line.startswith("      ") and found and found[-1]:
            found[-1].append(line)
        else:
            found.append([])  # a heading, a paragraph or the usage
    for lines in filter(None, found):
        invocation, *words = re.split(r"\s{2,}", "  ".join(lines).strip())
        yield invocation, " ".join(words)


@pytest.mark.parametrize(("script", "arguments"), HELPS, ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_help_says_what_each_option_is_for(
    script: str, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert status_of(script, [*arguments, "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    options = dict(entries(text))
    assert options
    options.pop("-h, --help", None)
    for invocation, words in options.items():
        if not invocation.startswith("-"):
            assert " " in words, f"{script}: {invocation} is not explained"
            continue
        said = re.fullmatch(r"(.+?) (?:\(default: (.+)\)|\(required\))", words)
        assert said, f"{script}: {invocation} has no help or no default, only {words!r}"
        assert " " in said[1], f"{script}: {invocation} is not explained: {words!r}"
        assert "{None}" in invocation or said[2] != "None", f"{script}: {invocation} has no default in words"
    for hidden in ("--name", "--make-env", "functools", " at 0x"):
        assert hidden not in text
    assert ("--env-id" in text) == (script in ("evaluate", "watch"))  # elsewhere it says which recipe it is


def test_help_of_a_recipe_lists_all_of_its_fields(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert status_of("train_cartpole", ["--recipe", "pong", "--help"]) == 0
    options = {invocation.split()[0].rstrip(",") for invocation, _ in entries(capsys.readouterr().out)}

    def flags(fields: dict[str, Any], prefix: str = "--") -> Iterator[str]:
        for name, value in fields.items():
            flag = prefix + name.replace("_", "-")
            if isinstance(value, dict) and value:
                yield from flags(value, f"{flag}.")
            else:
                yield flag

    assert options >= set(flags(RECIPES["pong"].as_dict())) - {"--name", "--env-id"}


@pytest.mark.parametrize("flag", ["--name", "--env-id=x", "--env_id"])
def test_what_says_which_recipe_it_is_cannot_be_set(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_cartpole.main(["--smoke", flag, "x"]) == 2
    assert capsys.readouterr().err == (
        "error: name and env_id say which recipe this is; choose another with --recipe\n"
    )


def test_arguments_of_an_environment_are_explained_by_its_function(capsys: pytest.CaptureFixture[str]) -> None:
    def make_maze(num_envs: int, *, seed: int, walls: int = 3, doors: bool = True) -> None:
        """A maze.

        Args:
            num_envs: number of copies.
            walls: how many walls
                there are.

        Raises:
            doors: none of an argument.
        """

    recipe = Recipe("maze", "Maze-v0", make_maze, env_kwargs={"walls": 3, "doors": True}, num_envs=4)
    with pytest.raises(SystemExit):
        overridden(recipe, ["--help"], "train", fixed=())
    options = dict(entries(capsys.readouterr().out))
    assert options["--env-kwargs.walls INT"] == "how many walls there are (default: 3)"
    assert options["--env-kwargs.doors, --env-kwargs.no-doors"] == "the environment's doors (default: True)"
    changed = overridden(recipe, ["--env-kwargs.walls", "5", "--network.net-arch", "8"], "train", fixed=())
    assert (changed.env_kwargs, changed.network.net_arch) == ({"walls": 5, "doors": True}, (8,))
    assert type(changed) is Recipe
    assert type(changed.network) is type(recipe.network)


# --- streams that close ---------------------------------------------------------------------------------------------


@contextmanager
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stdout is a pipe whose reader has left. At the end it is flushed, as Python does when it exits."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        yield


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_that_nobody_reads_to_its_end_says_nothing(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ["vgg6-cifar10"] if script == "train_vision" else []
    with unread(monkeypatch):
        assert status_of(script, [*recipe, "--help"]) == 141
    assert capsys.readouterr().err == ""


def test_results_that_nobody_reads(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with unread(monkeypatch):
        assert exit_status(lambda: print("x" * 100_000)) == 141
        assert exit_status(lambda: print("x")) == 0  # what still comes goes nowhere
    assert capsys.readouterr().err == ""


def test_another_pipe_that_breaks_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise BrokenPipeError("an environment's process has ended")

    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert exit_status(fail) == 2
    assert capsys.readouterr().err == "error: an environment's process has ended\n"


def test_a_process_whose_streams_close() -> None:
    python = f"set -o pipefail; {sys.executable} scripts"
    commands = f"{python}/train_pong.py --help | true; echo $?; {python}/evaluate.py nowhere 2>&-; echo $?"
    result = subprocess.run(["bash", "-c", commands], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout.split(), result.stderr) == (["141", "2"], "")


@pytest.mark.parametrize("script", ["train_pong", "report"])
def test_help_without_streams(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, None)
        assert status_of(script, ["--help"]) == 0
        for stream in (sys.stdout, sys.stderr):
            stream.close()
