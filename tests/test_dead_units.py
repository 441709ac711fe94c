"""A DQN without its dead units against the DQN it is from."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.torch_layers import NatureCNN
from torch import nn

from snn_rl import without_dead_units
from snn_rl.dqn import ConvExtractor


class Images(gym.Env[np.ndarray, np.int64]):
    action_space = spaces.Discrete(4)

    def __init__(self, size: int = 16) -> None:
        self.observation_space = spaces.Box(0, 255, (3, size, size), np.uint8)

    def reset(self, **_: Any) -> tuple[np.ndarray, dict[str, Any]]:  # type: ignore[override]
        return self.observation_space.sample(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 0.0, False, False, {}


def dqn(env: gym.Env[Any, Any] | str, **policy_kwargs: Any) -> DQN:
    policy = "MlpPolicy" if isinstance(env, str) else "CnnPolicy"
    model = DQN(policy, env, buffer_size=10, seed=0, device="cpu", policy_kwargs=policy_kwargs)
    with torch.no_grad():
        for name, weight in (*model.q_net.named_parameters(), *model.q_net_target.named_parameters()):
            weight.mul_(0.3) if name.endswith("weight") else weight.fill_(1.0)  # every unit is active on most inputs
        model.q_net_target.q_net[-1].weight.add_(0.1)  # a network that is not the online one
    return model


def convolutional(**extra: Any) -> DQN:
    kwargs = {"convolutions": ((6, 4, 2), (8, 3, 1)), "features_dim": 20}
    return dqn(Images(), features_extractor_class=ConvExtractor, features_extractor_kwargs=kwargs, **extra)


def kill(model: DQN, index: int, units: list[int]) -> None:
    """Give units of the network's layer ``index`` a bias that no input overcomes."""
    for q_net in (model.q_net, model.q_net_target):
        layer = [m for m in q_net.modules() if isinstance(m, nn.Conv2d | nn.Linear)][index]
        with torch.no_grad():
            layer.bias[units] = -100.0


def q_values(model: DQN, obs: np.ndarray, net: str = "q_net") -> torch.Tensor:
    with torch.no_grad():
        return getattr(model, net)(torch.as_tensor(obs))


def images(n: int, seed: int = 0, size: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, size, size), dtype=np.uint8)


def test_channels_and_neurons_go_and_the_q_values_stay() -> None:
    model = convolutional(net_arch=[10])
    kill(model, 0, [0, 3, 5])
    kill(model, 1, [7])
    kill(model, 2, [0, 1, 2, 19])
    kill(model, 3, [4])
    smaller = without_dead_units(model, [images(200, seed) for seed in range(3)])
    kwargs = smaller.policy.features_extractor_kwargs
    (first, *_), (second, *_) = kwargs["convolutions"]
    assert [first, second, kwargs["features_dim"], *smaller.policy.net_arch] == [3, 7, 16, 9]
    fresh = images(50, 9)
    for net in ("q_net", "q_net_target"):
        torch.testing.assert_close(q_values(smaller, fresh, net), q_values(model, fresh, net), rtol=1e-5, atol=1e-5)


def test_sb3s_nature_cnn_becomes_a_smaller_extractor() -> None:
    model = dqn(Images(size=36))
    assert isinstance(model.q_net.features_extractor, NatureCNN)
    kill(model, 0, list(range(26)))
    kill(model, 2, [0, 63])
    kill(model, 3, [5])
    smaller = without_dead_units(model, [images(50, size=36)])
    kwargs = smaller.policy.features_extractor_kwargs
    assert kwargs == {"convolutions": ((6, 8, 4), (64, 4, 2), (62, 3, 1)), "features_dim": 511}
    assert smaller.policy.net_arch == []
    fresh = images(20, 9, size=36)
    torch.testing.assert_close(q_values(smaller, fresh), q_values(model, fresh), rtol=1e-4, atol=1e-4)


def test_neurons_of_a_plain_network_go() -> None:
    model = dqn("CartPole-v1", net_arch=[8, 6])
    kill(model, 0, [1])
    kill(model, 1, [0, 5])
    obs = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    smaller = without_dead_units(model, [obs])
    assert smaller.policy.net_arch == [7, 4]
    torch.testing.assert_close(q_values(smaller, obs), q_values(model, obs))


def test_a_unit_that_one_observation_in_a_hundred_activates_is_alive() -> None:
    model = dqn("CartPole-v1", net_arch=[2])
    (layer, *_) = (m for m in model.q_net.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
        layer.bias.zero_()
    obs = np.tile(np.array([1.0, -1.0, 0.0, 0.0], dtype=np.float32), (200, 1))
    obs[:2, 1] = 1.0
    assert without_dead_units(model, [obs]).policy.net_arch == [2]
    obs[1, 1] = -1.0
    assert without_dead_units(model, [obs]).policy.net_arch == [1]


def test_a_layer_that_is_dead_keeps_its_units() -> None:
    model = dqn("CartPole-v1", net_arch=[5])
    kill(model, 0, [0, 1, 2, 3, 4])
    obs = np.zeros((10, 4), dtype=np.float32)
    smaller = without_dead_units(model, [obs])
    assert smaller.policy.net_arch == [5]
    torch.testing.assert_close(q_values(smaller, obs), q_values(model, obs))


def test_it_is_saved_loaded_and_trained_as_any_other(tmp_path: Any) -> None:
    model = dqn("CartPole-v1", net_arch=[8])
    kill(model, 0, [1, 2])
    obs = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    smaller = without_dead_units(model, [obs])
    before = q_values(model, obs).clone()
    smaller.learning_starts = 10
    smaller.learn(100)
    assert not torch.equal(q_values(smaller, obs), before)
    torch.testing.assert_close(q_values(model, obs), before)
    smaller.save(tmp_path / "smaller")
    loaded = DQN.load(tmp_path / "smaller", device="cpu")
    torch.testing.assert_close(q_values(loaded, obs), q_values(smaller, obs))


@pytest.mark.parametrize(
    ("model", "observations", "message"),
    [
        (lambda: dqn("CartPole-v1"), [], "observations must hold at least one batch"),
        (lambda: dqn("CartPole-v1", activation_fn=nn.Tanh), [np.zeros((1, 4))], "got Tanh behind a FlattenExtractor"),
    ],
)
def test_what_is_refused(model: Any, observations: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        without_dead_units(model(), observations)
