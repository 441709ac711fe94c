"""The update as a CUDA graph against the same update run operation by operation. Only a GPU can capture one."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from stable_baselines3 import DQN
from torch import Tensor

from agents import RECIPES
from snn_rl import SpikingDQN
from snn_rl.rl import dqn
from snn_rl.rl.captured import CapturedGradient, gradient
from snn_rl.rl.features import ConvExtractor
from snn_rl.rl.replay import Windows
from snn_rl.rl.teacher import StackedTeacher
from tests.rl.test_dqn import model, parameters
from tests.rl.test_losses import random_windows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def on_cuda(**kwargs: Any) -> SpikingDQN:
    return model(device="cuda", **kwargs)


def windows(agent: SpikingDQN, seed: int) -> Windows:
    return Windows(*(tensor.cuda() for tensor in random_windows(agent.window_length, 4, seed)))


def taught(agent: SpikingDQN) -> SpikingDQN:
    agent.teacher = copy.deepcopy(agent)
    with torch.no_grad():
        for weight in agent.q_net.parameters():
            weight.add_(0.01)
    return agent


def eager_gradient(agent: SpikingDQN, given: Windows) -> tuple[list[Tensor], float]:
    loss, _ = gradient(agent._loss, given, agent._learning, agent.max_grad_norm)
    return [p.grad.clone() for p in agent._learning if p.grad is not None], loss.item()


def of_pong(frame_stack: int, timesteps: int, device: str) -> SpikingDQN:
    """As a stage of a recipe begins: converted from an ANN on a stack of four frames, whose play it holds."""
    recipe = RECIPES["pong-lite"]
    stacked, env = (recipe.build_env(2, 0, frame_stack=frames) for frames in (4, frame_stack))
    extractor = {"convolutions": ((4, 4, 2), (8, 4, 2)), "features_dim": 16}
    policy_kwargs = {
        "features_extractor_class": ConvExtractor,
        "features_extractor_kwargs": extractor,
        "net_arch": [],
    }
    ann = DQN("CnnPolicy", stacked, buffer_size=1, policy_kwargs=policy_kwargs, seed=0, device=device)
    kwargs: dict[str, Any] = {
        "buffer_size": 500,
        "batch_size": 4,
        "sequence_length": 4,
        "burn_in": 3,
        "td_weight": 0.0,
        "distillation_weight": 1.0,
        "spike_weight": 0.01,
    }
    agent = SpikingDQN.from_ann(ann, env, timesteps, calibration_steps=40, seed=0, device=device, **kwargs)
    assert isinstance(agent.teacher, StackedTeacher) == (frame_stack != 4)
    agent.collect(agent.teacher, 200)
    return agent


@pytest.mark.parametrize(("td", "distillation", "spikes"), [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 0.5, 0.01)])
def test_the_graph_gives_the_gradients_of_the_operations(td: float, distillation: float, spikes: float) -> None:
    agent = taught(on_cuda(spike_weight=spikes, td_weight=td, distillation_weight=distillation))
    captured = CapturedGradient(agent._loss, agent._learning, agent.max_grad_norm, windows(agent, 0))
    for seed in range(1, 5):  # other windows, and each time other weights and another target network
        given = windows(agent, seed)
        expected, loss = eager_gradient(agent, given)
        assert captured(given)[0] == pytest.approx(loss, rel=1e-5)
        assert len(expected) == len(agent._learning)
        for parameter, grad in zip(agent._learning, expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
        agent.policy.optimizer.step()
        agent.q_net_target.load_state_dict(agent.q_net.state_dict())


@pytest.mark.parametrize(("frame_stack", "timesteps"), [(4, 3), (4, 1), (1, 2)])
def test_a_pong_stage_is_captured_too(frame_stack: int, timesteps: int) -> None:
    """Images as bytes, and an ANN as teacher: on the stack that the student sees, or on one that it does not."""
    agent = of_pong(frame_stack, timesteps, "cuda")
    assert agent.replay_buffer is not None
    drawn = [agent.replay_buffer.sample_windows(4, agent.window_length) for _ in range(3)]
    captured = CapturedGradient(agent._loss, agent._learning, agent.max_grad_norm, drawn[0])
    for given in drawn[1:]:
        expected, loss = eager_gradient(agent, given)
        assert captured(given)[0] == pytest.approx(loss, rel=1e-4)
        for parameter, grad in zip(agent._learning, expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-5)
        agent.policy.optimizer.step()


def test_learning_with_the_graph_is_learning_without(monkeypatch: pytest.MonkeyPatch) -> None:
    learnt = []
    for every in (10, 1):  # with spikes counted at each update, none is replayed
        monkeypatch.setattr(dqn, "SPIKES_EVERY", every)
        agent = on_cuda().learn(200)
        assert (agent._captured is None) == (every == 1)
        learnt.append(parameters(agent))
    torch.testing.assert_close(learnt[0], learnt[1], rtol=1e-3, atol=1e-4)


def test_what_the_graph_holds_may_change_and_is_held_anew() -> None:
    agent = taught(on_cuda())
    given = windows(agent, 0)
    held = []
    teacher = copy.deepcopy(agent)
    changes: tuple[tuple[Any, str, Any], ...] = (
        (agent, "seed", 0),  # which the loss does not read
        (agent, "spike_weight", 1.0),
        (agent, "max_grad_norm", 0.01),
        (agent, "teacher", None),
        (agent, "distillation_weight", 0.5),
        (agent, "teacher", teacher),  # whose labels are in the windows
        (agent.q_net, "persistent", False),
        (agent, "seed", 1),
    )
    for where, name, value in changes:
        setattr(where, name, value)
        expected, _ = eager_gradient(agent, given)
        captured = agent._captured_gradient(agent._loss, agent._loss_key, given)
        captured(given)
        for parameter, grad in zip(agent._learning, expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
        held.append(captured)
    assert [a is b for a, b in itertools.pairwise(held)] == [False] * 6 + [True]


def test_an_agent_saved_or_copied_holds_no_graph_and_goes_on_learning(tmp_path: Path) -> None:
    agent = on_cuda().learn(200)
    assert agent._captured is not None
    agent.save(tmp_path / "agent")
    for other in (SpikingDQN.load(tmp_path / "agent", env=agent.get_env(), device="cuda"), copy.deepcopy(agent)):
        assert other._captured is None
        before, untouched = parameters(other), parameters(agent)
        other.learn(200)
        assert not torch.equal(before, parameters(other))
        assert torch.equal(untouched, parameters(agent))
