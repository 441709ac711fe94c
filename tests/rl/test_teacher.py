"""The stacked teacher against SB3's own ``VecFrameStack``, step by step, and what it teaches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecFrameStack
from torch import nn

from envs.classic import make_cartpole
from snn_rl import SpikingDQN
from snn_rl.rl.teacher import StackedTeacher, frames_of, teacher_of

FRAMES = 3


@pytest.fixture(scope="module")
def ann() -> DQN:
    """Untrained, with a network small enough that its actions differ from state to state."""
    env = make_cartpole(2, seed=0, velocities=False, frame_stack=FRAMES)
    return DQN("MlpPolicy", env, policy_kwargs={"net_arch": [16]}, buffer_size=10, seed=1, device="cpu")


def play(steps: int = 120) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same random play seen one frame at a time and through SB3's stack, (steps, 2, ...), and episode starts."""
    single, stacked = (make_cartpole(2, seed=5, velocities=False, frame_stack=k) for k in (1, FRAMES))
    assert isinstance(stacked, VecFrameStack)
    rng, start = np.random.default_rng(0), np.ones(2, dtype=bool)
    frame, stack = single.reset(), stacked.reset()
    frames, stacks, starts = [], [], []
    for _ in range(steps):
        assert isinstance(frame, np.ndarray)
        assert isinstance(stack, np.ndarray)
        frames.append(frame.copy())
        stacks.append(stack.copy())
        starts.append(start)
        actions = rng.integers(2, size=2)
        frame, _, start, _ = single.step(actions)
        stack, _, _, _ = stacked.step(actions)
    assert np.sum(starts) > 6  # several episodes ended on the way
    return np.array(frames), np.array(stacks), np.array(starts)


def test_it_acts_as_the_ann_does_on_sb3s_stack(ann: DQN) -> None:
    teacher = StackedTeacher(ann, make_cartpole(1, seed=0, velocities=False).observation_space)
    state = None
    for frame, stack, start in zip(*play(), strict=True):
        actions, state = teacher.predict(frame, state, start, deterministic=True)
        np.testing.assert_array_equal(state[0], stack)
        np.testing.assert_array_equal(actions, ann.predict(stack, deterministic=True)[0])


def test_it_labels_as_the_ann_values_sb3s_stack(ann: DQN) -> None:
    teacher = StackedTeacher(ann, make_cartpole(1, seed=0, velocities=False).observation_space)
    state = None
    for frame, stack, start in zip(*play(), strict=True):
        labels, state = teacher.label(frame, state, start)
        with torch.no_grad():
            torch.testing.assert_close(torch.as_tensor(labels), ann.q_net(torch.as_tensor(stack)))


def test_a_teacher_labels_as_it_was_evaluated_and_is_left_as_it_was() -> None:
    """A loaded agent is in training mode, where dropout is on and batch-norm would take in what it sees."""

    class Moving(BaseFeaturesExtractor):
        def __init__(self, space: spaces.Box) -> None:
            super().__init__(space, 16)
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5))

        def forward(self, obs: torch.Tensor) -> torch.Tensor:
            return self.layers(obs)

    kwargs = {"net_arch": [16], "features_extractor_class": Moving}
    dqn = DQN("MlpPolicy", "CartPole-v1", policy_kwargs=kwargs, buffer_size=10, device="cpu", seed=0)
    obs = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    dqn.policy.set_training_mode(True)
    before = {name: value.clone() for name, value in dqn.policy.state_dict().items()}
    labels, _ = teacher_of(dqn).label(obs)
    assert dqn.q_net.training
    for name, value in dqn.policy.state_dict().items():
        assert torch.equal(value, before[name]), name
    dqn.policy.set_training_mode(False)
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(labels), dqn.q_net(torch.as_tensor(obs)))


def test_images_stack_along_their_channels() -> None:
    single, stacked = (spaces.Box(0, 255, (k, 8, 8), np.uint8) for k in (1, 4))
    assert frames_of(stacked, single) == 4
    assert frames_of(single, single) == 1
    assert frames_of(single, stacked) is None
    assert frames_of(spaces.Box(0, 255, (4, 8, 9), np.uint8), single) is None
    assert frames_of(spaces.Box(0, 1, (4, 8, 8), np.uint8), single) is None
    assert frames_of(spaces.Discrete(4), single) is None


def test_another_space_is_refused(ann: DQN) -> None:
    with pytest.raises(ValueError, match="is not one frame of the teacher's"):
        StackedTeacher(ann, make_cartpole(1, seed=0).observation_space)


def test_a_spiking_agent_on_one_frame_learns_from_it(ann: DQN) -> None:
    env = make_cartpole(2, seed=0, velocities=False)
    student = SpikingDQN.from_ann(
        ann,
        env,
        timesteps=1,
        leak=0.8,
        learning_rate=1e-2,
        batch_size=8,
        sequence_length=8,
        burn_in=FRAMES - 1,
        td_weight=0.0,
        distillation_weight=1.0,
        buffer_size=2_000,
        seed=0,
        device="cpu",
    )
    assert student.observation_space.shape == (2,)
    assert isinstance(student.teacher, StackedTeacher)
    student.collect(student.teacher, 600)
    first = student.distil(5)
    assert student.distil(200) < 0.5 * first
