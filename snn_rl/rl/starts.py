"""What a spiking stage starts from: an ANN's weights, or new ones that can remember."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from snn_rl.core.convert import DEFAULT_LEAK, DEFAULT_PERCENTILE, to_spiking
from snn_rl.core.network import SpikingNetwork
from snn_rl.core.plain import evaluation_copy
from snn_rl.core.spread import scale_currents, spread_first_synapse
from snn_rl.rl.network import StatefulNetwork


def convert_into(
    net: StatefulNetwork,
    ann: nn.Module,
    batches: Iterable[Tensor],
    percentile: float = DEFAULT_PERCENTILE,
    *,
    leak: float = DEFAULT_LEAK,
    leak_reset: bool = False,
) -> None:
    """Give ``net`` the weights of ``ann``, converted by `to_spiking` on ``batches`` of preprocessed observations.

    Raises:
        ValueError: an ANN that cannot be converted, or whose layers are not those of ``net``.
    """
    assert net.timesteps is not None
    device = next(net.network.parameters()).device
    ann = evaluation_copy(ann).to(device)
    network = to_spiking(ann, batches, percentile, net.timesteps, leak=leak, leak_reset=leak_reset)
    try:
        net.network.load_state_dict(network.state_dict())
    except RuntimeError as error:
        raise ValueError(
            "the layers of the network are not those that its policy's net_arch and features extractor describe, "
            "so a policy cannot be built for them; convert the network itself by snn_rl.to_spiking"
        ) from error


def spread_into(net: StatefulNetwork, batches: Iterable[Tensor]) -> None:
    """Give ``net`` new weights that can remember (`snn_rl.core.spread`), for an ANN that saw a stack of frames."""
    assert isinstance(net.network, SpikingNetwork)
    samples = torch.cat(list(batches))
    spread_first_synapse(net.network, samples)
    scale_currents(net.network, samples)
