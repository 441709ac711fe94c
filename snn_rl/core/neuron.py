"""The leaky integrate-and-fire (LIF) layer.

Chowdhury, Rathi, Roy, "Towards Ultra Low Latency Spiking Neural Networks for Vision and Sequential Tasks Using
Temporal Pruning", equation 2, with leak ``l`` and threshold ``v``, one pair per layer:

    u[t] = l * u[t-1] + current[t] - v * o[t-1]
    o[t] = 1 if u[t] > v else 0

Between steps only ``carry[t] = l * u[t] - v * o[t]`` has to survive, so the carry is the layer's whole state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from snn_rl.core.scan import MIN_THRESHOLD, bounded_leak, bounded_threshold, lif_scan


class LIF(nn.Module):
    """A layer of LIF neurons with one trainable threshold and one trainable leak, and soft reset.

    Args:
        threshold: initial ``v`` > 0, in the units of the current.
        leak: initial ``l`` in [0, 1]; the fraction of the membrane potential kept from step to step.
        leak_reset: False for the paper's ``carry = l * u - v * o``, True for DIET-SNN's ``carry = l * (u - v * o)``.

    ``threshold`` and ``leak`` are read through bounds, so they stay legal whatever an optimiser does to the
    parameters ``raw_threshold`` and ``raw_leak`` behind them. As in DIET-SNN the spike inside the reset term is a
    constant for the gradient; the threshold beside it is not.

    Raises:
        ValueError: threshold or leak out of range.
    """

    def __init__(self, threshold: float = 1.0, leak: float = 0.9, *, leak_reset: bool = False) -> None:
        super().__init__()
        if not (math.isfinite(threshold) and threshold >= MIN_THRESHOLD):
            raise ValueError(f"threshold must be >= {MIN_THRESHOLD} and finite, got {threshold}")
        if not 0.0 <= leak <= 1.0:
            raise ValueError(f"leak must lie in [0, 1], got {leak}")
        self.raw_threshold = nn.Parameter(torch.tensor(float(threshold)))
        self.raw_leak = nn.Parameter(torch.tensor(float(leak)))
        self.leak_reset = leak_reset

    @property
    def threshold(self) -> Tensor:
        """``v``, a scalar >= `MIN_THRESHOLD`."""
        return bounded_threshold(self.raw_threshold)

    @property
    def leak(self) -> Tensor:
        """``l``, a scalar in [0, 1]."""
        return bounded_leak(self.raw_leak)

    def forward(
        self,
        current: Tensor,
        carry: Tensor | None = None,
        keep: Tensor | None = None,
        *,
        hold: int = 1,
        with_carry: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer over ``current`` (steps, batch, ...) from ``carry`` (batch, ...); None is silence.

        ``hold`` is the number of micro-steps that each step of the current lasts. ``keep`` (frames, batch) divides the
        micro-steps into frames of equal length. Where it is 0, an episode starts: the frame begins from silence,
        whatever the carry holds, NaN included. Returns the spikes (steps * hold, batch, ...) and the last carry; where
        it is not wanted (``with_carry=False``), an empty tensor in its place, which is faster.

        Raises:
            ValueError: no step, a carry that does not fit the current, or frames that do not divide the steps.
        """
        if current.dim() < 2 or current.shape[0] < 1:
            raise ValueError(f"current must be (steps >= 1, batch, ...), got shape {tuple(current.shape)}")
        if carry is not None and carry.shape != current.shape[1:]:
            raise ValueError(
                f"carry must have the shape of one step of the current, {tuple(current.shape[1:])}, "
                f"got {tuple(carry.shape)}"
            )
        if hold < 1:
            raise ValueError(f"hold must be >= 1, got {hold}")
        if keep is not None:
            steps = current.shape[0] * hold
            if keep.dim() != 2 or keep.shape[1] != current.shape[1] or keep.shape[0] < 1 or steps % keep.shape[0]:
                raise ValueError(
                    f"keep must be (frames, batch) with a number of frames that divides the {steps} steps, "
                    f"and the current's batch of {current.shape[1]}, got shape {tuple(keep.shape)}"
                )
        return lif_scan(current, carry, self.raw_threshold, self.raw_leak, keep, hold, self.leak_reset, with_carry)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold.item():.4g}, leak={self.leak.item():.4g}, leak_reset={self.leak_reset}"
