"""The environment that a command plays in: of the agent's training, or one that --env-id names."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor

from agents import environment_of
from scripts import evaluate
from snn_rl import SpikingDQN, load_policy, save_policy
from snn_rl.cli.environments import named_environment, parsed_kwargs


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
    arguments = [str(cartpole_file), "--env-id", name, "--episodes", "5", "--seed", "7", "--json", str(out)]
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
    named_environment("own_environment:make", policy, 2, 5, size=4).close()
    assert capsys.readouterr().out == "made with {'size': 4, 'walls': True}\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CartPol-v1", "gymnasium has no environment 'CartPol-v1'; similar ids: CartPole-v1, "),
        ("CartPole-v9", "gymnasium has no environment 'CartPole-v9'; similar ids: CartPole-v1, "),
        ("Nowhere/Maze-v0", "gymnasium has no environment 'Nowhere/Maze-v0'; if a package of yours registers it, "),
        ("", "gymnasium has no environment ''"),
        ("no_such_module:make", "no module 'no_such_module' in "),
        ("no_such_module:Maze-v0", "no module 'no_such_module' in .*, which should register Maze-v0"),
        ("own_environment.py:make", "no module 'own_environment.py' in "),
        ("own_environment:mak", ".*own_environment.py has no function 'mak'"),
        ("own_environment:number", ".*own_environment.py has no function 'number'"),
        ("own_environment:Nothing-v0", "gymnasium has no environment 'Nothing-v0'\n"),
        ("incomplete_environment:make", "the module incomplete_environment cannot be imported: ModuleNotFoundError: "),
        ("own_environment:failing", ".*own_environment:failing cannot be built.*: RuntimeError: no such maze"),
        ("own_environment.make", ".*, write MODULE:ID, or MODULE:FUNCTION for a function of yours"),
        ("own_environment:unmonitored", ".*must be monitored: wrap them in VecMonitor"),
        ("own_environment:single", "make_env of own_environment:single must return a VecEnv of 2 environments, got"),
        ("Acrobot-v1", r"the agent's observation_space is Box\(\[-4.8.*, that of Acrobot-v1 is Box\(\[ ?-1"),
        ("MountainCar-v0", ".*build the environment with the wrappers of the training, in a function"),
        ("ALE/Pong-v5", r".*that of ALE/Pong-v5 is Box\(0, 255, \(.*, uint8\); build"),
    ],
)
def test_an_environment_that_cannot_be_is_one_line_and_status_2(
    name: str, message: str, cartpole_file: Path, own_module: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(cartpole_file), "--env-id", name, "--episodes", "2", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert re.match(f"error: {message}", error)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sutton=True"], "CartPole-v1 does not take the argument 'sutton'; it takes sutton_barto_reward\n"),
        (["sutton_barto_reward=maybe", "x_=1"], "CartPole-v1 does not take the argument 'x_'; it takes .*\n"),
        (["True"], "--env-kwargs takes NAME=VALUE, such as continuous=True, got 'True'\n"),
        (["2x=1"], "--env-kwargs takes NAME=VALUE, such as continuous=True, got '2x=1'\n"),
        (["seed=3"], "env_kwargs must not hold num_envs or seed, .*\n"),
    ],
)
def test_arguments_that_cannot_be(
    arguments: list[str], message: str, cartpole_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(cartpole_file), "--env-id", "CartPole-v1", "--device", "cpu", "--env-kwargs", *arguments]
    assert evaluate.main(command) == 2
    assert re.fullmatch(f"error: {message}", capsys.readouterr().err)


def test_arguments_reach_the_environment(cartpole_file: Path, tmp_path: Path) -> None:
    """With Sutton's and Barto's reward, an episode of CartPole that fails returns -1."""
    out = tmp_path / "out.json"
    command = [str(cartpole_file), "--episodes", "3", "--json", str(out), "--device", "cpu"]
    for env_id in ([], ["--env-id", "CartPole-v1"]):
        assert evaluate.main([*command, *env_id, "--env-kwargs", "sutton_barto_reward=True"]) == 0
        played = json.loads(out.read_text())["eval"]
        assert played["returns"] == [-1.0] * 3
        assert played["protocol"].endswith(", in CartPole-v1, with sutton_barto_reward=True")


def test_arguments_are_literals_or_words() -> None:
    assert parsed_kwargs(["a=True", "b=-1.5", "c=(1, 'x')", "d=mp4", "e=", "f=a=b", "g=None", "h='1'"]) == {
        "a": True,
        "b": -1.5,
        "c": (1, "x"),
        "d": "mp4",
        "e": "",
        "f": "a=b",
        "g": None,
        "h": "1",
    }


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
    # no such recipe: the environment of this id
    named = environment({"recipe": "mine", "env_id": "CartPole-v1", "env_kwargs": {"sutton_barto_reward": True}})
    theirs.seed(5)
    np.testing.assert_array_equal(named.reset(), theirs.reset())  # type: ignore[arg-type]
    assert named.get_attr("_sutton_barto_reward") == [True, True]
    for provenance, message in (
        ({"recipe": "mine"}, r"recipe 'mine', and there are breakout-lite, [\w, -]*$"),
        ({"recipe": "mine", "env_id": "Mine-v0"}, "recipe 'mine', and .*; gymnasium has no environment 'Mine-v0'"),
        ({"recipe": "mine", "env_id": "antigravity:Mine-v0"}, "its environment is antigravity:Mine-v0$"),
        (
            {"recipe": "mine", "env_id": "CartPole-v1", "env_kwargs": {"walls": 3}},
            "recipe 'mine', and .*; CartPole-v1 does not take the argument 'walls'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            environment(provenance)
    assert "antigravity" not in sys.modules  # a file imports nothing
    with pytest.raises(ValueError, match=r"env_kwargs must be an object, got \[1\]"):
        environment({"recipe": "cartpole", "env_kwargs": [1]})
