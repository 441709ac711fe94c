"""The actor of each algorithm acts as the agent's own ``predict`` does."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import ARS, QRDQN, TQC, TRPO, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor, NatureCNN
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from stable_baselines3.sac.policies import Actor as SACActor
from stable_baselines3.sac.policies import SACPolicy
from torch import Tensor, nn

from snn_rl import SpikingDQN, to_spiking
from snn_rl.rl.actor import actor_of, is_recurrent, recurrent_actor_of
from snn_rl.rl.heads import Bits, Continuous, Logits, QValues
from snn_rl.rl.spaces import UnsupportedSpaceError

VECTOR = spaces.Box(-2, 2, (2, 3), np.float32)
IMAGE = spaces.Box(0, 255, (36, 40, 3), np.uint8)  # channels last, as most environments show them
NUMBER = spaces.Discrete(5)
BITS = spaces.MultiBinary(4)
DICT = spaces.Dict(camera=IMAGE, arm=spaces.Box(-1, 1, (3,), np.float32), gear=spaces.Discrete(3))
BOX = spaces.Box(np.float32([-1, -3]), np.float32([2, 0.5]))
MULTI = spaces.MultiDiscrete([3, 2, 4])
OFF_POLICY = {"buffer_size": 1, "learning_starts": 0}
ON_POLICY = {"n_steps": 8, "batch_size": 8}


class Env(gymnasium.Env):
    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        return self.observation_space.sample(), {}


def randomise(model: BaseAlgorithm) -> None:
    """Weights with which no output is trivial: SB3 starts from biases of 0, and PPO from outputs near 0."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            scale = 2 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def build(
    algorithm: Any, observations: spaces.Space, actions: spaces.Space, policy: Any = "MlpPolicy", **kwargs: Any
) -> BaseAlgorithm:
    if algorithm in (DQN, QRDQN, SAC, TD3, DDPG, TQC):
        kwargs = OFF_POLICY | kwargs
    elif algorithm is A2C:
        kwargs = {"n_steps": 8} | kwargs
    elif algorithm is not ARS:
        kwargs = ON_POLICY | kwargs
    model = algorithm(policy, Env(observations, actions), device="cpu", seed=0, **copy.deepcopy(kwargs))
    randomise(model)
    return model


def draw(space: spaces.Space, n: int) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: draw(subspace, n) for key, subspace in space.spaces.items()}
    if space == IMAGE:  # of few large patches, so that images differ in what a network makes of them
        patches = np.random.default_rng(5).integers(0, 256, (n, 3, 4, 3), dtype=np.uint8)
        return np.kron(patches, np.ones((1, 12, 10, 1), dtype=np.uint8))
    space.seed(5)
    return np.stack([space.sample() for _ in range(n)])


def actions_of(model: BaseAlgorithm, observations: Any) -> np.ndarray:
    actor = actor_of(model.policy)
    tensor, _ = model.policy.obs_to_tensor(observations)
    inputs = preprocess_obs(tensor, model.policy.observation_space, normalize_images=actor.normalize_images)
    with torch.no_grad():
        outputs = actor.network(inputs).numpy()
    assert outputs.shape[1:] == (actor.head.size,)
    return actor.head.actions(outputs)


def check(model: BaseAlgorithm, n: int = 200) -> None:
    observations = draw(model.get_env().envs[0].observation_space, n)  # type: ignore[union-attr]
    wanted, _ = model.predict(observations, deterministic=True)
    got = actions_of(model, observations)
    assert len(np.unique(wanted.reshape(n, -1), axis=0)) > 1  # not the same action everywhere
    assert got.shape == wanted.shape
    if isinstance(model.action_space, spaces.Box):
        np.testing.assert_allclose(got, wanted, atol=1e-6, rtol=0)
    else:
        np.testing.assert_array_equal(got, wanted)


SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [12, 8]}}
DISCRETE = [DQN, QRDQN, PPO, A2C, TRPO, ARS]
CONTINUOUS = [PPO, A2C, TRPO, ARS, SAC, TQC, TD3, DDPG]


@pytest.mark.parametrize("observations", [VECTOR, NUMBER, BITS], ids=["box", "discrete", "bits"])
@pytest.mark.parametrize("algorithm", DISCRETE)
def test_discrete_actions(algorithm: Any, observations: spaces.Space) -> None:
    model = build(algorithm, observations, spaces.Discrete(3), **SMALL)
    check(model)
    actor = actor_of(model.policy)
    assert actor.net_arch == (12, 8)
    assert isinstance(actor.head, QValues if algorithm in (DQN, QRDQN) else Logits)


