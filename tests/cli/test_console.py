"""``snn-rl`` where the wheel alone is installed: without agents, envs and scripts, from an empty folder."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import snn_rl.cli
from snn_rl import SpikingDQN, save_policy
from snn_rl.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
# As the console script does: the library is installed, and the current folder is not on the path.
PROGRAM = """
import sys
from importlib.util import find_spec
from pathlib import Path
sys.path[:] = [{installed!r}] + [path for path in sys.path if path and not (Path(path) / "agents").exists()]
assert not any(map(find_spec, ("agents", "envs", "scripts")))
{before}
from snn_rl.cli import main
assert Path(sys.modules["snn_rl"].__file__).is_relative_to({installed!r})
sys.exit(main())
"""
RECIPE = """
import dataclasses
import gymnasium as gym
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor
from snn_rl.runs.recipe import NetworkConfig, Recipe
from snn_rl.runs.registered import registered

TINY = Recipe(
    "tiny", "CartPole-v1", registered("CartPole-v1"), network=NetworkConfig(net_arch=(16,)), schedule=(2, 1),
    cpu_threads=1,
)

class Positions(gym.ObservationWrapper):
    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(-5, 5, (2,))

    def observation(self, observation):
        return observation[::2]

def make_positions(num_envs, *, seed, render_mode=None):
    def make():
        return Positions(gym.make("CartPole-v1", render_mode=render_mode))
    env = VecMonitor(DummyVecEnv([make] * num_envs))
    env.seed(seed)
    return env

POSITIONS = dataclasses.replace(TINY, name="positions", env_id="CartPole-v1", make_env=make_positions)
"""


class Console:
    """Runs ``snn-rl`` in processes of their own, in an empty folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "empty"
        self.folder.mkdir()
        (folder / "installed").mkdir()
        (folder / "installed" / "snn_rl").symlink_to(ROOT / "snn_rl")
        self.installed = str(folder / "installed")

    def command(self, *words: str, before: str = "") -> list[str]:
        return [sys.executable, "-c", PROGRAM.format(installed=self.installed, before=before), *words]

    def __call__(self, *words: str, before: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words, before=before), cwd=self.folder, capture_output=True, text=True, env=quiet()
        )


def status_of(words: list[str]) -> int:
    """Of ``snn-rl`` in this process."""
    try:
        return main(words)
    except SystemExit as end:
        return int(end.code or 0)


def quiet() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Console:
    return Console(tmp_path_factory.mktemp("console"))


@pytest.fixture(scope="module")
def run(console: Console) -> Path:
    """A run of a recipe in a module of the current folder."""
    (console.folder / "my_recipes.py").write_text(RECIPE)
    done = console("train", "my_recipes:TINY", "--smoke", "--device", "cpu", "--snn.leak", "0.8")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == ["ann", "T2", "T1"]
    folder = console.folder / "runs" / "tiny-smoke" / "seed-0"
    assert json.loads((folder / "run.json").read_text())["recipe"]["snn"]["leak"] == 0.8
    return folder


def test_the_wheel_installs_it() -> None:
    scripts = (ROOT / "pyproject.toml").read_text().split("[project.scripts]\n")[1].split("\n\n")[0]
    name, value = re.fullmatch(r'([\w-]+) = "([\w.:]+)"', scripts).groups()  # type: ignore[union-attr]
    assert name == "snn-rl"
    assert EntryPoint(name, value, "console_scripts").load() is main


def test_a_trained_agent_is_evaluated_watched_exported_and_reported(console: Console, run: Path) -> None:
    file = str(run / "T1" / "policy.safetensors")
    played = console("evaluate", file, "--episodes", "2", "--json", "out.json")
    assert played.returncode == 0, played.stderr
    assert "over 2 episodes in CartPole-v1\n" in played.stdout  # no such recipe here: by its id
    mean = json.loads((console.folder / "out.json").read_text())["eval"]["mean"]
    stage = json.loads((run / "results.json").read_text())["stages"][-1]
    assert (stage["stage"], stage["eval"]["mean"]) == ("T1", mean)  # the same seeds
    for words, written in (
        (("watch", file, "--video", "play.gif", "--steps", "3"), "play.gif"),
        (("export", file, "agent.nir"), "agent.nir"),
        (("report", str(run)), "runs/tiny-smoke/seed-0/report.html"),
        (("hub", file, "repository", "--episodes", "1", "--video-steps", "0"), "repository/README.md"),
    ):
        done = console(*words)
        assert done.returncode == 0, done.stderr
        assert (console.folder / written).is_file()


