"""The benchmark over a folder of trained agents, on a folder of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from stable_baselines3 import PPO

from benchmarks import public_agents
from snn_rl.runs.recipe import SpikeRecipe

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    home = tmp_path / "agents"
    (home / "ppo-CartPole-v1").mkdir(parents=True)
    PPO("MlpPolicy", "CartPole-v1", device="cpu", seed=0).save(home / "ppo-CartPole-v1" / "model.zip")
    agent = {"name": "ppo-CartPole-v1", "algo": "ppo", "env_id": "CartPole-v1", "env_kwargs": {}, "vecnormalize": False}
    (home / "index.json").write_text(json.dumps([{**agent, "teacher_mean": 500.0, "random_mean": 20.0}]))
    return home


def test_scores_and_table(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = public_agents.recipe_of

    def smoke(agent: dict[str, object]) -> SpikeRecipe:
        return whole(agent).smoke()

    monkeypatch.setattr(public_agents, "recipe_of", smoke)
    words = ["public_agents.py", str(folder), "--runs", str(tmp_path / "runs"), "--table", str(tmp_path / "table.md")]
    monkeypatch.setattr(sys, "argv", words)
    public_agents.main()
    results = json.loads((tmp_path / "runs" / "ppo-CartPole-v1" / "seed-0" / "results.json").read_text())
    means = {stage["stage"]: stage["eval"]["mean"] for stage in results["stages"]}
    assert list(means) == ["teacher", "ann", "T5", "T3", "T1"]
    (row,) = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ppo-CartPole-v1")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    for cell, name in zip(cells[7:10], ("T5", "T3", "T1"), strict=True):
        assert cell == f"{(means[name] - 20.0) / 480.0:.3f}"
    assert cells[6].startswith(f"{means['T1']:.1f} ± ")


def test_an_agent_that_cannot_be_read_is_named_and_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "ppo-CartPole-v1" / "model.zip").write_bytes(b"PK")
    command = [sys.executable, "benchmarks/public_agents.py", str(folder), "--runs", str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("ppo-CartPole-v1: ")
    assert len(done.stderr.splitlines()) == 1
