"""A model repository: its card parses, its figures are those of an independent play, and nothing in it is a pickle."""

from __future__ import annotations

import ast
import functools
import json
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import ModelCard
from stable_baselines3.common.vec_env import VecEnv

from envs.classic import make_cartpole
from scripts.hub import main
from snn_rl import SpikingDQN, load_policy, save_policy
from snn_rl.rl.policy_file import LoadedPolicy
from snn_rl.runs.recipe import SEEDS_PER_RUN, TEST_SEEDS
from snn_rl.share.hub import export

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "agents" / "pretrained" / "cartpole" / "T1.safetensors"
FILES = {"README.md", "config.json", "results.json", "policy.safetensors", "replay.mp4"}


def play(path: Path, seed: int) -> tuple[float, list[int]]:
    """Return and actions of one episode, stepped in gymnasium."""
    policy, env = load_policy(path), gym.make("CartPole-v1")
    obs, state, start, actions, total, over = env.reset(seed=seed)[0], None, True, [], 0.0, False
    while not over:
        action, state = policy.predict(obs[None], state, np.array([start]))
        obs, reward, terminated, truncated, _ = env.step(int(action[0]))
        start, over, total = False, terminated or truncated, total + float(reward)
        actions.append(int(action[0]))
    env.close()
    return total, actions


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "repository"
    assert main([str(SHIPPED), str(folder), "--episodes", "2", "--video-steps", "5"]) == 0
    return folder


def test_a_repository_holds_what_is_documented(repository: Path) -> None:
    assert {path.name for path in repository.iterdir()} == FILES
    assert [path.name for path in repository.parent.iterdir()] == [repository.name]
    for name in FILES:
        assert f"`{name}`" in (ROOT / "docs" / "hub.md").read_text()
        assert not (repository / name).read_bytes().startswith((b"PK", b"\x80"))  # a zip, a pickle
    assert b"ftyp" in (repository / "replay.mp4").read_bytes()[:16]

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    config = json.loads((repository / "config.json").read_text(), parse_constant=refuse)
    assert (config["timesteps"], config["policy"]["net_arch"], config["parameters"]) == (1, [256, 256], 67_590)


def test_the_policy_plays_the_same_actions(repository: Path) -> None:
    assert play(repository / "policy.safetensors", 7) == play(SHIPPED, 7)


def test_the_cards_figures_are_those_of_the_file(tmp_path: Path) -> None:
    kwargs = {"net_arch": [16], "timesteps": 2}  # an untrained agent, whose returns differ from episode to episode
    agent = SpikingDQN(
        "MlpPolicy", make_cartpole(1, seed=0), policy_kwargs=kwargs, buffer_size=100, seed=0, device="cpu"
    )
    file, folder = tmp_path / "a.safetensors", tmp_path / "out"
    save_policy(agent, file, {"recipe": "cartpole", "env_id": "CartPole-v1", "env_kwargs": {}, "seed": 3})
    assert main([str(file), str(folder), "--episodes", "4", "--video-steps", "0"]) == 0
    returns = [play(file, TEST_SEEDS + 3 * SEEDS_PER_RUN + i)[0] for i in range(4)]
    assert len(set(returns)) > 1
    results = json.loads((folder / "results.json").read_text())
    assert results.pop("eval_datetime")
    assert results == {
        "mean_reward": pytest.approx(np.mean(returns)),
        "std_reward": pytest.approx(np.std(returns)),
        "is_deterministic": True,
        "n_eval_episodes": 4,
    }
    data = ModelCard.load(folder / "README.md").data
    assert data.library_name == "snn_rl"
    assert {"CartPole-v1", "deep-reinforcement-learning", "spiking-neural-network"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.task_type, result.dataset_name, result.dataset_type) == (
        "reinforcement-learning",
        "CartPole-v1",
        "CartPole-v1",
    )
    assert result.metric_type == "mean_reward"
    assert result.metric_value == f"{np.mean(returns):.2f} +/- {np.std(returns):.2f}"
    assert result.verified is False
    # again, over the first
    assert main([str(file), str(folder), "--episodes", "1", "--video-steps", "0"]) == 0
    assert json.loads((folder / "results.json").read_text())["n_eval_episodes"] == 1


