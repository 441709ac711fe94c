"""Videos: readable again, of the right length, with the right neurons lit."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env

from envs.classic import make_cartpole
from scripts.watch import main
from snn_rl import SpikingDQN, save_policy
from snn_rl.policy_file import load_policy
from snn_rl.watch import GAME_HEIGHT, draw, record, tile


@pytest.fixture(scope="module")
def policy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kwargs = {"net_arch": [16], "timesteps": 2}
    agent = SpikingDQN("MlpPolicy", make_vec_env("CartPole-v1", 1), policy_kwargs=kwargs, buffer_size=100, device="cpu")
    path = tmp_path_factory.mktemp("policy") / "policy.safetensors"
    provenance = {"recipe": "cartpole", "env_id": "CartPole-v1", "env_kwargs": {}, "seed": 0, "stage": "T2"}
    save_policy(agent, path, provenance)
    return path


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # imageio-ffmpeg's reader leaks its pipes
@pytest.mark.parametrize("ending", [".gif", ".mp4"])
def test_a_video_can_be_read_again(policy_file: Path, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"play{ending}"
    assert main([str(policy_file), "--video", str(path), "--steps", "7"]) == 0
    frames = imageio.imread(path, index=None if ending == ".gif" else ...)
    assert len(frames) == 7
    assert frames[0].shape[0] > GAME_HEIGHT
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_neuron_that_fires_is_lit() -> None:
    game = np.zeros((40, 60, 3), dtype=np.uint8)
    silent = draw(game, {"layer": np.zeros(16, dtype=np.float32)}, "")
    fired = np.zeros(16, dtype=np.float32)
    fired[5] = 1.0
    lit = draw(game, {"layer": fired}, "")
    grid = tile(fired)
    assert (silent != lit).any()
    bright = (lit == (255, 220, 80)).all(-1)
    assert bright.any()
    assert not (silent == (255, 220, 80)).all(-1).any()
    # where it is lit, relative to the grid, is where the neuron stands
    panel = (lit != (16, 16, 24)).any(-1) & ((lit == (40, 44, 80)).all(-1) | bright)
    rows, columns = np.nonzero(panel)
    y, x = np.nonzero(bright)
    row, column = np.argwhere(grid == 1.0)[0]
    height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
    assert int((y.mean() - rows.min()) / height * grid.shape[0]) == row
    assert int((x.mean() - columns.min()) / width * grid.shape[1]) == column


def test_channels_are_tiled_apart() -> None:
    fired = np.arange(4 * 3 * 3, dtype=np.float32).reshape(4, 3, 3)
    grid = tile(fired)
    assert sorted(grid[~np.isnan(grid)].tolist()) == list(range(36))
    assert (grid[:3, :3] == fired[0]).all()
    assert np.isnan(grid[:, 3]).all()


def test_bad_input_is_named(policy_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = str(tmp_path / "v.gif")
    assert main([str(policy_file), "--video", str(tmp_path / "v.avi")]) == 2
    assert "must end in .gif or .mp4, got 'v.avi'" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), "--video", video]) == 2
    assert "no policy file at" in capsys.readouterr().err
    assert main([str(policy_file), "--video", video, "--steps", "0"]) == 2
    assert "steps must be >= 1, got 0" in capsys.readouterr().err
    assert main([str(policy_file), "--video", video, "--sticky", "0.5"]) == 2
    assert "unexpected keyword argument 'sticky'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="render_mode is None; build it with 'rgb_array'"):
        record(load_policy(policy_file), make_cartpole(1, seed=0), video)
