"""Environment steps per second while learning Pong (84 x 84, Nature CNN), and bytes of replay per transition.

    python benchmarks/agents.py

stable-baselines3's own DQN on its own Atari wrappers against the ANN stage and the spiking stages of this package, all
with 8 environments and one update on 32 frames per 4 steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import machine, table
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # agents and envs are not part of the installed package

from agents import RECIPES
from envs.atari import make_atari
from snn_rl import SpikingDQN
from snn_rl.rl import SequenceReplayBuffer
from snn_rl.runs._run import Run
from snn_rl.runs.ann import new_ann
from snn_rl.runs.stages import Stage

ENVS = 8


class Clock(BaseCallback):
    """Seconds between two numbers of environment steps."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.seconds = 0.0

    def _on_step(self) -> bool:
        if self.num_timesteps <= self.first:
            self.started = time.perf_counter()
        self.seconds = time.perf_counter() - self.started
        return self.num_timesteps < self.last


def sb3(device: str) -> DQN:
    env = VecFrameStack(make_atari_env("ALE/Pong-v5", ENVS, seed=0, env_kwargs={"frameskip": 1}), 4)
    return DQN("CnnPolicy", env, **common(device), batch_size=32)


def ann_stage(device: str) -> DQN:
    ann = dataclasses.replace(
        RECIPES["pong"].ann, env_steps=100_000, exploration_steps=1_000, buffer_size=20_000, learning_starts=500,
        train_every=32, gradient_steps=8, batch_size=32, n_steps=1,
    )  # fmt: skip
    run = Run(dataclasses.replace(RECIPES["pong"], ann=ann), Path(), 0, device)
    return new_ann(run, run.env(Stage(None, None), ENVS, 0))


def spiking(timesteps: int) -> Callable[[str], DQN]:
    def make(device: str) -> DQN:
        env = make_atari("pong", ENVS, image_size=84, frame_stack=4, seed=0)
        windows = {"batch_size": 8, "burn_in": 0, "sequence_length": 4}  # 32 frames
        network = {"timesteps": timesteps, "optimizer_kwargs": {"fused": True}}
        return SpikingDQN("CnnPolicy", env, **common(device), **windows, policy_kwargs=network)

    return make


def common(device: str) -> dict:  # type: ignore[type-arg]
    return {
        "learning_rate": 1e-4, "buffer_size": 20_000, "learning_starts": 500, "train_freq": 4, "gradient_steps": 8,
        "exploration_fraction": 0.01, "exploration_final_eps": 0.01, "seed": 0, "device": device,
    }  # fmt: skip


def bytes_per_transition(model: DQN) -> float:
    buffer = model.replay_buffer
    assert isinstance(buffer, ReplayBuffer)
    arrays = [x for x in vars(buffer).values() if isinstance(x, np.ndarray) and x.ndim > 1 and x.shape[0] != ENVS]
    if isinstance(buffer, SequenceReplayBuffer):
        arrays = [x for x in vars(buffer).values() if isinstance(x, np.ndarray) and x.shape[:1] == (ENVS,)]
    return sum(x.nbytes for x in arrays) / (buffer.buffer_size * ENVS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine(args.device) + "\n")
    cases = {"SB3 DQN, SB3's wrappers": sb3, "ANN stage": ann_stage, "T1 stage": spiking(1), "T5 stage": spiking(5)}
    rates: dict[str, list[float]] = {name: [] for name in cases}
    memory = {}
    for _ in range(3):
        for name, make in cases.items():
            model = make(args.device)
            clock = Clock(1_000, 1_000 + args.steps)
            model.learn(2_000 + args.steps, callback=clock)
            rates[name].append(args.steps / clock.seconds)
            memory[name] = bytes_per_transition(model)
            assert isinstance(model.env, VecEnv)
            model.env.close()
    base = cases and next(iter(cases))
    rows = []
    for name in cases:
        rate, reference = float(np.median(rates[name])), float(np.median(rates[base]))
        rows.append([name, f"{rate:.0f}", f"{rate / reference:.2f}", f"{memory[name]:.0f}"])
        rows[-1].append(f"1/{memory[base] / memory[name]:.1f}")
    print(table(["", "env steps/s", "over SB3", "replay bytes per transition", "of SB3's"], rows))


if __name__ == "__main__":
    main()
