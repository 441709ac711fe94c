"""An agent at play, in a window or recorded: the game beside the spikes of each layer as they fire."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, unwrap_vec_wrapper
from torch import Tensor, nn

from snn_rl.base.files import atomic
from snn_rl.core.network import SpikingNetwork
from snn_rl.rl.evaluation import is_monitored
from snn_rl.rl.policy_file import LoadedPolicy

GAME_HEIGHT = 320  # pixels of the game in the picture
PANEL_WIDTH = 260
PANEL_HEIGHT = 65  # of one layer of four or so
MARGIN = 8
TEXT_HEIGHT = 14
BACKGROUND = (16, 16, 24)
TEXT = (220, 220, 220)
FORMATS = (".gif", ".mp4")
GIF_FPS = 50  # its clock ticks every 10 ms, and viewers slow down what changes at every tick


def record(policy: LoadedPolicy, env: VecEnv, path: str | Path, *, steps: int = 300, fps: int = 15) -> float:
    """Play greedily in one environment, write ``steps`` frames to a ``.gif`` or ``.mp4``; returns the sum of rewards.

    ``env`` must hold one environment with ``render_mode="rgb_array"``. Each LIF layer is drawn as a grid of its
    neurons (channels tiled, where it has them), brighter the more often a neuron fired in the frame's T micro-steps.
    A ``.gif`` joins equal neighbouring frames into one that stands longer, and is kept in memory until it is written.

    Raises:
        ValueError: another file ending, steps or fps out of range, an environment that draws nothing.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"a video must end in {' or '.join(FORMATS)}, got {path.name!r}")
    _check(env, steps, fps)
    if path.suffix == ".gif" and fps > GIF_FPS:
        raise ValueError(f"a .gif plays at most {GIF_FPS} frames a second, got fps {fps}; write a .mp4 instead")
    score = 0.0
    with atomic(path) as temporary:
        if path.suffix == ".gif":
            frames = []
            for image, reward in _play(policy, env, steps):
                score += reward
                frames.append(image)
            _write_gif(temporary, frames, fps)
        else:
            writer: Any
            with imageio.get_writer(temporary, fps=fps, codec="libx264", macro_block_size=1) as writer:
                for image, reward in _play(policy, env, steps):
                    score += reward
                    writer.append_data(image)
    return score


def show(policy: LoadedPolicy, env: VecEnv, *, steps: int = 300, fps: int = 15) -> float:
    """As `record`, in a window, until it is closed or ``steps`` frames have been played; returns the sum of rewards.

    Raises:
        ValueError: no display, steps or fps out of range, an environment that draws nothing.
    """
    _check(env, steps, fps)
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    import pygame  # only here: a server that records videos has no use for it

    score = 0.0
    try:
        pygame.display.init()
        screen, clock = None, pygame.time.Clock()
        for image, reward in _play(policy, env, steps):
            score += reward
            if screen is None:
                screen = pygame.display.set_mode((image.shape[1], image.shape[0]))
                pygame.display.set_caption("snn_rl")
            screen.blit(pygame.surfarray.make_surface(image.swapaxes(0, 1)), (0, 0))
            pygame.display.flip()
            if any(event.type == pygame.QUIT for event in pygame.event.get()):
                break
            clock.tick(fps)
    except pygame.error as error:
        raise ValueError(f"no window can be opened ({error}); write a video instead: --video pong.gif") from error
    finally:
        pygame.display.quit()
    return score


def has_display() -> bool:
    """Whether a window could be seen here."""
    return sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))


def _check(env: VecEnv, steps: int, fps: int) -> None:
    for name, value in (("steps", steps), ("fps", fps), ("num_envs of the environment", env.num_envs)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if env.num_envs != 1:
        raise ValueError(f"only one environment can be watched, got {env.num_envs}")
    if env.render_mode != "rgb_array":
        raise ValueError(f"the environment's render_mode is {env.render_mode!r}; build it with 'rgb_array' to watch it")


def _write_gif(path: Path, frames: Sequence[np.ndarray], fps: int) -> None:
    # One palette for all frames keeps the file small and the colours still. It is made of the colours of every frame,
    # each counted once: a spike is a few pixels, and may be in no frame but one.
    colours = np.zeros(1 << 24, dtype=bool)
    for frame in frames:
        colours[frame.astype(np.uint32) @ np.array((1 << 16, 1 << 8, 1), dtype=np.uint32)] = True
    used = np.flatnonzero(colours)
    swatch = np.stack((used >> 16, used >> 8 & 255, used & 255), axis=-1).astype(np.uint8)
    palette = Image.fromarray(swatch[None]).quantize(256)
    pictures = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    # in steps of 10 ms, rounded where frames end, so that the whole neither hurries nor lags
    durations = np.diff(np.round(np.arange(len(frames) + 1) * 100 / fps)).astype(int) * 10
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations.tolist(), loop=0)


