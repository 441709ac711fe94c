"""ONNX: one frame of a policy or classifier, membranes in and out as named tensors, for any batch."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from snn_rl.base.files import atomic
from snn_rl.core.network import SpikingNetwork, State

INPUT, OUTPUT = "observation", "output"


class _Frame(nn.Module):
    """A network with its state as plain arguments; images are divided by 255, as SB3 divides them."""

    def __init__(self, network: SpikingNetwork, *, images: bool) -> None:
        super().__init__()
        self.network, self.images = network, images

    def forward(self, observation: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        x = observation.float() / 255 if self.images else observation.float()
        out, carries = self.network(x, state)
        return (out, *carries)


def write_onnx(network: SpikingNetwork, observation: Tensor, path: str | Path, *, images: bool = False) -> None:
    """Write one frame of ``network`` as an ONNX file, atomically.

    ``observation`` (batch, ...) is an example, whose type the model takes; ``images`` are divided by 255 first.
    The model's inputs are ``observation`` and ``carry_LAYER`` of each LIF layer, its outputs ``output`` (Q-values or
    logits) and ``new_carry_LAYER``. Carries of zeros are silence, where an episode starts. The batch is free. Weights
    of any precision are written in single precision, in which the model computes.

    Raises:
        ValueError: the package onnx is not installed, an observation the network cannot take, or a network that cannot
            be expressed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError("ONNX needs the packages onnx and onnxscript: pip install 'snn_rl[onnx]'") from error
    frame = _Frame(copy.deepcopy(network).float(), images=images).cpu().eval()
    observation = observation.cpu()
    if observation.dim() < 2 or not len(observation):
        raise ValueError(
            f"the example must be a batch of observations, (batch >= 1, ...), got {tuple(observation.shape)}"
        )
    frame.network.check_observation(observation[0])
    batch = observation.repeat(2, *[1] * (observation.dim() - 1))[:2]  # of 1, the exporter would take it as fixed
    with torch.no_grad():
        state: State = frame.network(batch.float(), None)[1]
    zeros = tuple(torch.zeros_like(carry) for carry in state)
    names = [f"carry_{name}" for name in network.lif_layers]
    free = torch.export.Dim("batch")
    with atomic(Path(path)) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own deprecations
        torch.onnx.export(
            frame,
            (batch, *zeros),
            str(temporary),
            input_names=[INPUT, *names],
            output_names=[OUTPUT, *(f"new_{name}" for name in names)],
            dynamic_shapes=({0: free}, tuple({0: free} for _ in zeros)),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
