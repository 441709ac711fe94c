"""Play full episodes with a greedy agent: returns, and what its network did meanwhile."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from stable_baselines3 import DQN
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, is_vecenv_wrapped

from snn_rl.activity import Activity, SpikeCounter, activity, count_spikes
from snn_rl.network import SpikingNetwork
from snn_rl.policy_file import LoadedPolicy


@dataclass(frozen=True)
class Evaluation:
    """Returns of full episodes, and the activity of a spiking network while it played them (None for an ANN)."""

    returns: list[float]
    lengths: list[int]
    activity: Activity | None

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """Population standard deviation over the episodes."""
        return float(np.std(self.returns))

    def as_dict(self, protocol: str) -> dict[str, Any]:
        return {
            "returns": self.returns,
            "mean": self.mean,
            "std": self.std,
            "episodes": len(self.returns),
            "protocol": protocol,
        }


def spiking_network(agent: DQN | LoadedPolicy) -> SpikingNetwork | None:
    """The agent's spiking network, or None where it is an ANN."""
    network = getattr(agent.policy.q_net, "network", None)
    return network if isinstance(network, SpikingNetwork) else None


def evaluate(agent: DQN | LoadedPolicy, env: VecEnv, episodes: int) -> Evaluation:
    """Play ``episodes`` greedy episodes, spread evenly over the environments of ``env``.

    Raises:
        ValueError: no episode asked for, spaces that are not the agent's, or environments without a monitor.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be >= 1, got {episodes}")
    for name in ("observation_space", "action_space"):
        ours, theirs = getattr(agent, name), getattr(env, name)
        if ours != theirs:
            raise ValueError(
                f"the agent's {name} is {ours}, the environment's {theirs}; evaluate it where it was trained"
            )
    if not (is_vecenv_wrapped(env, VecMonitor) or env.env_is_wrapped(Monitor)[0]):
        raise ValueError("the environments must be monitored: wrap them in VecMonitor, which counts their returns")
    network = spiking_network(agent)
    with count_spikes(network) if network is not None else nullcontext() as counter:
        returns, lengths = _play(agent, env, episodes, counter)
    measured = None
    if network is not None and counter is not None:
        shape = agent.observation_space.shape or ()
        persistent = bool(agent.policy.q_net.persistent)
        measured = activity(network, counter.rates(), shape, persistent=persistent)
    return Evaluation(returns, lengths, measured)


def _play(
    agent: DQN | LoadedPolicy, env: VecEnv, episodes: int, counter: SpikeCounter | None
) -> tuple[list[float], list[int]]:
    """Returns and lengths, as SB3's ``evaluate_policy`` finds them; the spikes of these episodes alone are counted.

    (SB3 goes on with an environment that has played its share, and clears its membranes at every frame.)
    """
    # a share for each environment: were the first to end taken, short games would be counted too often
    left = (episodes + np.arange(env.num_envs)) // env.num_envs
    returns: list[float] = []
    lengths: list[int] = []
    obs, state, episode_start = env.reset(), None, np.ones(env.num_envs, dtype=bool)
    while left.any():
        if counter is not None:
            counter.counted = left > 0
        actions, state = agent.predict(obs, state, episode_start, deterministic=True)  # type: ignore[arg-type]
        obs, _, episode_start, infos = env.step(actions)
        for i in np.flatnonzero(episode_start & (left > 0)):
            # The monitor's own count: rewards may be clipped, and an Atari wrapper may end an episode with a life.
            if "episode" in infos[i]:
                returns.append(float(infos[i]["episode"]["r"]))
                lengths.append(int(infos[i]["episode"]["l"]))
                left[i] -= 1
    return returns, lengths