def _play(policy: LoadedPolicy, env: VecEnv, steps: int) -> Iterator[tuple[np.ndarray, float]]:
    """Pictures (height, width, 3) uint8 and rewards, one per environment step."""
    spikes: dict[str, np.ndarray] = {}
    monitor = unwrap_vec_wrapper(env, VecMonitor)
    if not is_monitored(env):
        raise ValueError("the environment must be monitored for its score; wrap it in a VecMonitor")

    def played() -> float:
        """The score of the episode that runs."""
        return float(sum(env.get_attr("rewards", [0])[0]) if monitor is None else monitor.episode_returns[0])

    with ExitStack() as stack:
        if isinstance(policy.network, SpikingNetwork):
            for name, lif in policy.network.lif_layers.items():
                stack.callback(lif.register_forward_hook(_keep(spikes, name)).remove)
        obs = env.reset()
        state, start, score = None, np.ones(1, dtype=bool), 0.0
        for _ in range(steps):
            image = env.get_images()[0]
            assert image is not None
            actions, state = policy.predict(obs, state, start, deterministic=True)  # type: ignore[arg-type]
            obs, _, start, infos = env.step(actions)
            name = "ANN" if policy.timesteps is None else f"T = {policy.timesteps}"
            title = f"{name}   score {score:g}   action {actions[0]}"
            # the monitor's score is the game's own, whatever the environment clips for learning
            after = float(infos[0]["episode"]["r"]) if start[0] else played()
            yield draw(image, spikes, title), after - score
            score = 0.0 if start[0] else after


def _keep(spikes: dict[str, np.ndarray], name: str) -> Any:
    def hook(_: nn.Module, __: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        spikes[name] = output[0][:, 0].mean(0, dtype=torch.float32).cpu().numpy()  # (steps, batch, ...) -> (...)

    return hook


def draw(game: np.ndarray, spikes: dict[str, np.ndarray], title: str) -> np.ndarray:
    """One picture: ``game`` (height, width, 3) and the fraction of micro-steps in which each neuron fired."""
    height, width = game.shape[:2]
    scale = GAME_HEIGHT / height
    left = Image.fromarray(game).resize((round(width * scale), GAME_HEIGHT), Image.Resampling.NEAREST)
    panels = len(spikes)
    full = (left.width + 2 * MARGIN + (PANEL_WIDTH + MARGIN if panels else 0), GAME_HEIGHT + TEXT_HEIGHT + 3 * MARGIN)
    # video codecs want even sides
    picture = Image.new("RGB", (full[0] + full[0] % 2, full[1] + full[1] % 2), BACKGROUND)
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default()
    canvas.text((MARGIN, MARGIN), title, TEXT, font)
    picture.paste(left, (MARGIN, TEXT_HEIGHT + 2 * MARGIN))
    share = (GAME_HEIGHT + TEXT_HEIGHT + MARGIN) // max(panels, 1)
    for index, (name, fired) in enumerate(spikes.items()):
        x, y = left.width + 2 * MARGIN, MARGIN + index * share
        canvas.text((x, y), f"{name}  {100 * fired.mean():.0f} % fire", TEXT, font)
        grid = tile(fired)
        room = (PANEL_WIDTH, share - TEXT_HEIGHT - MARGIN)
        zoom = min(room[0] / grid.shape[1], room[1] / grid.shape[0])
        size = (max(1, int(grid.shape[1] * zoom)), max(1, int(grid.shape[0] * zoom)))
        if zoom < 1:
            grid = _shrink(grid, size[1], size[0])
        picture.paste(Image.fromarray(_colours(grid)).resize(size, Image.Resampling.NEAREST), (x, y + TEXT_HEIGHT))
    return np.asarray(picture)


def tile(fired: np.ndarray) -> np.ndarray:
    """Lay a layer out as one grid (rows, columns): channels side by side, or neurons in reading order; unused: NaN."""
    if fired.ndim == 3:
        channels, height, width = fired.shape

        def zoom(columns: int) -> float:
            rows = math.ceil(channels / columns)
            return min(PANEL_WIDTH / (columns * (width + 1) - 1), PANEL_HEIGHT / (rows * (height + 1) - 1))

        columns = max(range(1, channels + 1), key=zoom)
        rows = math.ceil(channels / columns)
        grid = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), np.nan, dtype=np.float32)
        for c, channel in enumerate(fired):
            top, left = c // columns * (height + 1), c % columns * (width + 1)
            grid[top : top + height, left : left + width] = channel
        return grid
    flat = fired.reshape(-1)
    columns = min(len(flat), math.ceil(math.sqrt(4 * len(flat))))
    grid = np.full((math.ceil(len(flat) / columns), columns), np.nan, dtype=np.float32)
    grid.reshape(-1)[: len(flat)] = flat
    return grid


def _shrink(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """The maximum over each block: where there is less than a pixel per neuron, no spike is lost."""
    for axis, size in enumerate((height, width)):
        grid = np.fmax.reduceat(grid, np.arange(size) * grid.shape[axis] // size, axis=axis)
    return grid


def _colours(grid: np.ndarray) -> np.ndarray:
    """Dark blue for silence to yellow for a spike at every micro-step; the background where there is no neuron."""
    level = np.nan_to_num(grid)[..., None]
    colours = (1 - level) * np.array((40, 44, 80)) + level * np.array((255, 220, 80))
    colours[np.isnan(grid)] = BACKGROUND
    return colours.astype(np.uint8)
