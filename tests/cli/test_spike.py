"""``snn-rl spike``: from a zip to a table, and what it says of bad input."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from snn_rl import load_policy
from snn_rl.cli import main


@pytest.fixture(scope="module")
def ppo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PPO of CartPole-v1, with tanh."""
    path = tmp_path_factory.mktemp("agents") / "ppo.zip"
    PPO("MlpPolicy", "CartPole-v1", device="cpu", seed=0).save(path)
    return path


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())  # type: ignore[no-any-return]


def test_a_table_at_the_end_and_a_second_call(ppo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["spike", str(ppo), "--env-id", "CartPole-v1", "--smoke", "--run-dir", str(tmp_path / "run")]
    assert main([*words, "--schedule", "2", "1"]) == 0
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["teacher", "ann", "T2", "T1"]
    found = results(tmp_path / "run")
    assert [stage["stage"] for stage in found["stages"]] == ["teacher", "ann", "T2", "T1"]
    policy = load_policy(tmp_path / "run" / "T1" / "policy.safetensors")
    assert policy.timesteps == 1
    assert policy.metadata["provenance"]["env_id"] == "CartPole-v1"
    at = (tmp_path / "run" / "T1" / "model.zip").stat().st_mtime_ns
    assert main([*words, "--schedule", "2", "1"]) == 0  # nothing is trained again
    assert capsys.readouterr().out == table
    assert (tmp_path / "run" / "T1" / "model.zip").stat().st_mtime_ns == at
    assert main([*words, "--schedule", "3", "1"]) == 2
    assert "belongs to another run: its schedule is [2, 1], not [3, 1]" in capsys.readouterr().err
    env = VecNormalize(make_vec_env("CartPole-v1", 1))
    env.save(str(tmp_path / "vecnormalize.pkl"))
    assert main([*words, "--schedule", "2", "1", "--vecnormalize", str(tmp_path / "vecnormalize.pkl")]) == 2
    assert "belongs to another run: it has the statistics none, not " in capsys.readouterr().err


def test_the_agent_plays_by_the_other_commands(ppo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["spike", str(ppo), "--env-id", "CartPole-v1", "--smoke", "--run-dir", str(tmp_path), "--schedule", "1"]
    assert main(words) == 0
    file = str(tmp_path / "T1" / "policy.safetensors")
    assert main(["evaluate", file, "--episodes", "2"]) == 0
    assert "over 2 episodes" in capsys.readouterr().out
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file()


def test_a_normalised_continuous_agent(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1", 1))
    env.reset()
    for _ in range(30):
        env.step(np.zeros((1, 1), dtype=np.float32))
    env.save(str(tmp_path / "vecnormalize.pkl"))
    sac = SAC("MlpPolicy", env, device="cpu", buffer_size=10, policy_kwargs={"net_arch": [32, 32]})
    sac.save(tmp_path / "sac.zip")
    words = [
        "spike",
        str(tmp_path / "sac.zip"),
        "--env-id",
        "Pendulum-v1",
        "--smoke",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    words += ["--vecnormalize", str(tmp_path / "vecnormalize.pkl"), "--schedule", "1", "--algo", "sac"]
    assert main([*words, "--env-kwargs", "g=9.0"]) == 0
    assert [stage["stage"] for stage in results(tmp_path / "run")["stages"]] == ["teacher", "T1"]
    policy = load_policy(tmp_path / "run" / "T1" / "policy.safetensors")
    assert policy.metadata["head"] == "squashed"
    assert policy.metadata["provenance"]["env_kwargs"] == {"g": 9.0}
    raw = np.array([[0.3, -0.4, 2.0]], dtype=np.float32)
    normalizer = policy.policy.net.normalizer
    assert normalizer is not None
    np.testing.assert_array_equal(normalizer(torch.as_tensor(raw)).numpy(), env.normalize_obs(raw))


def test_bad_input_is_one_line_and_status_2(ppo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(file: Path | str, *options: str, env_id: str = "CartPole-v1") -> str:
        folder = tmp_path / "never"
        assert main(["spike", str(file), "--env-id", env_id, "--run-dir", str(folder), *options]) == 2
        assert not folder.exists()
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1, error
        return error

    def saved(name: str, model: BaseAlgorithm) -> Path:
        model.save(tmp_path / name)
        return tmp_path / name

    assert "no such file" in refused(tmp_path / "none.zip")
    cut = tmp_path / "cut.zip"
    cut.write_bytes(ppo.read_bytes()[:2_000])
    assert "damaged" in refused(cut)
    with zipfile.ZipFile(tmp_path / "foreign.zip", "w") as file:
        file.writestr("hello.txt", "hello")
    assert "not an agent that SB3 saved" in refused(tmp_path / "foreign.zip")
    assert "algo must be one of" in refused(ppo, "--algo", "dreamer")
    assert "dqn" in refused(ppo, "--algo", "dqn")
    assert "no environment 'CartPole-v9'" in refused(ppo, env_id="CartPole-v9")
    assert "does not take the argument 'gravity'" in refused(ppo, "--env-kwargs", "gravity=3")
    other = refused(ppo, env_id="Pendulum-v1")
    assert "Discrete(2)" in other
    assert "Box(-2.0, 2.0, (1,), float32)" in other
    assert "schedule must be decreasing" in refused(ppo, "--schedule", "1", "2")
    assert "eval_episodes must be >= 1, got 0" in refused(ppo, "--episodes", "0")
    assert "no file of VecNormalize" in refused(ppo, "--vecnormalize", str(tmp_path / "none.pkl"))
    env = VecNormalize(make_vec_env("Pendulum-v1", 1))
    env.save(str(tmp_path / "other.pkl"))
    wrong = refused(ppo, "--vecnormalize", str(tmp_path / "other.pkl"))
    assert "(3,)" in wrong
    assert "(4,)" in wrong
    broken = DQN("MlpPolicy", "CartPole-v1", device="cpu", buffer_size=10)
    with torch.no_grad():
        broken.q_net.q_net[0].weight.fill_(torch.nan)
    assert "finite" in refused(saved("nan.zip", broken))
    assert "unknown device" in refused(ppo, "--device", "tpu")
