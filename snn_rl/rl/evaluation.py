"""Play full episodes with a greedy agent: returns, and what its network did meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    VecEnv,
    VecMonitor,
    VecNormalize,
    is_vecenv_wrapped,
    unwrap_vec_normalize,
)

from snn_rl.base.limits import MAX_EPISODE_STEPS
from snn_rl.base.progress import bar
from snn_rl.core.activity import Activity, SpikeCounter, activity, count_spikes
from snn_rl.core.network import SpikingNetwork
from snn_rl.rl.environments import transposed
from snn_rl.rl.network import StatefulNetwork
from snn_rl.rl.policy import StatefulPolicy
from snn_rl.rl.policy_file import LoadedPolicy
from snn_rl.rl.teacher import Teacher, normalizes


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


Agent = BaseAlgorithm | LoadedPolicy | Teacher  # whoever can be evaluated


def stateful_network(agent: Agent) -> StatefulNetwork | None:
    """The network of an agent of this package, and None of any other."""
    policy = getattr(agent, "policy", None)
    return policy.net if isinstance(policy, StatefulPolicy) else None


def spiking_network(agent: Agent) -> SpikingNetwork | None:
    """The agent's spiking network, or None where it is an ANN."""
    net = stateful_network(agent)
    return net.network if net is not None and isinstance(net.network, SpikingNetwork) else None


