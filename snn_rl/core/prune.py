"""Temporal pruning: the same network at fewer micro-steps per frame, with thresholds that keep it awake.

At fewer micro-steps a membrane has less time to reach its threshold, and a layer that falls silent passes no gradient
to the weights before it. Chowdhury, Rathi and Roy lower T and train on. Here each threshold is lowered as well, until
its layer fires as often in a micro-step as it did: what the next layer receives then is the same on average.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from snn_rl.core.activity import count_spikes
from snn_rl.core.network import SpikingNetwork
from snn_rl.core.scan import MIN_THRESHOLD

HALVINGS = 24  # of the interval in which a threshold is sought
WIDEST = 16.0  # by which a threshold may change


@torch.no_grad()
def prune_timesteps(
    network: SpikingNetwork, timesteps: int, frames: Tensor, episode_start: Tensor | None = None
) -> SpikingNetwork:
    """A copy of ``network`` at fewer ``timesteps``, its thresholds rescaled so that spike rates per micro-step stay.

    Layer by layer, in the order of the signal: the currents that reach a layer come from layers that have been
    rescaled. A layer that is silent already keeps its threshold.

    Args:
        network: a converted network at more micro-steps.
        timesteps: T of the copy.
        frames: observations (frames, batch, ...) as `SpikingNetwork.unroll` takes them: play in sequence where
            membranes persist, one frame of many images where they do not.
        episode_start: (frames, batch), True where membranes are cleared before the frame.

    Raises:
        ValueError: ``timesteps`` that are not fewer, frames that are none, not finite or not of the network's shape.
    """
    pruned = copy.deepcopy(network).eval()
    pruned.timesteps = timesteps
    if timesteps >= network.timesteps:
        raise ValueError(f"timesteps must be < {network.timesteps}, those of the network, got {timesteps}")
    frames = frames.to(device=network.device, dtype=next(network.parameters()).dtype)
    if frames.dim() < 2 or not frames.shape[1]:
        raise ValueError(f"frames must be (frames, batch, ...) of at least one observation, got {tuple(frames.shape)}")
    if not torch.isfinite(frames).all():
        raise ValueError("frames must be finite, got NaN or infinity; clean the data")
    pruned.check_observation(frames.new_zeros(frames.shape[2:]))
    training = network.training
    network.eval()
    try:
        with count_spikes(network) as counter:
            network.unroll(frames, None, episode_start, with_state=False)
    finally:
        network.train(training)
    rates = counter.rates()
    for name in network.lif_layers:
        _match_rate(pruned, name, rates[name] / network.timesteps, frames, episode_start)
    return pruned.train(training)


def _match_rate(
    network: SpikingNetwork, name: str, wanted: float, frames: Tensor, episode_start: Tensor | None
) -> None:
    """Set one layer's threshold so that it fires ``wanted`` times per neuron and micro-step."""
    lif = network.lif_layers[name]
    if wanted == 0:
        return
    call: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.append((args, kwargs))

    with lif.register_forward_pre_hook(keep, with_kwargs=True):
        network.unroll(frames, None, episode_start, with_state=False)
    ((args, kwargs),) = call
    threshold = lif.threshold.item()
    low, high = max(MIN_THRESHOLD, threshold / WIDEST), threshold * WIDEST
    for _ in range(HALVINGS):  # the rate falls with the threshold; halved on a logarithmic scale
        middle = (low * high) ** 0.5
        lif.raw_threshold.fill_(middle)
        spikes, _ = lif(*args, **kwargs)
        if spikes.mean(dtype=torch.float64).item() >= wanted:  # of equal ones the highest: a full layer stays as it is
            low = middle
        else:
            high = middle
    lif.raw_threshold.fill_((low * high) ** 0.5)
