"""Play full episodes with a greedy agent: returns, and what its network did meanwhile."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from stable_baselines3 import DQN
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from snn_rl.activity import Activity, activity, count_spikes
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
        ValueError: no episode asked for, or spaces that are not the agent's.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be >= 1, got {episodes}")
    for name in ("observation_space", "action_space"):
        ours, theirs = getattr(agent, name), getattr(env, name)
        if ours != theirs:
            raise ValueError(
                f"the agent's {name} is {ours}, the environment's {theirs}; evaluate it where it was trained"
            )
    network = spiking_network(agent)
    with count_spikes(network) if network is not None else nullcontext() as counter:
        returns, lengths = evaluate_policy(
            agent,
            env,
            n_eval_episodes=episodes,
            deterministic=True,
            return_episode_rewards=True,
        )
    measured = None
    if network is not None and counter is not None:
        shape = agent.observation_space.shape or ()
        persistent = bool(agent.policy.q_net.persistent)
        measured = activity(network, counter.rates(), shape, persistent=persistent)
    return Evaluation([float(r) for r in returns], [int(n) for n in lengths], measured)  # type: ignore[union-attr]
