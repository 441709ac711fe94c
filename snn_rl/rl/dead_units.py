"""A DQN without its dead units: channels and neurons whose ReLU is zero on all but a few observations.

Q-networks lose many of them in training (Sokar et al. 2023, "The dormant neuron phenomenon in deep reinforcement
learning"). They change hardly any action, but a network that is converted with them multiplies and trains their
weights, in the first synapse too, which no saving of spikes makes cheaper.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import pairwise

import torch
from stable_baselines3 import DQN
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import FlattenExtractor, NatureCNN
from torch import Tensor, nn

from snn_rl.rl import ConvExtractor, SpikingDQNPolicy
from snn_rl.rl.policy import check_forwards
from snn_rl.rl.teacher import Observations

# A unit that fewer of the observations activate. Not 0: the first stacks of an episode lack frames and, as nothing else
# does, activate some that are dead in all of the play.
DEAD = 1e-2


@torch.no_grad()
def without_dead_units(dqn: DQN, observations: Iterable[Observations]) -> DQN:
    """``dqn`` with fewer units: those that at least `DEAD` of ``observations``, batches as `predict` takes, activate.

    Of a convolution a unit is a channel, active where any of its pixels is. Of a layer in which none is alive the most
    active one stays. The weights of those that stay are ``dqn``'s, so that the Q-values are the same wherever all
    others are zero. What is returned shares environment, replay and logger with ``dqn``, and has its own optimiser.

    Raises:
        ValueError: no observation, no DQN or one that spikes, a Q-network with a forward of its own, or a network that
            is not ReLUs behind a `ConvExtractor`, SB3's ``NatureCNN``, which becomes one, or flattened observations.
    """
    if not isinstance(dqn, DQN):
        raise ValueError(f"without_dead_units takes a stable_baselines3.DQN, got a {type(dqn).__name__}")
    if isinstance(dqn.policy, SpikingDQNPolicy):
        raise ValueError("the agent spikes already; leave dead units out of its ANN, before SpikingDQN.from_ann")
    policy = dqn.policy
    check_forwards(policy)
    extractor = policy.q_net.features_extractor
    # exactly these: what a subclass does in its own forward would be lost
    if type(extractor) not in (ConvExtractor, NatureCNN, FlattenExtractor) or policy.activation_fn is not nn.ReLU:
        raise ValueError(
            "dead units can be left out of ReLU networks behind a ConvExtractor, NatureCNN or FlattenExtractor, got "
            f"{policy.activation_fn.__name__} behind a {type(extractor).__name__}; train with one of these"
        )
    alive = [_alive(share) for share in _active_shares(dqn, observations)]
    sizes = [int(kept.sum()) for kept in alive]
    kwargs = dict(dqn.policy_kwargs)
    if not isinstance(extractor, FlattenExtractor):
        convolutions = [layer for layer in _layers(dqn.q_net) if isinstance(layer, nn.Conv2d)]
        kwargs["features_extractor_class"] = ConvExtractor
        kwargs["features_extractor_kwargs"] = {
            "convolutions": tuple(
                (size, layer.kernel_size[0], layer.stride[0]) for size, layer in zip(sizes, convolutions, strict=False)
            ),
            "features_dim": sizes[len(convolutions)],
        }
        sizes = sizes[len(convolutions) + 1 :]
    smaller = copy.copy(dqn)
    smaller.policy_kwargs = {**kwargs, "net_arch": sizes}
    smaller.policy = dqn.policy_class(  # type: ignore[assignment]
        dqn.observation_space, dqn.action_space, dqn.lr_schedule, **smaller.policy_kwargs
    ).to(dqn.device)
    smaller._create_aliases()
    for theirs, ours in ((dqn.q_net, smaller.q_net), (dqn.q_net_target, smaller.q_net_target)):
        _copy_alive(_layers(theirs), _layers(ours), alive)
    return smaller


def _alive(shares: Tensor) -> Tensor:
    """Which units stay, (units,)."""
    kept = shares >= DEAD
    if not kept.any():
        kept[shares.argmax()] = True
    return kept


def _layers(q_net: nn.Module) -> list[nn.Module]:
    """Extractor and head of a `QNetwork`, module by module."""
    extractor = q_net.features_extractor
    if isinstance(extractor, NatureCNN):
        return [*extractor.cnn, *extractor.linear, *q_net.q_net]  # type: ignore[misc]
    return [*(extractor.cnn if isinstance(extractor, ConvExtractor) else [extractor]), *q_net.q_net]  # type: ignore[misc]


def _active_shares(dqn: DQN, observations: Iterable[Observations]) -> list[Tensor]:
    """For each hidden layer, the share of the observations that activate a unit, (units,)."""
    layers = _layers(dqn.q_net)
    counts: dict[int, Tensor] = {}
    seen = 0
    for batch in observations:
        obs, _ = dqn.policy.obs_to_tensor(batch)  # (batch, ...), channels first
        x = preprocess_obs(obs, dqn.observation_space, dqn.policy.normalize_images)
        assert isinstance(x, Tensor)
        seen += len(x)
        for index, layer in enumerate(layers):
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                active = (x.flatten(2).amax(2) if x.dim() > 2 else x) > 0  # (batch, units)
                counts[index] = counts.get(index, 0) + active.sum(0)
    if not seen:
        raise ValueError("observations must hold at least one batch, got none")
    return [count / seen for count in counts.values()]


def _copy_alive(theirs: list[nn.Module], ours: list[nn.Module], alive: list[Tensor]) -> None:
    """The rows and columns of each weight that belong to units that are alive; inputs and Q-values all are."""
    synapses = [layer for layer in theirs if isinstance(layer, nn.Conv2d | nn.Linear)]
    copies = [layer for layer in ours if isinstance(layer, nn.Conv2d | nn.Linear)]
    inputs, outputs = (torch.ones(n, dtype=torch.bool) for n in (synapses[0].weight.shape[1], len(synapses[-1].weight)))
    masks = [inputs, *(kept.cpu() for kept in alive), outputs]
    for synapse, smaller, (before, after) in zip(synapses, copies, pairwise(masks), strict=True):
        # behind a Flatten, each channel before it has several columns
        columns = before.repeat_interleave(synapse.weight.shape[1] // len(before))
        weights = synapse.state_dict()
        weight, bias = (weights[name].cpu()[after] for name in ("weight", "bias"))
        smaller.load_state_dict({"weight": weight[:, columns], "bias": bias})