@pytest.mark.parametrize("observations", [VECTOR, NUMBER], ids=["box", "discrete"])
@pytest.mark.parametrize("algorithm", CONTINUOUS)
def test_continuous_actions(algorithm: Any, observations: spaces.Space) -> None:
    model = build(algorithm, observations, BOX, **SMALL)
    check(model)
    actor = actor_of(model.policy)
    assert actor.net_arch == (12, 8)
    assert isinstance(actor.head, Continuous)
    assert actor.head.squashed == (algorithm not in (PPO, A2C, TRPO))


@pytest.mark.parametrize("algorithm", [PPO, A2C, TRPO])
def test_several_discrete_actions_and_bits(algorithm: Any) -> None:
    model = build(algorithm, VECTOR, MULTI, **SMALL)
    check(model)
    assert isinstance(actor_of(model.policy).head, Logits)
    model = build(algorithm, VECTOR, spaces.MultiBinary(3), **SMALL)
    check(model)
    assert isinstance(actor_of(model.policy).head, Bits)


@pytest.mark.parametrize("algorithm", [DQN, QRDQN, PPO, SAC, TD3, TQC])
def test_images(algorithm: Any) -> None:
    actions = spaces.Discrete(9) if algorithm in (DQN, QRDQN, PPO) else BOX
    model = build(
        algorithm, IMAGE, actions, "CnnPolicy", policy_kwargs={"features_extractor_kwargs": {"features_dim": 9}}
    )
    check(model, 60)
    actor = actor_of(model.policy)
    assert actor.features_extractor_class is NatureCNN
    assert actor.features_extractor_kwargs == {"features_dim": 9}
    assert actor.normalize_images


@pytest.mark.parametrize("algorithm", [DQN, PPO, SAC])
def test_dicts_of_observations(algorithm: Any) -> None:
    actions = spaces.Discrete(9) if algorithm is DQN else BOX
    check(build(algorithm, DICT, actions, "MultiInputPolicy", **SMALL), 60)


def test_images_that_are_not_normalised() -> None:
    model = build(PPO, IMAGE, spaces.Discrete(3), "CnnPolicy", policy_kwargs={"normalize_images": False})
    check(model, 20)
    assert not actor_of(model.policy).normalize_images


def test_extractors_that_are_not_shared() -> None:
    model = build(PPO, IMAGE, BOX, "CnnPolicy", policy_kwargs={"share_features_extractor": False, "net_arch": [8]})
    check(model, 20)


@pytest.mark.parametrize("algorithm", [SAC, TQC])
def test_a_clipped_mean_is_clipped_by_the_network(algorithm: Any) -> None:
    model = build(algorithm, VECTOR, BOX, use_sde=True, **SMALL)
    check(model)
    actor = actor_of(model.policy)
    outputs = actor.network(torch.as_tensor(draw(VECTOR, 200))).abs()
    assert (outputs == 2).any()
    assert outputs.max() == 2
    assert not actor.converts
    without = build(algorithm, VECTOR, BOX, use_sde=True, policy_kwargs={"net_arch": [12, 8], "clip_mean": 0.0})
    check(without)
    assert actor_of(without.policy).converts


@pytest.mark.parametrize("squash", [False, True])
def test_gsde_of_an_actor_critic(squash: bool) -> None:
    model = build(PPO, VECTOR, BOX, use_sde=True, policy_kwargs={"squash_output": squash, "net_arch": [8]})
    check(model)
    head = actor_of(model.policy).head
    assert isinstance(head, Continuous)
    assert head.squashed == squash


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("actions", [spaces.Discrete(3), BOX], ids=["discrete", "box"])
def test_a_linear_policy(actions: spaces.Space, with_bias: bool) -> None:
    model = build(ARS, VECTOR, actions, "LinearPolicy", policy_kwargs={"with_bias": with_bias})
    check(model)
    actor = actor_of(model.policy)
    assert (actor.net_arch, actor.activation, actor.converts) == ((), None, False)
    if isinstance(actor.head, Continuous):
        assert not actor.head.squashed


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.ELU])
def test_which_activations_convert(activation: type[nn.Module]) -> None:
    model = build(PPO, VECTOR, BOX, policy_kwargs={"activation_fn": activation, "net_arch": [8, 8]})
    check(model)
    actor = actor_of(model.policy)
    assert actor.activation is activation
    assert actor.converts == (activation is nn.ReLU)
    if actor.converts:
        observations = torch.as_tensor(draw(VECTOR, 50))
        network = to_spiking(actor.network, observations)
        assert network(observations)[0].shape == (50, 2)


