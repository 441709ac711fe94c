"""How cost grows with T, batch, width and number of environments: a figure, and its numbers as tables.

python benchmarks/scaling.py docs/images/scaling.png
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib as mpl
import numpy as np
import torch
from acting import Frames, spiking_agent
from layers import inference, training_step
from measure import machine, medians, table
from stable_baselines3 import DQN
from torch import nn
from variants import LEAK, Ours, nature_cnn

from snn_rl import to_spiking

ROUNDS = 7
Curves = dict[str, list[float]]  # milliseconds at each point of the axis
Call = Callable[[], object]


def models(timesteps: Sequence[int], batch: int = 32, width: float = 1.0) -> tuple[dict[str, nn.Module], torch.Tensor]:
    """Nature CNN as an ANN and converted, and a batch."""
    torch.manual_seed(0)
    x = torch.rand(batch, 4, 84, 84).contiguous(memory_format=torch.channels_last)
    ann = nature_cnn(width).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    spiking = {f"T = {t}": Ours(to_spiking(ann, x[:4], timesteps=t, leak=LEAK)) for t in timesteps}
    return {"ANN": ann, **spiking}, x


def over_timesteps(timesteps: int) -> dict[str, Call]:
    networks, x = models([timesteps])
    names = {"ANN": "ANN", f"T = {timesteps}": "spiking"}
    calls: dict[str, Call] = {f"{names[n]}, inference": inference(m, x) for n, m in networks.items()}
    return calls | {f"{names[n]}, training": training_step(m, x) for n, m in networks.items()}


def over_batch(batch: int) -> dict[str, Call]:
    networks, x = models([1, 5], batch=batch)
    return {name: training_step(model, x) for name, model in networks.items()}


def over_width(width: float) -> dict[str, Call]:
    networks, x = models([1, 5], width=width)
    return {name: training_step(model, x) for name, model in networks.items()}


def over_environments(environments: int) -> dict[str, Call]:
    """One `predict` for all of them."""
    common: dict[str, Any] = {"buffer_size": 100, "seed": 0, "device": "cpu"}
    agents: dict[str, DQN] = {"SB3's DQN": DQN("CnnPolicy", Frames(), **common)}
    for t in (1, 5):
        agents[f"T = {t}"] = spiking_agent("CnnPolicy", Frames(), t, **common)
    space: gym.Space[np.ndarray] = Frames.observation_space
    space.seed(0)
    observations = np.stack([space.sample() for _ in range(environments)])

    def play(agent: DQN) -> Call:
        state: Any = None

        def predict() -> None:
            nonlocal state
            _, state = agent.predict(observations, state, deterministic=True)

        for _ in range(10):  # weights have rested
            predict()
        return predict

    return {name: play(agent) for name, agent in agents.items()}


AXES: dict[str, tuple[Callable[[Any], dict[str, Call]], list[Any]]] = {
    "micro-steps T (batch 32)": (over_timesteps, [1, 2, 3, 4, 5, 8]),
    "batch of a training step": (over_batch, [8, 16, 32, 64, 128]),
    "width of a training step's network (batch 32)": (over_width, [0.25, 0.5, 1, 1.5, 2]),
    "environments of one predict": (over_environments, [1, 2, 4, 8, 16, 32]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figure", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    mpl.use("agg")
    from matplotlib import pyplot as plt  # after the backend is chosen

    print(f"Nature CNN, milliseconds; {machine()}\n")
    figure, panels = plt.subplots(1, len(AXES), figsize=(4 * len(AXES), 3.6), layout="constrained")
    for panel, (axis, (make, points)) in zip(panels, AXES.items(), strict=True):
        curves: Curves = {}
        for point in points:
            for name, seconds in medians(make(point), ROUNDS).items():
                curves.setdefault(name, []).append(1e3 * seconds)
        print(
            table([axis, *curves], [[str(p), *(f"{c[i]:.2f}" for c in curves.values())] for i, p in enumerate(points)])
        )
        print(flush=True)
        for name, values in curves.items():
            panel.plot(points, values, marker="o", label=name)
        panel.set(xlabel=axis, ylabel="milliseconds", ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(f"Nature CNN; {machine()}", fontsize="small")
    figure.savefig(args.figure, dpi=80)


if __name__ == "__main__":
    main()
