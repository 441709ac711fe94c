"""RL Zoo's commands with `SpikingDQN`, headless, on seconds of budget."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from snn_rl import SpikingDQN

pytest.importorskip("rl_zoo3")
ROOT = Path(__file__).resolve().parents[2]


# `enjoy` with an agent that notes what membranes it is handed
ENJOY = """
import sys; sys.path.insert(0, sys.argv[1])
from scripts.zoo import main
from snn_rl import SpikingDQN
calls, predict = [], SpikingDQN.predict
def noted(self, observation, state=None, episode_start=None, deterministic=False):
    action, after = predict(self, observation, state, episode_start, deterministic)
    calls.append((state, bool(episode_start[0]), after))
    return action, after
SpikingDQN.predict = noted
assert main(["enjoy", "-f", sys.argv[2], "-n", "150", "--no-render", "--device", "cpu"]) == 0
carried = sum(now[0] is before[2] for before, now in zip(calls, calls[1:]))
print(len(calls), carried, sum(start for _, start, _ in calls))
"""


def zoo(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: RL Zoo's and its dependencies' warnings are not ours."""
    env = {**os.environ, "MPLBACKEND": "Agg", "SDL_VIDEODRIVER": "dummy"}
    command = [sys.executable, "scripts/zoo.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_train_enjoy_record_and_plot(tmp_path: Path) -> None:
    budget = ["-n", "400", "--eval-freq", "200", "--eval-episodes", "2", "--device", "cpu", "--seed", "0"]
    trained = zoo("train", *budget, "-f", tmp_path, "-params", "learning_starts:100")
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "spiking_dqn" / "CartPole-v1_1"
    assert np.load(run / "evaluations.npz")["results"].shape[1] == 2
    agent = SpikingDQN.load(run / "CartPole-v1.zip", device="cpu")
    assert agent._n_updates > 0
    assert agent.q_net.network.timesteps == 2

    played = subprocess.run(
        [sys.executable, "-c", ENJOY, str(ROOT), str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    assert "Mean reward:" in played
    frames, carried, starts = map(int, played.splitlines()[-1].split())
    episodes = played.count("Episode Reward")
    assert frames == 150
    assert carried == frames - 1  # every frame but the first begins with the membranes that the one before left
    assert starts in (episodes, episodes + 1)  # the last episode may end with the last frame
    assert starts > 1

    recorded = zoo("record", "-f", tmp_path, "-n", "20", "-o", tmp_path / "videos")
    assert recorded.returncode == 0, recorded.stderr
    assert [file.stat().st_size > 1_000 for file in (tmp_path / "videos").glob("*.mp4")] == [True]

    which = ["-e", "CartPole-v1", "-f", tmp_path]
    figure, table = tmp_path / "train.png", tmp_path / "table"
    plotted = zoo("plot_train", "-a", "spiking_dqn", *which, "-w", "5", "--save", figure)
    assert plotted.returncode == 0, plotted.stderr
    assert figure.read_bytes().startswith(b"\x89PNG")
    plotted = zoo("all_plots", "-a", "spiking_dqn", *which, "--no-display", "-o", table)
    assert plotted.returncode == 0, plotted.stderr
    with open(f"{table}.pkl", "rb") as file:
        assert "CartPole-v1" in pickle.load(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "unknown command 'dance'; there are train"),
        (["train", "--algo", "chess"], "unknown algorithm 'chess'"),
        (["train", "--alg", "chess"], "unknown algorithm 'chess'"),
        (["train", "--device", "gpu"], "gpu"),
        (["train", "-i", "none.zip"], "train was refused"),
        (["enjoy", "-f", "nowhere"], "enjoy was refused"),
        (["train", "--env", "Chess-v9"], "unknown environment 'Chess-v9'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], message: str) -> None:
    result = zoo(*arguments)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.stderr
