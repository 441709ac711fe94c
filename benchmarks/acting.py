"""Latency of one `predict` for one environment: SB3's DQN against the spiking agents, in torch and in ONNX Runtime.

python benchmarks/acting.py
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import onnxruntime
import torch
from gymnasium import spaces
from measure import machine, table
from stable_baselines3 import DQN

from snn_rl import SpikingDQN, count_spikes
from snn_rl.share import write_onnx

RATE = 0.1  # spikes per neuron and micro-step; a trained Pong agent has 0.11 at T5 and 0.09 at T1 (docs/results.md)


class Frames(gym.Env[np.ndarray, int]):
    """Stacks of four 84 x 84 frames of noise: how long a policy takes does not depend on the game."""

    observation_space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = spaces.Discrete(6)  # type: ignore[assignment]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:  # type: ignore[type-arg]
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:  # type: ignore[type-arg]
        return self.observation_space.sample(), 0.0, False, False, {}


def spiking_agent(policy: str, env: gym.Env[Any, Any], timesteps: int, **common: Any) -> SpikingDQN:
    """An untrained agent whose layers fire as those of trained ones do: each neuron at `RATE` of the micro-steps.

    Untrained layers fall silent one after the other, and silence costs nothing where acting follows the spikes.
    """
    agent = SpikingDQN(policy, env, policy_kwargs={"timesteps": timesteps}, **common)
    network = agent.q_net.network
    env.observation_space.seed(1)
    observations = torch.as_tensor(np.stack([env.observation_space.sample() for _ in range(16)]))
    for name, lif in network.lif_layers.items():  # in order: the later ones see what the earlier ones now do
        low, high = 1e-6, 1e3
        for _ in range(40):
            lif.raw_threshold.data.fill_((low * high) ** 0.5)
            with count_spikes(network) as counter, torch.no_grad():
                state = None
                for _ in range(3):  # frames, until membranes are those of play
                    _, state = agent.q_net(observations.to(network.device), state)
            too_many = counter.rates()[name] / timesteps > RATE
            low, high = (lif.threshold.item(), high) if too_many else (low, lif.threshold.item())
    return agent


class InOnnxRuntime:
    """An agent's exported frame, called as the agent is."""

    def __init__(self, agent: SpikingDQN, observation: np.ndarray, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or its threads hold up the others
        with tempfile.TemporaryDirectory() as folder:
            write_onnx(
                agent.q_net.network,
                torch.as_tensor(observation[None]),
                Path(folder, "agent.onnx"),
                images=observation.ndim == 3,
            )
            self.model = onnxruntime.InferenceSession(Path(folder, "agent.onnx"), options)
        self.names = [i.name for i in self.model.get_inputs()]
        self.silence = [np.zeros((1, *i.shape[1:]), dtype=np.float32) for i in self.model.get_inputs()[1:]]

    def predict(
        self, observation: np.ndarray, state: list[np.ndarray] | None, deterministic: bool
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        carries = self.silence if state is None else state
        q_values, *carries = self.model.run(None, dict(zip(self.names, [observation[None], *carries], strict=True)))
        return q_values.argmax(1), carries


def latencies(policy: str, env: gym.Env[Any, Any], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of a call. The agents take turns, so that a slow spell of the machine meets them all."""
    common: dict[str, Any] = {"buffer_size": 100, "seed": 0, "device": device}
    agents: dict[str, Any] = {"SB3's DQN": DQN(policy, env, **common)}
    for timesteps in range(1, 6):
        agents[f"T{timesteps}"] = agent = spiking_agent(policy, env, timesteps, **common)
        if timesteps in (1, 5):
            agents[f"T{timesteps}, ONNX"] = InOnnxRuntime(
                agent, env.observation_space.sample(), torch.get_num_threads()
            )
    states: dict[str, Any] = dict.fromkeys(agents)
    seconds: dict[str, list[float]] = {name: [] for name in agents}
    env.observation_space.seed(0)
    for _ in range(rounds):
        observation = env.observation_space.sample()
        for name, agent in agents.items():
            start = time.perf_counter()
            _, states[name] = agent.predict(observation, states[name], deterministic=True)
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values[rounds // 10 :])) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{machine(args.device)}; {RATE} spikes per neuron and micro-step\n")
    rows = []
    for name, policy, env in (
        ("Nature CNN, 4 x 84 x 84", "CnnPolicy", Frames()),
        ("two layers of 64, CartPole", "MlpPolicy", gym.make("CartPole-v1")),
    ):
        seconds = latencies(policy, env, args.rounds, args.device)
        base = seconds["SB3's DQN"]
        rows.append([name, *(f"{1e6 * s:.0f} ({s / base:.2f})" for s in seconds.values())])
    print(table(["microseconds (over SB3's)", *seconds], rows))


if __name__ == "__main__":
    main()
