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

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor

from agents import RECIPES, environment_of
from scripts import evaluate, report, train_cartpole, train_pong, watch
from snn_rl import Recipe, SpikingDQN, load_policy, save_policy
from snn_rl.cli.common import exit_status, named_environment, overridden
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
    for hidden in ("--name", "--env-id", "--make-env", "functools", " at 0x"):
        assert hidden not in text


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


# --- environments ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cartpole_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained agent, whose returns differ from seed to seed, of a recipe that this repository does not have."""
    path = tmp_path_factory.mktemp("own") / "policy.safetensors"
    kwargs = {"net_arch": [16], "timesteps": 2}
    agent = SpikingDQN("MlpPolicy", "CartPole-v1", policy_kwargs=kwargs, buffer_size=100, seed=0, device="cpu")
    save_policy(agent, path, {"recipe": "mine", "env_id": "CartPole-v1", "env_kwargs": {}, "seed": 0})
    return path


MODULE = """
import gymnasium as gym
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

def make(num_envs, *, seed, render_mode=None, **kwargs):
    print("made with", kwargs)
    env = VecMonitor(DummyVecEnv([lambda: gym.make("CartPole-v1", render_mode=render_mode)] * num_envs))
    env.seed(seed)
    return env

def unmonitored(num_envs, *, seed, render_mode=None):
    return make(num_envs, seed=seed).venv

def single(num_envs, *, seed, render_mode=None):
    return gym.make("CartPole-v1")

def failing(num_envs, *, seed, render_mode=None):
    raise RuntimeError("no such\\nmaze")

gym.register("Registered-v0", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=500)
number = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The current folder has modules of a user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_environment.py").write_text(MODULE)
    (tmp_path / "incomplete_environment.py").write_text("import no_such_package")
    yield
    gym.registry.pop("Registered-v0", None)
    sys.modules.pop("own_environment", None)


def returns(path: Path, seeds: range) -> list[float]:
    """Of one episode per seed, stepped in gymnasium."""
    policy, env, out = load_policy(path), gym.make("CartPole-v1"), []
    for seed in seeds:
        obs, state, start, total, over = env.reset(seed=seed)[0], None, True, 0.0, False
        while not over:
            action, state = policy.predict(obs[None], state, np.array([start]))
            obs, reward, terminated, truncated, _ = env.step(int(action[0]))
            start, over, total = False, terminated or truncated, total + float(reward)
        out.append(total)
    env.close()
    return out


@pytest.mark.parametrize("name", ["CartPole-v1", "own_environment:make", "own_environment:Registered-v0"])
def test_evaluate_in_an_environment_of_ones_own(
    name: str, cartpole_file: Path, own_module: None, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    arguments = [str(cartpole_file), "--env", name, "--episodes", "5", "--seed", "7", "--json", str(out)]
    assert evaluate.main([*arguments, "--device", "cpu"]) == 0
    played = json.loads(out.read_text())["eval"]
    wanted = returns(cartpole_file, range(7, 12))
    assert len(set(wanted)) > 1
    assert sorted(played["returns"]) == sorted(wanted)
    assert played["protocol"].endswith(f", in {name}")


def test_a_function_gets_the_arguments_that_the_file_names(
    own_module: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = SpikingDQN("MlpPolicy", "CartPole-v1", buffer_size=100, device="cpu")
    save_policy(agent, tmp_path / "agent", {"recipe": "mine", "env_kwargs": {"size": 3, "walls": True}})
    policy = load_policy(tmp_path / "agent")
    named_environment("own_environment:make", policy, 2, seed=5, size=4).close()
    assert capsys.readouterr().out == "made with {'size': 4, 'walls': True}\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CartPol-v1", "CartPol-v1 cannot be built.*: NameNotFound: Environment `CartPol` doesn't exist"),
        ("Nowhere/Maze-v0", "Nowhere/Maze-v0 cannot be built.*: NamespaceNotFound: Namespace Nowhere not found"),
        ("", "cannot be built.*: Error: Malformed environment ID"),
        ("no_such_module:make", "no module 'no_such_module' in "),
        ("own_environment.py:make", "no module 'own_environment.py' in "),
        ("own_environment:mak", "own_environment.py has no function 'mak'"),
        ("own_environment:number", "own_environment.py has no function 'number'"),
        ("own_environment:Nothing-v0", "cannot be built.*: NameNotFound: Environment `Nothing` doesn't exist"),
        ("incomplete_environment:make", "cannot be built: ModuleNotFoundError: No module named 'no_such_package'"),
        ("own_environment:failing", "own_environment:failing cannot be built.*: RuntimeError: no such maze"),
        ("own_environment.make", "doesn't exist.*; for a function of yours, write MODULE:FUNCTION"),
        ("own_environment:unmonitored", "must be monitored: wrap them in VecMonitor"),
        ("own_environment:single", "make_env of own_environment:single must return a VecEnv of 2 environments, got"),
        ("Acrobot-v1", r"the agent's observation_space is Box\(\[-4.8.*, that of Acrobot-v1 is Box\(\[ ?-1"),
        ("MountainCar-v0", "build the environment with the wrappers of the training, in a function"),
        ("ALE/Pong-v5", r"that of ALE/Pong-v5 is Box\(0, 255, \(.*, uint8\); build"),
    ],
)
def test_an_environment_that_cannot_be_is_one_line_and_status_2(
    name: str, message: str, cartpole_file: Path, own_module: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(cartpole_file), "--env", name, "--episodes", "2", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert re.match(f"error: .*{message}", error)
    assert error.count("\n") == 1


def test_an_environment_whose_package_is_missing(
    cartpole_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(*_: Any, **__: Any) -> None:
        raise gym.error.DependencyNotInstalled('Box2D is not installed, run `pip install "gymnasium[box2d]"`')

    monkeypatch.setattr(gym, "make", make)
    assert evaluate.main([str(cartpole_file), "--env", "LunarLander-v3", "--device", "cpu"]) == 2
    assert re.fullmatch(
        "error: .*LunarLander-v3 cannot be built.*: DependencyNotInstalled: Box2D is not installed, run `pip .*\n",
        capsys.readouterr().err,
    )


class Camera(gym.Env):
    """Images as cameras give them, channels last."""

    observation_space = gym.spaces.Box(0, 255, (36, 40, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 1.0, True, False, {}


def test_images_with_channels_last_are_transposed_as_in_training(tmp_path: Path) -> None:
    agent = SpikingDQN("CnnPolicy", Camera(), buffer_size=100, device="cpu")
    save_policy(agent, tmp_path / "agent", {})
    gym.register("Camera-v0", Camera)
    try:
        env = named_environment("Camera-v0", load_policy(tmp_path / "agent"), 2)
    finally:
        del gym.registry["Camera-v0"]
    assert env.reset().shape == (2, 3, 36, 40)
    env.close()


def test_the_environment_of_a_policy(tmp_path: Path) -> None:
    agent = SpikingDQN("MlpPolicy", "CartPole-v1", buffer_size=100, device="cpu")

    def environment(provenance: dict[str, Any], **overrides: Any) -> VecEnv:
        save_policy(agent, tmp_path / "agent", provenance)
        return environment_of(load_policy(tmp_path / "agent"), 2, 5, **overrides)

    ours = environment({"recipe": "cartpole", "env_kwargs": {}})
    theirs = VecMonitor(DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2))
    theirs.seed(5)
    np.testing.assert_array_equal(ours.reset(), theirs.reset())  # type: ignore[arg-type]
    assert environment({"recipe": "cartpole", "env_kwargs": {"velocities": False}}).observation_space.shape == (2,)
    assert environment({"recipe": "cartpole", "env_kwargs": {}}, velocities=False).observation_space.shape == (2,)
    with pytest.raises(ValueError, match=r"recipe 'mine', and there are breakout-lite, .*; add your recipe to RECIPES"):
        environment({"recipe": "mine"})
    with pytest.raises(ValueError, match=r"env_kwargs must be an object, got \[1\]"):
        environment({"recipe": "cartpole", "env_kwargs": [1]})
