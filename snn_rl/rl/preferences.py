"""A teacher with Q-values as one that says which actions it prefers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from snn_rl.rl.actor import Actor
from snn_rl.rl.heads import Logits, QValues
from snn_rl.rl.teacher import Observations, Teacher

TEMPERATURE = 0.5  # in median gaps between the best action and the second best
LIMIT = 30.0  # of a label: beyond it a softmax in single precision says the same


class Preferences(Teacher):
    """A teacher whose labels are logits: its Q-values less the best of them, divided by a temperature.

    Policy distillation takes a low temperature for Q-values (Rusu et al. 2016), for what they differ by between actions
    is often a thousandth of their size. Here it is half the median gap between the best action and the second best. A
    spread of all actions would not do: one bad action among them, and the choice between the good ones has no gradient.

    Its `actor` is the teacher's with a last layer that yields such logits, in units of half the median spread between
    the best and the worst action. That is a start without extremes.

    Args:
        teacher: one whose head is `QValues`.
        q_values: (samples, actions), of its play.

    Raises:
        ValueError: a teacher without Q-values, or fewer than two actions.
    """

    def __init__(self, teacher: Teacher, q_values: np.ndarray) -> None:
        space = teacher.action_space
        if not isinstance(teacher.head, QValues) or not isinstance(space, spaces.Discrete):
            raise ValueError(f"only Q-values become preferences, and the teacher has {type(teacher.head).__name__}")
        if space.n < 2:
            raise ValueError(f"there must be two actions to choose from, got {space}")
        ordered = np.sort(q_values.astype(np.float64), axis=1)
        self.temperature = _scale(ordered[:, -1] - ordered[:, -2])
        self.unit = _scale(ordered[:, -1] - ordered[:, 0])
        self.teacher, self.head = teacher, Logits(space)
        self.observation_space, self.action_space = teacher.observation_space, space
        self.exploration_rate, self.statistics = teacher.exploration_rate, teacher.statistics
        self.actor = None if teacher.actor is None else self._actor(teacher.actor)

    def label(
        self, observation: Observations, state: Any = None, episode_start: np.ndarray | None = None
    ) -> tuple[np.ndarray, Any]:
        q_values, state = self.teacher.label(observation, state, episode_start)
        behind = q_values - q_values.max(axis=1, keepdims=True)  # the best is at 0, so that no limit hides which it is
        return np.clip(behind / self.temperature, -LIMIT, 0.0).astype(np.float32), state

    def _actor(self, actor: Actor) -> Actor:
        network = copy.deepcopy(actor.network)
        last = network.get_submodule("mlp")[-1]  # type: ignore[index]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            for parameter in last.parameters():
                parameter.sub_(parameter.mean(0, keepdim=True)).div_(self.unit)
        kwargs = actor.features_extractor_kwargs
        return Actor(network, self.head, actor.features_extractor_class, kwargs, actor.normalize_images)


def _scale(differences: np.ndarray) -> float:
    """The temperature of differences between Q-values."""
    return TEMPERATURE * max(float(np.median(differences)), float(np.finfo(np.float32).tiny))


def as_preferences(teacher: Teacher, env: VecEnv, steps: int = 2_000) -> Teacher:
    """``teacher`` as `Preferences`, where it has Q-values, by ``steps`` of its play in ``env``."""
    if not isinstance(teacher.head, QValues):
        return teacher
    obs, state, starts = env.reset(), None, np.ones(env.num_envs, dtype=bool)
    labels = []
    for _ in range(-(-steps // env.num_envs)):
        assert isinstance(obs, np.ndarray | dict)
        q_values, state = teacher.label(obs, state, starts)
        labels.append(q_values)
        obs, _, starts, _ = env.step(teacher.head.actions(q_values))
    return Preferences(teacher, np.concatenate(labels))
