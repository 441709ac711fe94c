"""Videos: readable again, of the right length, with the right neurons lit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest
from PIL import Image
from stable_baselines3.common.env_util import make_vec_env

import snn_rl.share.watch as watch
from envs.classic import make_cartpole
from scripts.watch import main
from snn_rl import SpikingDQN, save_policy
from snn_rl.base.weights_file import write_weights
from snn_rl.rl.policy_file import FORMAT, load_policy
from snn_rl.share.watch import GAME_HEIGHT, draw, record, show, tile


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


@pytest.mark.parametrize("shape", [(32, 20, 20), (64, 9, 9), (128, 40, 40), (512,)])
def test_no_spike_is_too_small_to_be_drawn(shape: tuple[int, ...]) -> None:
    game = np.zeros((210, 160, 3), dtype=np.uint8)
    random = np.random.default_rng(0)
    for _ in range(40):
        fired = np.zeros(shape, dtype=np.float32)
        fired.reshape(-1)[random.integers(fired.size)] = 1.0
        spikes = {"layer": fired, **{str(n): np.zeros(16, dtype=np.float32) for n in range(3)}}
        assert (draw(game, spikes, "") == (255, 220, 80)).all(-1).any()


def test_a_gif_shows_spikes_that_are_in_one_frame_alone(
    policy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = []

    def draw_one(game: np.ndarray, spikes: dict[str, np.ndarray], title: str) -> np.ndarray:
        (name,) = spikes
        fired = np.zeros(16, dtype=np.float32)
        fired[3] = len(frames) == 2  # silence before and after
        frames.append(draw(game, {name: fired}, title))
        return frames[-1]

    monkeypatch.setattr(watch, "draw", draw_one)
    env = make_cartpole(1, seed=0, render_mode="rgb_array")
    record(load_policy(policy_file), env, tmp_path / "play.gif", steps=6, fps=15)
    with Image.open(tmp_path / "play.gif") as video:
        assert video.n_frames == 6  # type: ignore[attr-defined]
        milliseconds = 0
        for n, frame in enumerate(frames):
            video.seek(n)
            milliseconds += video.info["duration"]
            written = np.asarray(video.convert("RGB")).astype(int)
            lit = (frame == (255, 220, 80)).all(-1)
            assert lit.any() == (n == 2)
            assert (np.abs(written - frame)[lit] < 30).all()
    assert milliseconds == 400


def test_the_score_is_the_same_by_either_monitor(policy_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of SB3's `make_vec_env`, whose copies are monitored one by one, and of a `VecMonitor` around all."""
    policy = load_policy(policy_file)
    scores = []
    each = make_vec_env("CartPole-v1", 1, seed=3, env_kwargs={"render_mode": "rgb_array"})
    for env in (each, make_cartpole(1, seed=3, render_mode="rgb_array")):
        monkeypatch.setattr(watch, "draw", lambda game, spikes, title: title)
        scores.append([(title, reward) for title, reward in watch._play(policy, env, 60)])
        env.close()
    assert scores[0] == scores[1]
    assert sum(reward for _, reward in scores[0]) >= 59  # 1 for each step, over the ends of episodes


@pytest.mark.parametrize("ending", [".gif", ".mp4"])
def test_a_failure_leaves_the_old_video(
    ending: str, policy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"play{ending}"
    path.write_bytes(b"old")
    count = iter(range(10))

    def fail(*arguments: Any) -> np.ndarray:
        if next(count) == 3:
            raise OSError("No space left on device")
        return draw(*arguments)

    monkeypatch.setattr(watch, "draw", fail)
    with pytest.raises(OSError, match="No space left"):
        record(load_policy(policy_file), make_cartpole(1, seed=0, render_mode="rgb_array"), path, steps=6)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [(path.name, b"old")]


def test_channels_are_tiled_apart() -> None:
    fired = np.arange(4 * 3 * 3, dtype=np.float32).reshape(4, 3, 3)
    grid = tile(fired)
    assert sorted(grid[~np.isnan(grid)].tolist()) == list(range(36))
    assert (grid[:3, :3] == fired[0]).all()
    assert np.isnan(grid[:, 3]).all()


def test_a_window_shows_the_pictures(
    policy_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(watch, "has_display", lambda: True)
    shown, drawn = [], []
    flip = pygame.display.flip

    def keep() -> None:
        shown.append(pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1))
        flip()

    def draw_one(*arguments: Any) -> np.ndarray:
        drawn.append(draw(*arguments))
        return drawn[-1]

    monkeypatch.setattr(pygame.display, "flip", keep)
    monkeypatch.setattr(watch, "draw", draw_one)
    assert main([str(policy_file), "--steps", "3", "--fps", "1000"]) == 0
    assert "score 3" in capsys.readouterr().out  # one for each step of CartPole
    assert len(shown) == 3
    for ours, theirs in zip(drawn, shown, strict=True):
        assert (ours == theirs).all()


def test_closing_the_window_ends_the_play(policy_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(pygame.event, "get", lambda: [pygame.event.Event(pygame.QUIT)])
    env = make_cartpole(1, seed=0, render_mode="rgb_array")
    assert show(load_policy(policy_file), env, steps=50) == 1


def test_without_a_display_the_video_is_a_file(
    policy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(watch, "has_display", lambda: False)
    assert main([str(policy_file), "--steps", "2"]) == 0
    assert (tmp_path / "watch.gif").is_file()
    assert "watch.gif: 2 steps" in capsys.readouterr().out
    pygame = pytest.importorskip("pygame")

    def fail(_: object) -> None:
        raise pygame.error("No available video device")

    monkeypatch.setattr(pygame.display, "set_mode", fail)
    with pytest.raises(ValueError, match=r"no window can be opened.*write a video instead: --video"):
        show(load_policy(policy_file), make_cartpole(1, seed=0, render_mode="rgb_array"), steps=1)


def test_bad_input_is_named(policy_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = str(tmp_path / "v.gif")
    assert main([str(policy_file), "--video", str(tmp_path / "v.avi")]) == 2
    assert "must end in .gif or .mp4, got 'v.avi'" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), "--video", video]) == 2
    assert "no policy file at" in capsys.readouterr().err
    assert main([str(policy_file), "--video", video, "--steps", "0"]) == 2
    assert "steps must be >= 1, got 0" in capsys.readouterr().err
    assert main([str(policy_file), "--video", video, "--fps", "60"]) == 2
    assert "at most 50 frames a second, got fps 60; write a .mp4" in capsys.readouterr().err
    assert main([str(policy_file), "--video", video, "--sticky", "0.5"]) == 2
    assert "unexpected keyword argument 'sticky'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="render_mode is None; build it with 'rgb_array'"):
        record(load_policy(policy_file), make_cartpole(1, seed=0), video)


def test_an_agent_of_ones_own_is_watched_in_the_environment_that_is_named(
    policy_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, video = tmp_path / "own.safetensors", tmp_path / "play.gif"
    policy = load_policy(policy_file)
    write_weights(file, policy.policy.net, FORMAT, {**policy.metadata, "provenance": {"recipe": "mine"}})
    assert main([str(file), "--video", str(video)]) == 2
    assert "made by the recipe 'mine'" in capsys.readouterr().err
    assert main([str(file), "--video", str(video), "--env-id", "CartPole-v1", "--steps", "4"]) == 0
    assert f"{video}: 4 steps, score 4" in capsys.readouterr().out
    assert main([str(file), "--video", str(video), "--env-id", "Acrobot-v1"]) == 2
    assert "that of Acrobot-v1 is Box" in capsys.readouterr().err
