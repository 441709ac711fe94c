"""Teachers: agents that label what a student plays. A `Player` only plays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import maybe_transpose, preprocess_obs
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.dqn.policies import DQNPolicy
from torch import nn

from snn_rl.rl.actor import Actor, actor_of, is_recurrent, recurrent_actor_of
from snn_rl.rl.heads import Head, head_of
from snn_rl.rl.policy import AgentPolicy, StatefulPolicy
from snn_rl.rl.replay import stacking_axis
from snn_rl.rl.spaces import UnsupportedSpaceError, channels_first, in_one_line
from snn_rl.rl.statistics import Statistics

Observations = np.ndarray | dict[str, np.ndarray]  # (n_envs, ...), or those of each key of a Dict space


class Player(Protocol):
    """Whatever has the ``predict`` of SB3's algorithms: these, a `LoadedPolicy`, a `Teacher`, or your own."""

    def predict(
        self,
        observation: Observations,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        """Actions (n_envs,) for observations (n_envs, ...), and the state that the next call gets, of any type."""
        ...


class Teacher(ABC):
    """An agent that says what its network's outputs are where a student plays.

    It sees every observation of the student's play in order, so that a teacher with a memory labels with its own.
    """

    observation_space: spaces.Space
    action_space: spaces.Space
    head: Head
    exploration_rate: float = 0.0  # share of random actions where this teacher plays itself
    actor: Actor | None = None  # its layers, where it has no memory: `Student.from_ann` converts them
    statistics: Statistics | None = None  # its observations are normalised by these

    @property
    def normalizes(self) -> bool:
        """Whether it takes observations as the environment gives them, and normalises them itself."""
        return self.statistics is not None

    @abstractmethod
    def label(
        self, observation: Observations, state: Any = None, episode_start: np.ndarray | None = None
    ) -> tuple[np.ndarray, Any]:
        """Outputs (n_envs, head.size), as its ``head`` reads them, and the state that the next call gets.

        ``episode_start`` (n_envs,) is True where an episode begins with this observation.
        """

    def predict(
        self,
        observation: Observations,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """Greedy actions (n_envs, ...) and the state that the next call gets."""
        labels, state = self.label(observation, state, episode_start)
        return self.head.actions(labels), state


class PolicyTeacher(Teacher):
    """A policy of SB3 or sb3-contrib without memory, by the layers of its `Actor`.

    A DQN with a Q-network of its own (dueling, masked) labels by that network's own ``forward``; it has no actor.

    ``statistics`` are those that its observations were normalised by in training; None where they were not.
    """

    def __init__(self, policy: BasePolicy, statistics: Statistics | None = None) -> None:
        self.policy, self.statistics = policy, statistics
        self.observation_space, self.action_space = policy.observation_space, policy.action_space
        try:
            self.actor = actor_of(policy)
            self.head = self.actor.head
        except UnsupportedSpaceError:
            raise
        except ValueError:
            own = ("forward", "predict", "_predict", "obs_to_tensor")
            if not isinstance(policy, DQNPolicy) or any(
                getattr(type(policy), name) is not getattr(DQNPolicy, name) or name in vars(policy) for name in own
            ):
                raise  # a policy that masks actions, say: its Q-values alone would choose others
            self.head = head_of("values", policy.action_space)

    def label(
        self, observation: Observations, state: Any = None, episode_start: np.ndarray | None = None
    ) -> tuple[np.ndarray, Any]:
        if self.statistics is not None:
            observation = self.statistics.normalize(observation)
        obs = obs_as_tensor(observation, self.policy.device)
        with torch.no_grad():
            if self.actor is None:
                self.policy.set_training_mode(False)  # as it was evaluated: a loaded agent is in training mode
                out = self.policy.q_net(obs)  # type: ignore[operator]
            else:
                normalize = self.actor.normalize_images
                out = self.actor.network(preprocess_obs(obs, self.observation_space, normalize_images=normalize))
        return out.cpu().numpy(), None


class RecurrentTeacher(Teacher):
    """A RecurrentPPO, with the state of its own LSTM."""

    def __init__(self, policy: BasePolicy, statistics: Statistics | None = None) -> None:
        self.recurrent, self.statistics = recurrent_actor_of(policy), statistics
        self.head = self.recurrent.head
        self.observation_space, self.action_space = policy.observation_space, policy.action_space

    def label(
        self, observation: Observations, state: Any = None, episode_start: np.ndarray | None = None
    ) -> tuple[np.ndarray, Any]:
        if self.statistics is not None:
            observation = self.statistics.normalize(observation)
        return self.recurrent.label(observation, state, episode_start)


class StatefulTeacher(Teacher):
    """A spiking agent, with its membranes, or the ANN of a policy file.

    ``statistics`` are those that its observations were normalised by outside its policy, in a ``VecNormalize``.
    """

    def __init__(self, policy: StatefulPolicy, statistics: Statistics | None = None) -> None:
        self.policy, self.head, self._outside = policy, policy.head, statistics
        self.observation_space, self.action_space = policy.observation_space, policy.action_space
        self.statistics = policy.statistics if isinstance(policy, AgentPolicy) else statistics
        if isinstance(policy, AgentPolicy) and isinstance(policy.net.network, nn.Sequential):
            self.actor = Actor(
                policy.net.network,
                policy.head,
                policy.features_extractor_class,
                policy.features_extractor_kwargs,
                policy.normalize_images,
            )

    @property
    def normalizes(self) -> bool:
        return self.policy.net.normalizer is not None or self._outside is not None

    def label(
        self, observation: Observations, state: Any = None, episode_start: np.ndarray | None = None
    ) -> tuple[np.ndarray, Any]:
        if self._outside is not None:
            observation = self._outside.normalize(observation)
        out, state, _ = self.policy.outputs(observation, state, episode_start)
        return out, state


def frames_of(stacked: spaces.Space, single: spaces.Space) -> int | None:
    """How many observations of ``single`` one of ``stacked`` holds along its stacking axis; None where it does not.

    Images are compared with their channels first, as SB3's algorithms see them.
    """
    stacked, single = channels_first(stacked), channels_first(single)
    if not (isinstance(stacked, spaces.Box) and isinstance(single, spaces.Box)) or stacked.dtype != single.dtype:
        return None
    if len(stacked.shape) != len(single.shape) or 0 in single.shape or not single.shape:
        return None
    axis = stacking_axis(stacked.shape)
    if stacked.shape[axis] % single.shape[axis]:
        return None
    frames = stacked.shape[axis] // single.shape[axis]
    # the bounds as SB3 declares them, which repeats each entry instead of the whole frame
    low, high = (np.repeat(bound, frames, axis) for bound in (single.low, single.high))
    return frames if np.array_equal(low, stacked.low) and np.array_equal(high, stacked.high) else None


class StackedTeacher(Teacher):
    """A teacher on stacked frames, put into an environment that shows one frame at a time.

    It keeps the stack that its student has to remember. An episode begins with a stack of zeros, as SB3's
    ``VecFrameStack`` begins it. ``observation_space`` is the environment's or the student's: images whose channels are
    last are transposed, as SB3's algorithms do.

    Raises:
        ValueError: a teacher that `teacher_of` refuses, or ``observation_space`` is not one frame of its own.
    """

    def __init__(self, teacher: object, observation_space: spaces.Space) -> None:
        self.teacher = _unstacked(teacher)
        whole = self.teacher.observation_space
        frames = frames_of(whole, observation_space)
        if frames is None:
            single, stacked = in_one_line(observation_space), in_one_line(whole)
            raise ValueError(f"{single} is not one frame of the teacher's {stacked}")
        assert whole.shape is not None
        self.frames, self.shape, self.axis = frames, whole.shape, stacking_axis(whole.shape)
        self.head, self.action_space = self.teacher.head, self.teacher.action_space
        self.observation_space = channels_first(observation_space)
        self.exploration_rate = self.teacher.exploration_rate

    @property
    def normalizes(self) -> bool:
        return self.teacher.normalizes

    def label(
        self, observation: Observations, state: Any = None, episode_start: np.ndarray | None = None
    ) -> tuple[np.ndarray, Any]:
        """As `Teacher.label`, for single frames. The state holds the stack that the frames have been pushed onto.

        Raises:
            ValueError: observations that are no batch of single frames.
        """
        assert isinstance(observation, np.ndarray)
        shape, observation = observation.shape, maybe_transpose(observation, self.observation_space)
        if observation.shape[1:] != self.observation_space.shape:
            wanted = ", ".join(map(str, ("n_envs", *(self.observation_space.shape or ()))))
            raise ValueError(f"observations must have shape ({wanted}), got {shape}")
        n = len(observation)
        stack, inner = (np.zeros((n, *self.shape), observation.dtype), None) if state is None else state
        if episode_start is not None and state is not None:
            starts = np.asarray(episode_start, dtype=bool).reshape(-1, *[1] * len(self.shape))
            stack = np.where(starts, np.zeros((), stack.dtype), stack)
        older = np.split(stack, self.frames, axis=self.axis + 1)[1:]
        stack = np.concatenate([*older, observation], axis=self.axis + 1)
        labels, inner = self.teacher.label(stack, inner, episode_start)
        return labels, (stack, inner)


def teacher_of(agent: object, observation_space: spaces.Space | None = None) -> Teacher:
    """A `Teacher` of whatever can be one: a teacher itself, an agent or a policy of SB3, sb3-contrib or this package.

    Where ``observation_space`` is one frame of a stack that the agent sees, the teacher stacks the frames itself. An
    agent that was trained in a ``VecNormalize`` is given the statistics of that.

    Raises:
        ValueError: something else, or a policy that `actor_of` refuses.
    """
    teacher = _unstacked(agent)
    space = teacher.observation_space
    if observation_space is not None and space != observation_space:
        frames = frames_of(space, observation_space)
        if frames is not None and frames > 1:
            return StackedTeacher(teacher, observation_space)
    return teacher


def _unstacked(agent: object) -> Teacher:
    if isinstance(agent, Teacher):
        return agent
    policy = agent if isinstance(agent, BasePolicy) else getattr(agent, "policy", None)
    if isinstance(policy, StatefulPolicy):
        teacher: Teacher = StatefulTeacher(policy, statistics_of(agent))
    elif isinstance(policy, BasePolicy):
        kind = RecurrentTeacher if is_recurrent(policy) else PolicyTeacher
        teacher = kind(policy, statistics_of(agent))
    else:
        raise ValueError(
            "a teacher must be an agent or a policy of stable-baselines3, sb3-contrib or snn_rl, or a "
            f"snn_rl.rl.Teacher, got {named(agent)}"
        )
    teacher.exploration_rate = float(getattr(agent, "exploration_rate", 0.0))
    return teacher


def normalizes(agent: object) -> bool:
    """Whether an agent takes observations as the environment gives them, and normalises them itself."""
    if isinstance(agent, Teacher):
        return agent.normalizes
    policy = getattr(agent, "policy", None)
    return isinstance(policy, StatefulPolicy) and policy.net.normalizer is not None


def statistics_of(agent: object) -> Statistics | None:
    """The statistics that an agent's observations are normalised by outside its policy; None where they are not."""
    given = getattr(agent, "statistics", None)
    if isinstance(given, Statistics):
        return given
    normalize: VecNormalize | None = agent.get_vec_normalize_env() if isinstance(agent, BaseAlgorithm) else None
    return None if normalize is None or not normalize.norm_obs else Statistics.of(normalize)


def named(value: object) -> str:
    """What ``value`` is, in words, for an error."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return "None" if value is None else f"a {type(value).__name__}"
