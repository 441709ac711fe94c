"""Q-networks and policies with a forward of their own are refused before anything is trained, built or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from torch import Tensor, nn

from snn_rl import SpikingDQN, load_policy, save_policy, without_dead_units


class Dueling(QNetwork):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.value = nn.Sequential(*create_mlp(self.features_dim, 1, self.net_arch, self.activation_fn))

    def forward(self, obs: Tensor) -> Tensor:  # type: ignore[override]
        features = self.extract_features(obs, self.features_extractor)
        advantage = self.q_net(features)
        return self.value(features) + advantage - advantage.mean(1, keepdim=True)


class Costs(QNetwork):
    def forward(self, obs: Tensor) -> Tensor:  # type: ignore[override]
        return -super().forward(obs)


class Scaled(QNetwork):
    def extract_features(self, *args: Any) -> Tensor:  # type: ignore[override]
        return 10 * super().extract_features(*args)


class Deeper(QNetwork):
    """SB3's forward, on layers that ``net_arch`` does not describe."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.q_net.append(nn.ReLU()).append(nn.Linear(2, 2))


class Masked(DQNPolicy):
    """A policy that never takes the first action."""

    def _predict(self, obs: Tensor, deterministic: bool = True) -> Tensor:  # type: ignore[override]
        return torch.ones(len(obs), dtype=torch.long)


def policy_of(kind: type[QNetwork]) -> type[DQNPolicy]:
    class Policy(DQNPolicy):
        def make_q_net(self) -> QNetwork:
            arguments = self._update_features_extractor(self.net_args, features_extractor=None)
            return kind(**arguments).to(self.device)  # type: ignore[arg-type]

    return Policy


def dqn(policy: type[DQNPolicy]) -> DQN:
    kwargs = {"net_arch": [8]}
    return DQN(policy, "CartPole-v1", buffer_size=10, policy_kwargs=kwargs, seed=0, device="cpu")


def instance_forward() -> DQN:
    agent = dqn(DQNPolicy)
    agent.q_net.forward = MethodType(lambda self, obs: -self.q_net(obs), agent.q_net)  # type: ignore[method-assign]
    return agent


AGENTS: dict[str, tuple[Callable[[], DQN], str]] = {
    "dueling": (lambda: dqn(policy_of(Dueling)), "the Q-network is a Dueling, whose forward is its own"),
    "negated": (lambda: dqn(policy_of(Costs)), "the Q-network is a Costs, whose forward is its own"),
    "scaled": (lambda: dqn(policy_of(Scaled)), "the Q-network is a Scaled, whose extract_features is its own"),
    "masked": (lambda: dqn(Masked), "the policy is a Masked, whose _predict is its own"),
    "instance": (instance_forward, "the Q-network is a QNetwork, whose forward is its own"),
}


@pytest.mark.parametrize("kind", AGENTS)
def test_a_forward_of_its_own_is_refused_everywhere(kind: str, tmp_path: Path) -> None:
    make, message = AGENTS[kind]
    agent = make()
    with pytest.raises(ValueError, match=message):
        SpikingDQN.from_ann(agent, "CartPole-v1")
    with pytest.raises(ValueError, match=message):
        save_policy(agent, tmp_path / "policy.safetensors", {})
    with pytest.raises(ValueError, match=message):
        without_dead_units(agent, [np.zeros((3, 4), np.float32)])
    assert not list(tmp_path.iterdir())


def test_it_can_teach_instead() -> None:
    """The way out that the message names."""
    teacher = dqn(policy_of(Dueling))
    small = {"batch_size": 4, "sequence_length": 4, "burn_in": 0, "buffer_size": 500, "device": "cpu", "seed": 0}
    taught = {"td_weight": 0.0, "distillation_weight": 1.0}
    agent = SpikingDQN("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [8]}, **small, **taught)  # type: ignore[arg-type]
    agent.teacher = teacher
    agent.collect(teacher, 200)
    assert agent.distil(2) > 0


def test_layers_that_the_policy_does_not_describe_are_refused_or_come_back(tmp_path: Path) -> None:
    agent = dqn(policy_of(Deeper))
    with pytest.raises(ValueError, match="the layers of the network are not those"):
        SpikingDQN.from_ann(agent, "CartPole-v1")
    save_policy(agent, tmp_path / "policy.safetensors", {})  # which describes the layers that are there
    obs = torch.as_tensor(np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32))
    with torch.no_grad():
        stored = load_policy(tmp_path / "policy.safetensors").network(obs)
        torch.testing.assert_close(stored, agent.q_net(obs), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((nn.ReLU(),), "an actor that ends in a ReLU cannot be stored in a policy file"),
        ((nn.Tanh(), nn.Linear(2, 2)), "activation Tanh cannot be stored in a policy file, which knows ReLU"),
        ((nn.Linear(2, 2),), "activation Linear cannot be stored|ends in a Linear|do not fit its description"),
    ],
)
def test_layers_that_a_file_would_give_back_as_others_are_refused(
    layers: tuple[nn.Module, ...], message: str, tmp_path: Path
) -> None:
    agent = dqn(DQNPolicy)
    agent.q_net.q_net.extend(layers)
    with pytest.raises(ValueError, match=message):
        save_policy(agent, tmp_path / "policy.safetensors", {})
    assert not list(tmp_path.iterdir())


def test_a_parametrized_q_network_is_converted_but_not_stored(tmp_path: Path) -> None:
    agent = dqn(DQNPolicy)
    for layer in agent.q_net.q_net:
        if isinstance(layer, nn.Linear):
            nn.utils.parametrizations.weight_norm(layer)
    spiking = SpikingDQN.from_ann(agent, "CartPole-v1", 300, leak=1.0, percentile=100.0, seed=0, device="cpu")
    obs = torch.as_tensor(np.random.default_rng(0).uniform(-0.2, 0.2, (50, 4)).astype(np.float32))
    with torch.no_grad():
        torch.testing.assert_close(spiking.q_net(obs)[0], agent.q_net(obs), atol=0.01, rtol=0.05)
    with pytest.raises(ValueError, match="do not fit its description"):
        save_policy(agent, tmp_path / "policy.safetensors", {})