def test_the_card_of_an_agent_without_a_recipe_builds_its_environment(console: Console, run: Path) -> None:
    done = console("hub", str(run / "T1" / "policy.safetensors"), "card", "--episodes", "1", "--video-steps", "0")
    assert done.returncode == 0, done.stderr
    snippet = (console.folder / "card" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = (
        f"import os\nos.chdir('card')\nexec({snippet.replace('n_eval_episodes=5', 'n_eval_episodes=1')!r})\nsys.exit()"
    )
    played = console(before=code)
    assert played.returncode == 0, played.stderr
    assert played.stdout.startswith("(")  # mean and standard deviation


def test_an_environment_that_no_id_builds_is_named(console: Console, run: Path) -> None:
    """The recipe's environment has an id, but wrappers around it: the id alone is refused, and the function taken."""
    names: dict[str, Any] = {}
    exec(RECIPE, names)
    agent = SpikingDQN("MlpPolicy", names["make_positions"](1, seed=0), buffer_size=100, device="cpu")
    file = "positions.safetensors"
    save_policy(agent, console.folder / file, {"recipe": "positions", "env_id": "CartPole-v1", "env_kwargs": {}})
    refused = console("evaluate", file, "--episodes", "1")
    assert refused.returncode == 2
    assert "that of CartPole-v1 is Box" in refused.stderr
    assert "give --env-id MODULE:FUNCTION" in refused.stderr
    assert refused.stderr.count("\n") == 1
    played = console("evaluate", file, "--episodes", "1", "--env-id", "my_recipes:make_positions")
    assert played.returncode == 0, played.stderr
    assert "in my_recipes:make_positions\n" in played.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fly"], f"unknown command 'fly'; there are {', '.join(COMMANDS)}"),
        (
            ["train"],
            "say which recipe: MODULE:RECIPE, or a name in RECIPES of the package agents in the current folder",
        ),
        (["train", "pong"], "unknown recipe 'pong': no agents with RECIPES in "),
        (["train", "my_recipe:TINY"], "no module 'my_recipe' in "),
        (["sweep", "pong"], "unknown recipe 'pong': no agents with RECIPES in "),
        (["vision", "lenet"], "unknown recipe 'lenet'; there are vgg6-cifar10, "),
        (["evaluate"], "the following arguments are required: FILE; snn-rl evaluate --help lists the options"),
        (["evaluate", "none"], "no policy file at none"),
        (["evaluate", "none", "--episode", "3"], "unrecognized arguments: --episode 3; snn-rl evaluate --help lists"),
        (["report", "none"], "none"),
        (["export", "none", "a.pt"], "the file to write must end in .nir or .onnx, got 'a.pt'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert status_of(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--snn.no-such-field", "1"], "Unrecognized options: --snn.no-such-field"),
        (["--ann.env-steps", "many"], "invalid literal for int() with base 10: 'many'"),
        (["--snn.leak", "1.5"], "snn.leak must lie in [0, 1], got 1.5"),
        (["--env-id", "x"], "name and env_id say which recipe this is"),
    ],
)
def test_a_field_that_cannot_be_is_one_line(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny_recipes.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["train", "tiny_recipes:TINY", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_missing_packages_are_named(console: Console) -> None:
    """In one process, from whose start on they are missing."""
    cases = [
        ("tyro", ["train", "my_recipes:TINY"], "scripts"),
        ("imageio", ["watch", "none"], "scripts"),
        ("matplotlib", ["report", "none"], "scripts"),
        ("ray", ["sweep", "my_recipes:TINY"], "sweep"),
        ("tyro", ["vision", "vgg6-cifar10"], "scripts"),
    ]
    missing = f"sys.modules.update(dict.fromkeys({[package for package, _, _ in cases]}))"
    commands = [words for _, words, _ in cases]
    each = f"from snn_rl.cli import main\nsys.exit([main(words) for words in {commands}] != [2] * 5)"
    done = console(before=f"{missing}\n{each}")
    assert done.returncode == 0, done.stderr
    # of a sweep's packages, those two are missing
    named = ["tyro", "imageio", "matplotlib", "ray and tyro", "tyro"]
    assert done.stderr.splitlines() == [
        f"error: this command needs {package}: pip install 'snn_rl[{extra}]'"
        for package, (_, _, extra) in zip(named, cases, strict=True)
    ]


def test_a_help_needs_no_more_than_the_command_line(console: Console) -> None:
    done = console("--help", before="for name in ('torch', 'numpy', 'gymnasium', 'tyro'): sys.modules[name] = None")
    assert (done.returncode, done.stderr) == (0, "")
    assert console().stdout == done.stdout
    listed = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  ")]
    assert dict(listed) == COMMANDS


@pytest.mark.parametrize("words", [[], *([command] for command in COMMANDS)], ids=" ".join)
def test_a_help_fits_a_screen(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert status_of([*words, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 5 < len(lines) <= 24
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith(" ".join(("usage: snn-rl", *words)))


@pytest.mark.parametrize("command", ["train", "vision"])
def test_the_help_of_a_training_says_how_to_list_the_recipes_fields(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of([command, "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert f"snn-rl {command} RECIPE --help lists them" in words


def test_every_command_is_a_module_with_a_main() -> None:
    for command in COMMANDS:
        assert callable(importlib.import_module(f"snn_rl.cli.{command}").main)
    folder = Path(snn_rl.cli.__file__).parent
    with_main = {path.stem for path in folder.glob("*.py") if "\ndef main(" in path.read_text()} - {"__init__"}
    assert with_main == set(COMMANDS)


def test_python_m(console: Console) -> None:
    command = [sys.executable, "-m", "snn_rl", "--help"]
    done = subprocess.run(command, cwd=console.installed, capture_output=True, text=True, env=quiet())
    assert done.stdout == console("--help").stdout


def test_ctrl_c_while_it_trains(console: Console, run: Path) -> None:
    flags = ["--smoke", "--device", "cpu", "--ann.env-steps", "1000000", "--run-dir", "stopped"]
    with subprocess.Popen(
        console.command("train", "my_recipes:TINY", *flags),
        cwd=console.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=quiet(),
    ) as process:
        while process.poll() is None and not (console.folder / "stopped" / "ann" / "checkpoint.zip").is_file():
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1].startswith("interrupted; run the same command again to continue")


def test_a_reader_that_leaves(console: Console) -> None:
    command = console.command("evaluate", "--help")
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" | true; echo $?', "-", *command],
        cwd=console.folder,
        capture_output=True,
        text=True,
        env=quiet(),
    )
    assert (done.stdout.split(), done.stderr) == (["141"], "")


def test_agents_of_the_current_folder_are_found(tmp_path: Path) -> None:
    """A user's folder is laid out as this repository: the recipe and its environment come from there."""
    console = Console(tmp_path)
    (console.folder / "agents").mkdir()
    (console.folder / "agents" / "__init__.py").write_text(RECIPE + "\nRECIPES = {'positions': POSITIONS}\n")
    agent = SpikingDQN("MlpPolicy", "CartPole-v1", buffer_size=100, device="cpu")
    save_policy(agent, console.folder / "a", {"recipe": "positions", "env_id": "CartPole-v1", "env_kwargs": {}})
    refused = console("evaluate", "a", "--episodes", "1")
    assert refused.returncode == 2
    assert "that of the recipe positions is Box" in refused.stderr  # not of CartPole-v1, whose observations would fit
    done = console("train", "positions", "--help")
    assert done.returncode == 0, done.stderr
    assert "Every field of the recipe positions is an option too" in done.stdout
    assert "--snn.leak" in done.stdout