def evaluate(
    agent: Agent,
    env: VecEnv,
    episodes: int,
    *,
    max_episode_steps: int = MAX_EPISODE_STEPS,
    progress_bar: bool = False,
) -> Evaluation:
    """Play ``episodes`` greedy episodes, spread evenly over the environments of ``env``.

    Images may be channels last, as SB3's ``evaluate_policy`` takes them. A ``VecNormalize`` in ``env`` must have the
    statistics that the agent was trained with, and no longer change them: SB3's ``sync_envs_normalization`` copies them
    from the agent's environment, and ``training = False`` keeps them. Of an agent that has no environment, such as one
    from a policy file, evaluation cannot tell with which statistics it was trained. ``progress_bar`` shows on stderr
    how many episodes have ended.

    Raises:
        ValueError: no episode asked for, spaces that are not the agent's, environments without a monitor, other
            statistics of observations than the agent's, or an episode that has not ended after ``max_episode_steps``.
    """
    for name, value in (("episodes", episodes), ("max_episode_steps", max_episode_steps)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if agent.observation_space != env.observation_space:
        env = transposed(env)
    for name in ("observation_space", "action_space"):
        ours, theirs = getattr(agent, name), getattr(env, name)
        if ours != theirs:
            raise ValueError(
                f"the agent's {name} is {ours}, the environment's {theirs}; evaluate it where it was trained"
            )
    if not is_monitored(env):
        raise ValueError("the environments must be monitored: wrap them in VecMonitor, which counts their returns")
    _check_statistics(agent, env)
    network = spiking_network(agent)
    with (
        count_spikes(network) if network is not None else nullcontext() as counter,
        bar(progress_bar, "evaluation", episodes, "episode") as tick,
    ):
        returns, lengths = _play(agent, env, episodes, counter, max_episode_steps, tick)
    measured = None
    if network is not None and counter is not None:
        net = stateful_network(agent)
        assert net is not None
        measured = activity(network, counter.rates(), _input_shape(net), persistent=net.persistent)
    return Evaluation(returns, lengths, measured)


def _input_shape(net: StatefulNetwork) -> tuple[int, ...]:
    """Of one observation as the network takes it: a discrete one is one-hot."""
    space = net.observation_space
    zeros = _zeros(space) if not isinstance(space, spaces.Dict) else {k: _zeros(p) for k, p in space.spaces.items()}
    return tuple(net.preprocess(net.as_tensor(zeros)).shape[1:])


def _zeros(space: spaces.Space) -> np.ndarray:
    """A batch of one observation of zeros."""
    return np.zeros((1, *(space.shape or ())), space.dtype)


def is_monitored(env: VecEnv) -> bool:
    """Whether a monitor counts the returns of all environments in ``env``."""
    return is_vecenv_wrapped(env, VecMonitor) or all(env.env_is_wrapped(Monitor))


def _check_statistics(agent: Agent, env: VecEnv) -> None:
    """Raises ValueError where ``env`` normalizes by other statistics than the agent was trained with."""
    ours = unwrap_vec_normalize(env)
    if ours is not None and ours.norm_reward and _is_above(VecMonitor, ours, env):
        raise ValueError(
            "VecMonitor would count normalized rewards: put it inside VecNormalize, around the environments"
        )
    if normalizes(agent) and ours is not None and ours.norm_obs:
        raise ValueError(
            "the agent normalizes its observations itself, by the statistics in its policy; leave VecNormalize out of "
            "the environment"
        )
    trained_in = agent.get_env() if isinstance(agent, BaseAlgorithm) else None
    if trained_in is not None:
        theirs = _statistics(unwrap_vec_normalize(trained_in))
        if theirs is None and _statistics(ours) is not None:
            raise ValueError(
                "the agent was trained on observations as they are; leave VecNormalize out of the environment"
            )
        if _statistics(ours) != theirs:
            raise ValueError(
                "the agent was trained on normalized observations; wrap the environment in a VecNormalize of the same "
                "options and copy the statistics: SB3's sync_envs_normalization(agent.get_env(), env)"
            )
    elif ours is not None and ours.norm_obs and is_fresh(ours):
        raise ValueError(
            "the environment's VecNormalize has no statistics yet; copy those that the agent was trained with"
        )
    if ours is not None and ours.training:
        raise ValueError(
            "the environment's VecNormalize would change its statistics while it evaluates; set its training = False"
        )


def is_fresh(normalize: VecNormalize) -> bool:
    """Whether it has no statistics of observations yet."""
    rms = normalize.obs_rms
    return any(r.count < 1 for r in (rms.values() if isinstance(rms, dict) else [rms]))


def _statistics(normalize: VecNormalize | None) -> Any:
    """What ``normalize`` does to an observation, in a form that can be compared; None where it does nothing."""
    if normalize is None or not normalize.norm_obs:
        return None
    rms = normalize.obs_rms if isinstance(normalize.obs_rms, dict) else {"": normalize.obs_rms}
    return normalize.clip_obs, normalize.epsilon, {key: (r.mean.tolist(), r.var.tolist()) for key, r in rms.items()}


def _is_above(wrapper: type[VecEnv], inner: VecEnv, env: VecEnv) -> bool:
    """Whether ``env`` has a ``wrapper`` around ``inner``."""
    while env is not inner:
        if isinstance(env, wrapper):
            return True
        env = env.venv  # type: ignore[attr-defined]
    return False


def _play(
    agent: Agent,
    env: VecEnv,
    episodes: int,
    counter: SpikeCounter | None,
    max_episode_steps: int,
    tick: Callable[[int], object],
) -> tuple[list[float], list[int]]:
    """Returns and lengths, as SB3's ``evaluate_policy`` finds them; the spikes of these episodes alone are counted.

    (SB3 goes on with an environment that has played its share, and clears its membranes at every frame.)
    """
    # a share for each environment: were the first to end taken, short games would be counted too often
    left = (episodes + np.arange(env.num_envs)) // env.num_envs
    steps = np.zeros(env.num_envs, dtype=np.int64)  # of the episode that runs
    returns: list[float] = []
    lengths: list[int] = []
    obs, state, episode_start = env.reset(), None, np.ones(env.num_envs, dtype=bool)
    while left.any():
        if counter is not None:
            counter.counted = left > 0
        actions, state = agent.predict(obs, state, episode_start, deterministic=True)  # type: ignore[arg-type]
        obs, _, episode_start, infos = env.step(actions)
        steps += 1
        for i in np.flatnonzero(episode_start & (left > 0)):
            # The monitor's own count: rewards may be clipped, and an Atari wrapper may end an episode with a life.
            if "episode" in infos[i]:
                returns.append(float(infos[i]["episode"]["r"]))
                lengths.append(int(infos[i]["episode"]["l"]))
                left[i] -= 1
                steps[i] = 0
                tick(1)
        if (steps[left > 0] >= max_episode_steps).any():
            raise ValueError(
                f"an episode has not ended after {max_episode_steps:,} steps; wrap the environment in "
                "gymnasium.wrappers.TimeLimit, or raise max_episode_steps"
            )
    return returns, lengths
