"""Observations of which a student sees a part, and a teacher that sees them whole."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from snn_rl import Student
from snn_rl.rl.views import PartialObservation, WholeObservationTeacher


def test_a_part_is_the_entries_of_the_whole() -> None:
    whole, partial = (
        make_vec_env("CartPole-v1", 2, seed=3),
        PartialObservation(make_vec_env("CartPole-v1", 2, seed=3), [2, 0]),
    )
    assert partial.observation_space.shape == (2,)
    seen, part = whole.reset(), partial.reset()
    ends = 0
    for _ in range(120):
        np.testing.assert_array_equal(part, seen[:, [2, 0]])
        np.testing.assert_array_equal(partial.whole, seen)
        actions = np.ones(2, dtype=np.int64)
        seen, _, _, infos = whole.step(actions)
        part, _, dones, infos_of_part = partial.step(actions)
        for i in np.flatnonzero(dones):
            last = infos[i]["terminal_observation"]
            np.testing.assert_array_equal(infos_of_part[i]["terminal_observation"], last[[2, 0]])
            ends += 1
    assert ends > 2


def test_the_teacher_labels_what_it_sees_whole() -> None:
    env = PartialObservation(make_vec_env("CartPole-v1", 2, seed=3), [0, 2])
    ppo = PPO("MlpPolicy", "CartPole-v1", device="cpu", seed=0)
    student = Student.fresh(WholeObservationTeacher(ppo, env), env, [8], device="cpu", seed=0)
    seen: list[np.ndarray] = []
    step_wait = env.step_wait

    def spy() -> Any:
        assert env.whole is not None
        seen.append(env.whole.copy())
        return step_wait()

    env.step_wait = spy  # type: ignore[method-assign]
    student.collect(student.teacher, 60)  # type: ignore[arg-type]
    replay = student.replay_buffer
    assert replay is not None
    for i in range(2):
        labelled = replay.labels[i][replay.labelled[i]]
        with torch.no_grad():
            logits = ppo.policy.get_distribution(
                torch.as_tensor(np.stack([whole[i] for whole in seen]))
            ).distribution.logits
        expected = logits - logits.logsumexp(-1, keepdim=True)
        ours = torch.as_tensor(labelled)
        torch.testing.assert_close(ours - ours.logsumexp(-1, keepdim=True), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("entries", [[], [4], [-1], [[0]]])
def test_entries_that_are_not_there(entries: list[int]) -> None:
    with pytest.raises(ValueError, match=r"entries must be indices from 0 to 3, got "):
        PartialObservation(make_vec_env("CartPole-v1", 1), entries)


def test_only_vectors_have_entries() -> None:
    with pytest.raises(ValueError, match=r"only vectors have entries to choose from, got Discrete\(16\)"):
        PartialObservation(make_vec_env("FrozenLake-v1", 1), [0])


def test_a_teacher_of_other_observations() -> None:
    env = PartialObservation(make_vec_env("CartPole-v1", 1), [0])
    other = PPO("MlpPolicy", gym.make("MountainCar-v0"), device="cpu")
    with pytest.raises(ValueError, match=r"the teacher sees Box\(.*\), the environment is Box\("):
        WholeObservationTeacher(other, env)
    teacher = WholeObservationTeacher(PPO("MlpPolicy", "CartPole-v1", device="cpu"), env)
    with pytest.raises(ValueError, match="not those that the teacher's environment gave out last"):
        teacher.label(np.zeros((1, 1), dtype=np.float32))
