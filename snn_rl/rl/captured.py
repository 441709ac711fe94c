"""A loss and its gradient as one CUDA graph.

A spiking Q-network's update is more than a thousand small operations, which a processor takes longer to issue than a
GPU to compute. Captured once, they are issued as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from snn_rl.rl.replay import Windows

WARM_UP = 2  # runs before the capture: kernels are compiled and algorithms chosen in them


class CapturedGradient:
    """``loss(windows)``, its gradient and the clipping of that, captured on ``example`` and replayed on others like it.

    Whatever the loss reads beside the windows is baked in: numbers by value, tensors by the memory they have, so that
    weights may change in place. It must neither wait for the device nor take another path from one call to the next.
    """

    def __init__(
        self,
        loss: Callable[[Windows], Tensor],
        parameters: Sequence[nn.Parameter],
        max_grad_norm: float,
        example: Windows,
    ) -> None:
        self._parameters = parameters
        self._windows = Windows(*(tensor.clone() for tensor in example))

        def run() -> Tensor:
            value, norm = gradient(loss, self._windows, parameters, max_grad_norm)
            return torch.stack([value.detach(), norm])

        device = example.observations.device  # which need not be the current one
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream(device).wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=aside):
            self._measured = run()
        self._gradients = [parameter.grad for parameter in parameters]

    def __call__(self, windows: Windows) -> tuple[float, float]:
        """Leaves the clipped gradients in the parameters' ``grad``; returns the loss and the norm before clipping."""
        for held, given in zip(self._windows, windows, strict=True):
            held.copy_(given)
        with torch.cuda.device(self._windows.observations.device):
            self._graph.replay()
        for parameter, grad in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = grad  # which an update in between, outside the graph, may have replaced
        value, norm = self._measured.tolist()
        return value, norm


def gradient(
    loss: Callable[[Windows], Tensor], windows: Windows, parameters: Sequence[nn.Parameter], max_grad_norm: float
) -> tuple[Tensor, Tensor]:
    """The loss, and the norm of its gradient, which is left in ``grad``, clipped."""
    for parameter in parameters:
        parameter.grad = None
    value = loss(windows)
    value.backward()
    return value, nn.utils.clip_grad_norm_(parameters, max_grad_norm)
