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

from snn_rl import SpikingDQN, without_dead_units
from snn_rl.rl import ConvExtractor


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
        for q_net in (model.q_net, model.q_net_target):
            *hidden, last = (m for m in q_net.modules() if isinstance(m, nn.Conv2d | nn.Linear))
            for layer in hidden:
                layer.weight.abs_()  # every unit is active, and the more so the brighter an image is
                layer.weight.mul_(4 / layer.weight[0].numel() ** 0.5)
                layer.bias.fill_(0.1)
            last.weight.mul_(10.0)
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
            layer.bias[units] = -1e4


def q_values(model: DQN, obs: np.ndarray, net: str = "q_net") -> torch.Tensor:
    """Q-values (batch, actions), which depend on the observation: a network that ignored it would not be told apart."""
    with torch.no_grad():
        q = getattr(model, net)(torch.as_tensor(obs))
    assert q.std(0).min() > 0.02
    return q


def images(n: int, seed: int = 0, size: int = 16) -> np.ndarray:
    """Noise in each channel of each image, up to a brightness of its own."""
    rng = np.random.default_rng(seed)
    return (rng.uniform(0, 256, (n, 3, 1, 1)) * rng.random((n, 3, size, size))).astype(np.uint8)


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


def test_neurons_behind_an_extractor_without_convolutions_go() -> None:
    kwargs = {"convolutions": (), "features_dim": 6}
    model = dqn(Images(), features_extractor_class=ConvExtractor, features_extractor_kwargs=kwargs, net_arch=[5])
    kill(model, 0, [1])
    kill(model, 1, [0, 3])
    smaller = without_dead_units(model, [images(50)])
    assert smaller.policy.features_extractor_kwargs == {"convolutions": (), "features_dim": 5}
    assert smaller.policy.net_arch == [3]
    torch.testing.assert_close(q_values(smaller, images(20, 9)), q_values(model, images(20, 9)))


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


def test_a_channel_that_one_pixel_activates_is_alive() -> None:
    model = convolutional()
    (layer, *_) = (m for m in model.q_net.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        layer.weight[:2] = 1.0
        layer.bias[:2] = torch.tensor([-3.9, -16.1])  # of 16 pixels in each of 3 channels, 16 are lit, in one corner
        layer.bias[2:] = 1.0
    obs = np.zeros((10, 3, 16, 16), dtype=np.uint8)
    obs[:, 0, -4:, -4:] = 255
    smaller = without_dead_units(model, [obs])
    assert smaller.q_net.features_extractor.cnn[0].out_channels == 5
    kept = smaller.q_net.features_extractor.cnn[0].bias
    torch.testing.assert_close(kept, torch.tensor([-3.9, 1, 1, 1, 1]))


def test_images_may_have_their_channels_last_as_predict_takes_them() -> None:
    model = convolutional()
    kill(model, 0, [0, 3])
    obs = images(100)
    first, last = (without_dead_units(model, [o]) for o in (obs, obs.transpose(0, 2, 3, 1)))
    assert first.policy_kwargs == last.policy_kwargs


@pytest.mark.parametrize("share", [0.0, 0.009])
def test_of_a_layer_without_a_unit_that_is_alive_the_most_active_one_stays(share: float) -> None:
    model = dqn("CartPole-v1", net_arch=[3])
    (layer, *_) = (m for m in model.q_net.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-1.0, 0, 0, 0], [1.0, 0, 0, 0], [0.5, 0, 0, 0]]))
        layer.bias.copy_(torch.tensor([-9.0, 0.0, -0.6]))
    obs = np.zeros((1000, 4), dtype=np.float32)
    obs[:, 0] = -1.0
    obs[: int(share * 1000), 0] = 1.0
    smaller = without_dead_units(model, [obs])
    assert smaller.policy.net_arch == [1]
    with torch.no_grad():
        torch.testing.assert_close(*(m.q_net(torch.as_tensor(obs)) for m in (smaller, model)))


def test_it_is_saved_loaded_and_trained_as_any_other(tmp_path: Any) -> None:
    model = dqn("CartPole-v1", net_arch=[8])
    kill(model, 0, [1, 2])
    obs = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    smaller = without_dead_units(model, [obs])
    before, whole = q_values(smaller, obs), q_values(model, obs)
    smaller.learning_starts = 10
    smaller.learn(100)
    assert not torch.equal(q_values(smaller, obs), before)
    torch.testing.assert_close(q_values(model, obs), whole)
    smaller.save(tmp_path / "smaller")
    loaded = DQN.load(tmp_path / "smaller", device="cpu")
    torch.testing.assert_close(q_values(loaded, obs), q_values(smaller, obs))


class Normalised(NatureCNN):
    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return super().forward((observations - 0.5) / 0.25)


def spiking() -> DQN:
    return SpikingDQN("MlpPolicy", "CartPole-v1", buffer_size=100, device="cpu")


@pytest.mark.parametrize(
    ("model", "observations", "message"),
    [
        (lambda: dqn("CartPole-v1"), [], "observations must hold at least one batch"),
        (lambda: dqn(Images(size=36), features_extractor_class=Normalised), [], "got ReLU behind a Normalised"),
        (spiking, [], "the agent spikes already"),
        (lambda: nn.Linear(1, 1), [], "takes a stable_baselines3.DQN, got a Linear"),
        (lambda: dqn("CartPole-v1", activation_fn=nn.Tanh), [np.zeros((1, 4))], "got Tanh behind a FlattenExtractor"),
    ],
)
def test_what_is_refused(model: Any, observations: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        without_dead_units(model(), observations)