def test_a_convolutional_policy_without_hidden_layers_converts() -> None:
    actor = actor_of(build(PPO, IMAGE, spaces.Discrete(3), "CnnPolicy").policy)
    assert (actor.net_arch, actor.converts) == ((), True)


def test_the_actor_is_a_copy_in_evaluation_mode() -> None:
    model = build(DQN, VECTOR, spaces.Discrete(3), **SMALL)
    model.policy.set_training_mode(True)
    actor = actor_of(model.policy)
    before = actor.network.get_parameter("mlp.0.weight").clone()
    randomise(model)
    with torch.no_grad():
        model.policy.q_net.q_net[0].weight.mul_(2)
    assert torch.equal(actor.network.get_parameter("mlp.0.weight"), before)
    assert not actor.network.training
    assert model.policy.training


# --- RecurrentPPO -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actions", "options"),
    [
        (spaces.Discrete(3), {}),
        (BOX, {"n_lstm_layers": 2, "net_arch": []}),
        (MULTI, {"enable_critic_lstm": False, "shared_lstm": True}),
    ],
    ids=["discrete", "box", "multi"],
)
def test_recurrent_ppo_over_episodes(actions: spaces.Space, options: dict[str, Any]) -> None:
    model = build(RecurrentPPO, VECTOR, actions, "MlpLstmPolicy", policy_kwargs={"lstm_hidden_size": 6, **options})
    assert is_recurrent(model.policy)
    actor = recurrent_actor_of(model.policy)
    frames = draw(VECTOR, 40).reshape(20, 2, 2, 3)
    starts = np.zeros((20, 2), dtype=bool)
    starts[0], starts[7, 0], starts[13, 1] = True, True, True
    wanted_state, state = None, None
    forgotten = []
    for frame, start in zip(frames, starts, strict=True):
        wanted, wanted_state = model.predict(frame, wanted_state, start, deterministic=True)
        outputs, state = actor.label(frame, state, start)
        assert outputs.shape == (2, actor.head.size)
        forgotten.append(np.abs(outputs - actor.label(frame)[0]).max(1))
        if isinstance(actions, spaces.Box):
            np.testing.assert_allclose(actor.head.actions(outputs), wanted, atol=1e-6)
        else:
            np.testing.assert_array_equal(actor.head.actions(outputs), wanted)
        for ours, theirs in zip(state, wanted_state, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert (np.stack(forgotten)[~starts] > 1e-4).all()  # it does remember
    assert (np.stack(forgotten)[starts] < 1e-5).all()


def test_a_state_of_other_environments_is_refused() -> None:
    model = build(RecurrentPPO, VECTOR, BOX, "MlpLstmPolicy", policy_kwargs={"lstm_hidden_size": 6})
    actor = recurrent_actor_of(model.policy)
    _, state = actor.label(draw(VECTOR, 2))
    with pytest.raises(ValueError, match=r"the state of 3 environments must be two arrays of shape \(1, 3, 6\)"):
        actor.label(draw(VECTOR, 3), state)


def test_recurrent_ppo_has_no_feed_forward_actor() -> None:
    model = build(RecurrentPPO, VECTOR, BOX, "MlpLstmPolicy")
    with pytest.raises(ValueError, match=r"RecurrentActorCriticPolicy, remembers .* use recurrent_actor_of"):
        actor_of(model.policy)
    with pytest.raises(ValueError, match="takes the policy of a RecurrentPPO, got a ActorCriticPolicy"):
        recurrent_actor_of(build(PPO, VECTOR, BOX).policy)


# --- refusals -----------------------------------------------------------------------------------------------------


class Costs(QNetwork):
    def forward(self, obs: Tensor) -> Tensor:  # type: ignore[override]
        return -super().forward(obs)


class CostsPolicy(DQNPolicy):
    def make_q_net(self) -> QNetwork:
        return Costs(**self._update_features_extractor(self.net_args, features_extractor=None))


class Masked(ActorCriticPolicy):
    def get_distribution(self, obs: Tensor) -> Any:  # type: ignore[override]
        return super().get_distribution(obs * 0)


class Doubled(SACActor):
    def get_action_dist_params(self, obs: Tensor) -> Any:  # type: ignore[override]
        mean, log_std, kwargs = super().get_action_dist_params(obs)
        return 2 * mean, log_std, kwargs


class DoubledPolicy(SACPolicy):
    def make_actor(self, features_extractor: Any = None) -> SACActor:
        return Doubled(**self._update_features_extractor(self.actor_kwargs, features_extractor))


class Latent(MlpExtractor):
    def forward_actor(self, features: Tensor) -> Tensor:
        return super().forward_actor(features) ** 2


class LatentPolicy(ActorCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = Latent(self.features_dim, self.net_arch, self.activation_fn, "cpu")


class Own(nn.Module):
    latent_dim_pi = latent_dim_vf = 6

    def forward_actor(self, features: Tensor) -> Tensor:
        return features

    forward_critic = forward_actor


class OwnPolicy(ActorCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = Own()  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("algorithm", "actions", "policy", "message"),
    [
        (DQN, spaces.Discrete(3), CostsPolicy, "the Q-network is a Costs, whose forward is its own"),
        (PPO, BOX, Masked, "the policy is a Masked, whose get_distribution is its own"),
        (SAC, BOX, DoubledPolicy, "the actor is a Doubled, whose get_action_dist_params is its own"),
        (PPO, BOX, LatentPolicy, "the extractor is a Latent, whose forward_actor is its own"),
        (PPO, BOX, OwnPolicy, r"the agent's MlpExtractor is a .*Own, whose layers are unknown"),
        (MaskablePPO, spaces.Discrete(3), "MlpPolicy", r"the policy is a .*MaskableActorCriticPolicy; known are"),
        (SpikingDQN, spaces.Discrete(3), "MlpPolicy", "the policy, a SpikingDQNPolicy, spikes already"),
    ],
)
def test_policies_that_compute_in_their_own_way(
    algorithm: Any, actions: spaces.Space, policy: Any, message: str
) -> None:
    kwargs: dict[str, Any] = ON_POLICY
    if algorithm is SpikingDQN:
        kwargs = {"buffer_size": 100}
    elif algorithm in (DQN, SAC):
        kwargs = OFF_POLICY
    model = algorithm(policy, Env(VECTOR, actions), device="cpu", **kwargs)
    with pytest.raises(ValueError, match=message) as refusal:
        actor_of(model.policy)
    assert "\n" not in str(refusal.value)


def _predict_own(model: BaseAlgorithm) -> None:
    model.policy.predict = lambda *_, **__: (np.zeros(1), None)  # type: ignore[method-assign]


def _hook(model: BaseAlgorithm) -> None:
    model.policy.q_net.register_forward_hook(lambda _, __, out: -out)


@pytest.mark.parametrize(
    ("change", "message"),
    [(_predict_own, "whose predict is its own"), (_hook, "has a forward hook, which would be lost")],
)
def test_policies_changed_on_the_object(change: Callable[[BaseAlgorithm], None], message: str) -> None:
    model = build(DQN, VECTOR, spaces.Discrete(3))
    change(model)
    with pytest.raises(ValueError, match=message):
        actor_of(model.policy)


def test_squashed_actions_without_bounds_are_refused() -> None:
    model = build(SAC, VECTOR, BOX)
    model.policy.action_space = spaces.Box(-np.inf, np.inf, (2,))
    with pytest.raises(UnsupportedSpaceError, match="squashed actions need finite bounds"):
        actor_of(model.policy)


def test_a_subclass_that_only_sets_its_layers_is_taken() -> None:
    class Wide(ActorCriticPolicy):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "net_arch": [20], "features_extractor_class": FlattenExtractor})

    model = build(PPO, VECTOR, BOX, Wide)
    check(model)
    assert actor_of(model.policy).net_arch == (20,)


def test_the_module_does_not_need_sb3_contrib() -> None:
    code = "import sys; sys.modules['sb3_contrib'] = None; import snn_rl.rl.actor"
    subprocess.run([sys.executable, "-c", code], check=True)