def test_the_cards_snippet_runs(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(repository)
    exec(compile(snippet.replace("n_eval_episodes=5", "n_eval_episodes=1"), "README.md", "exec"), {})
    assert "500.0" in capsys.readouterr().out


def test_what_is_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pushed: dict[str, Any] = {}

    class Api:
        def create_repo(self, repo_id: str, *, repo_type: str, exist_ok: bool) -> str:
            assert exist_ok
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, folder_path: Path, allow_patterns: list[str], **kwargs: Any) -> None:
            files = huggingface_hub.utils.filter_repo_objects(
                [p.relative_to(folder_path).as_posix() for p in folder_path.rglob("*")], allow_patterns=allow_patterns
            )
            pushed.update(kwargs, files=set(files))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    arguments = [str(SHIPPED), str(tmp_path / "out"), "--episodes", "1", "--video-steps", "0"]
    assert main([*arguments, "--push-to", "me/agent"]) == 0
    assert pushed["files"] == FILES - {"replay.mp4"}
    assert pushed["repo_id"] == "me/agent"
    assert pushed["delete_patterns"] == ["replay.mp4"]
    assert "https://hub/me/agent" in capsys.readouterr().out
    assert 'hf_hub_download("me/agent", "policy.safetensors")' in (tmp_path / "out" / "README.md").read_text()


def test_a_push_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(SHIPPED), str(tmp_path / "out"), "--episodes", "1", "--video-steps", "0", "--push-to"]
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for repository, message in (("me/agent", "no Hugging Face token"), ("agent", "OWNER/NAME"), ("a/b c", "")):
        assert_one_line([*arguments, repository], message, capsys)
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_none")
    # a port where nobody listens
    nowhere = functools.partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9", token="hf_none")
    monkeypatch.setattr(huggingface_hub, "HfApi", nowhere)
    assert_one_line([*arguments, "me/agent"], "me/agent was not pushed", capsys)
    assert (tmp_path / "out" / "policy.safetensors").is_file()


def assert_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("seed", [-1, 100_000, 10**30, "0", None, True, [0]])
def test_a_seed_in_the_provenance_that_no_run_has_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: Any
) -> None:
    kwargs = {"net_arch": [16], "timesteps": 1}
    agent = SpikingDQN("MlpPolicy", make_cartpole(1, seed=0), policy_kwargs=kwargs, buffer_size=100, device="cpu")
    save_policy(agent, tmp_path / "a.safetensors", {"recipe": "cartpole", "env_id": "CartPole-v1", "seed": seed})
    arguments = [str(tmp_path / "a.safetensors"), str(tmp_path / "out"), "--video-steps", "0"]
    assert_one_line(arguments, "the seed in the file's provenance must be an integer in [0, 100000), got", capsys)
    assert not (tmp_path / "out").exists()


def test_a_recipe_in_the_provenance_is_a_string_in_the_snippet_and_no_code(tmp_path: Path) -> None:
    recipe = 'x"]; print("run")\nprint("run") #'
    kwargs = {"net_arch": [16], "timesteps": 1}
    agent = SpikingDQN("MlpPolicy", make_cartpole(1, seed=0), policy_kwargs=kwargs, buffer_size=100, device="cpu")
    save_policy(agent, tmp_path / "a.safetensors", {"recipe": recipe, "env_id": "CartPole-v1", "env_kwargs": {}})

    def build(_: LoadedPolicy, num_envs: int, seed: int, **__: Any) -> VecEnv:
        return make_cartpole(num_envs, seed=seed)

    export(tmp_path / "a.safetensors", tmp_path / "out", build, episodes=1, video_steps=0)
    (snippet,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    nodes = list(ast.walk(ast.parse(snippet)))
    assert recipe in [node.value for node in nodes if isinstance(node, ast.Constant)]
    assert len([node for node in nodes if isinstance(node, ast.Name) and node.id == "print"]) == 1


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign, own = tmp_path / "foreign", tmp_path / "own"
    for folder, name in ((foreign, "notes.txt"), (own, "README.md")):
        folder.mkdir()
        (folder / name).write_text("mine")
    new = tmp_path / "new"
    for arguments, message in (
        ([tmp_path / "none", new], "no policy file at"),
        ([SHIPPED, foreign], "holds what is not an earlier export: notes.txt"),
        ([SHIPPED, own], "holds what is not an earlier export: README.md"),
        ([SHIPPED, foreign / "notes.txt"], "is a file; give a folder"),
        ([SHIPPED, new, "--episodes", 0], "episodes must lie in [1, 1000], got 0"),
        ([SHIPPED, new, "--video-steps", -1], "video steps must be >= 0, got -1"),
    ):
        assert_one_line([str(a) for a in arguments], message, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "own"]
    assert [(p.name, p.read_text()) for p in own.iterdir()] == [("README.md", "mine")]
