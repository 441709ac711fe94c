"""Record an agent at play: the game beside the spikes of each layer as they fire."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from snn_rl.files import atomic
from snn_rl.network import SpikingNetwork
from snn_rl.policy_file import LoadedPolicy

GAME_HEIGHT = 320  # pixels of the game in the picture
PANEL_WIDTH = 260
MARGIN = 8
TEXT_HEIGHT = 14
BACKGROUND = (16, 16, 24)
TEXT = (220, 220, 220)
FORMATS = (".gif", ".mp4")


def record(policy: LoadedPolicy, env: VecEnv, path: str | Path, *, steps: int = 300, fps: int = 15) -> float:
    """Play greedily in one environment and write ``steps`` frames to a ``.gif`` or ``.mp4``; returns the score so far.

    ``env`` must hold one environment with ``render_mode="rgb_array"``. Each LIF layer is drawn as a grid of its
    neurons (channels tiled, where it has them), brighter the more often a neuron fired in the frame's T micro-steps.

    Raises:
        ValueError: another file ending, steps or fps below 1, an environment that draws nothing.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"a video must end in {' or '.join(FORMATS)}, got {path.name!r}")
    for name, value in (("steps", steps), ("fps", fps), ("num_envs of the environment", env.num_envs)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if env.num_envs != 1:
        raise ValueError(f"only one environment can be watched, got {env.num_envs}")
    if env.render_mode != "rgb_array":
        raise ValueError(f"the environment's render_mode is {env.render_mode!r}; build it with 'rgb_array' to watch it")
    score = 0.0
    frames = []
    for image, reward in _play(policy, env, steps):
        score += reward
        frames.append(image)
    with atomic(path) as temporary:
        if path.suffix == ".gif":
            # one palette for all frames keeps the file small and the colours still
            palette = Image.fromarray(frames[-1]).quantize(64)
            pictures = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
            pictures[0].save(temporary, save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0)
        else:
            imageio.imwrite(temporary, np.stack(frames), fps=fps, codec="libx264", macro_block_size=1)
    return score


def _play(policy: LoadedPolicy, env: VecEnv, steps: int) -> Iterator[tuple[np.ndarray, float]]:
    """Pictures (height, width, 3) uint8 and rewards, one per environment step."""
    spikes: dict[str, np.ndarray] = {}
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
            obs, rewards, start, _ = env.step(actions)
            title = f"{'ANN' if policy.timesteps is None else f'T = {policy.timesteps}'}   score {score:g}"
            yield draw(image, spikes, title), float(rewards[0])
            score = 0.0 if start[0] else score + float(rewards[0])


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
        picture.paste(Image.fromarray(_colours(grid)).resize(size, Image.Resampling.NEAREST), (x, y + TEXT_HEIGHT))
    return np.asarray(picture)


def tile(fired: np.ndarray) -> np.ndarray:
    """Lay a layer out as one grid (rows, columns): channels side by side, or neurons in reading order; unused: NaN."""
    if fired.ndim == 3:
        channels, height, width = fired.shape
        columns = math.ceil(math.sqrt(2 * channels * height / width))
        columns = min(columns, channels)
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


def _colours(grid: np.ndarray) -> np.ndarray:
    """Dark blue for silence to yellow for a spike at every micro-step; the background where there is no neuron."""
    level = np.nan_to_num(grid)[..., None]
    colours = (1 - level) * np.array((40, 44, 80)) + level * np.array((255, 220, 80))
    colours[np.isnan(grid)] = BACKGROUND
    return colours.astype(np.uint8)
