"""Q-values as preferences: labels and a last layer by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_util import make_vec_env

from snn_rl.rl import Teacher, teacher_of
from snn_rl.rl.heads import QValues
from snn_rl.rl.preferences import LIMIT, Preferences, as_preferences


def dqn() -> DQN:
    return DQN("MlpPolicy", "MountainCar-v0", policy_kwargs={"net_arch": [32]}, device="cpu", seed=0, buffer_size=10)


def test_labels_by_hand() -> None:
    model = dqn()
    # gaps between the best two: 1, 2, 4; between best and worst: 4, 6, 20
    samples = np.array([[0.0, 4.0, 3.0], [6.0, 0.0, 4.0], [0.0, 20.0, 16.0]])
    teacher = Preferences(teacher_of(model), samples)
    assert teacher.temperature == 1.0
    assert teacher.unit == 3.0
    obs = np.array([[-0.5, 0.01], [0.3, -0.02]], dtype=np.float32)
    with torch.no_grad():
        q_values = model.q_net(torch.as_tensor(obs)).numpy()
    labels, _ = teacher.label(obs)
    np.testing.assert_allclose(labels, q_values - q_values.max(1, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(teacher.predict(obs)[0], model.predict(obs, deterministic=True)[0])
    assert teacher.actor is not None
    with torch.no_grad():
        out = teacher.actor.network(torch.as_tensor(obs)).numpy()
    np.testing.assert_allclose(out, (q_values - q_values.mean(1, keepdims=True)) / 3.0, atol=1e-6)
    with torch.no_grad():  # the DQN itself is as it was
        np.testing.assert_array_equal(model.q_net(torch.as_tensor(obs)).numpy(), q_values)


def test_labels_stay_in_what_a_softmax_can_tell() -> None:
    teacher = Preferences(teacher_of(dqn()), np.zeros((4, 3)))  # no gap at all
    labels, _ = teacher.label(np.zeros((1, 2), dtype=np.float32))
    assert labels.min() == -LIMIT
    assert labels.max() == 0


class Fixed(Teacher):
    """Says the same Q-values everywhere."""

    def __init__(self, q_values: list[float]) -> None:
        self.q_values = np.array([q_values], dtype=np.float32)
        self.action_space = spaces.Discrete(len(q_values))
        self.observation_space = spaces.Box(-1, 1, (1,))
        self.head = QValues(self.action_space)

    def label(self, observation: Any, state: Any = None, episode_start: Any = None) -> tuple[np.ndarray, Any]:
        return self.q_values, None


def test_a_very_bad_action_hides_no_choice_between_good_ones() -> None:
    teacher = Preferences(Fixed([-1000.0, 19.99, 20.0]), np.array([[0.0, 19.99, 20.0]]))
    labels, _ = teacher.label(np.zeros((1, 1), dtype=np.float32))
    assert labels.argmax() == 2
    np.testing.assert_allclose(labels[0, 1:], [-2.0, 0.0], atol=1e-3)  # 0.01 behind, at a temperature of 0.005


def test_only_q_values_become_preferences() -> None:
    env = make_vec_env("CartPole-v1", 2)
    ppo = teacher_of(PPO("MlpPolicy", env, device="cpu"))
    assert as_preferences(ppo, env) is ppo
    with pytest.raises(ValueError, match="only Q-values become preferences, and the teacher has Logits"):
        Preferences(ppo, np.zeros((2, 2)))
    played_in = make_vec_env("MountainCar-v0", 2, seed=0)
    assert isinstance(as_preferences(teacher_of(dqn()), played_in, 20), Preferences)
