"""Action heads: what the outputs of an actor's network mean, how they become actions, how two of them are compared.

An actor's network maps a preprocessed observation to ``size`` numbers. Its head turns these into an action of the
environment, and measures how far a student's outputs are from its teacher's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from torch.nn import functional as F

from snn_rl.rl.losses import distillation_loss
from snn_rl.rl.spaces import UnsupportedSpaceError, check_action_space, in_one_line


class Head(ABC):
    """What the outputs of an actor's network mean."""

    action_space: spaces.Space
    size: int  # outputs of the network

    @abstractmethod
    def actions(self, out: np.ndarray) -> np.ndarray:
        """Greedy actions (batch, *action_space.shape) of outputs (batch, size), as the environment takes them."""

    @abstractmethod
    def loss(self, out: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
        """How far outputs (..., size) are from a teacher's, over the entries of ``mask`` (...); a scalar >= 0."""


@dataclass(frozen=True)
class QValues(Head):
    """One Q-value per action of a ``Discrete`` space. The action of the highest is taken.

    The loss is `distillation_loss` at ``temperature``: Q-values have no scale of their own.
    """

    action_space: spaces.Discrete
    temperature: float = 0.5

    @property
    def size(self) -> int:  # type: ignore[override]
        return int(self.action_space.n)

    def actions(self, out: np.ndarray) -> np.ndarray:
        return out.argmax(axis=-1)

    def loss(self, out: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
        return distillation_loss(out, wanted, mask, self.temperature)


@dataclass(frozen=True)
class Logits(Head):
    """Unnormalised log-probabilities of ``Discrete`` or ``MultiDiscrete`` actions, component after component.

    The loss is the Kullback-Leibler divergence from the teacher's distribution (Rusu et al. 2016), summed over the
    components.
    """

    action_space: spaces.Discrete | spaces.MultiDiscrete

    @property
    def sizes(self) -> list[int]:
        """Choices of each component."""
        space = self.action_space
        return [int(space.n)] if isinstance(space, spaces.Discrete) else [int(n) for n in space.nvec]

    @property
    def size(self) -> int:  # type: ignore[override]
        return sum(self.sizes)

    def actions(self, out: np.ndarray) -> np.ndarray:
        parts = np.split(out, np.cumsum(self.sizes)[:-1], axis=-1)
        chosen = [part.argmax(axis=-1) for part in parts]
        return chosen[0] if isinstance(self.action_space, spaces.Discrete) else np.stack(chosen, axis=-1)

    def loss(self, out: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
        divergence = out.new_zeros(mask.shape)
        for ours, theirs in zip(out.split(self.sizes, -1), wanted.split(self.sizes, -1), strict=True):
            ours, theirs = F.log_softmax(ours, -1), F.log_softmax(theirs, -1)
            divergence = divergence + F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        return _mean(divergence, mask)


@dataclass(frozen=True)
class Bits(Head):
    """One logit per bit of a ``MultiBinary`` space. A bit is set where its logit is positive."""

    action_space: spaces.MultiBinary

    @property
    def size(self) -> int:  # type: ignore[override]
        return int(np.prod(self.action_space.shape))

    def actions(self, out: np.ndarray) -> np.ndarray:
        return (out > 0).astype(np.int8).reshape(len(out), *self.action_space.shape)

    def loss(self, out: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
        entropy = F.binary_cross_entropy_with_logits(wanted, wanted.sigmoid(), reduction="none")
        cross = F.binary_cross_entropy_with_logits(out, wanted.sigmoid(), reduction="none")
        return _mean((cross - entropy).sum(-1), mask)


@dataclass(frozen=True)
class Continuous(Head):
    """The mean of a continuous action. ``squashed`` outputs go through a tanh onto the bounds of the space.

    Others are clipped to the bounds, as SB3 clips them. The loss is the Huber loss of the action that the environment
    gets, in units of half the width of its bounds. Outputs beyond a bound to which the teacher's are clipped, too, are
    the same action, and cost nothing; outputs beyond the other bound still have a gradient.
    """

    action_space: spaces.Box
    squashed: bool
    # The bounds as tensors, by device and type: a CUDA graph cannot be captured while they are copied to the device.
    _bounds: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def size(self) -> int:  # type: ignore[override]
        return int(np.prod(self.action_space.shape))

    def actions(self, out: np.ndarray) -> np.ndarray:
        low, high = self.action_space.low, self.action_space.high
        out = out.reshape(len(out), *self.action_space.shape)
        if self.squashed:
            out = low + 0.5 * (np.tanh(out) + 1.0) * (high - low)  # which rounding may put beyond a bound
        return np.clip(out, low, high).astype(self.action_space.dtype)

    def _bounds_on(self, out: Tensor) -> tuple[Tensor, Tensor]:
        key = (out.device, out.dtype)
        if key not in self._bounds:
            space = self.action_space
            low, high = (
                torch.as_tensor(b.reshape(-1), dtype=out.dtype, device=out.device) for b in (space.low, space.high)
            )
            self._bounds[key] = low, high
        return self._bounds[key]

    def loss(self, out: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
        if self.squashed:
            error = out.tanh() - wanted.tanh()
        else:
            low, high = self._bounds_on(out)
            unit = (high - low) / 2
            unit = torch.where(unit.isfinite(), unit, torch.ones_like(unit))
            wanted = torch.minimum(torch.maximum(wanted, low), high)
            same = ((wanted >= high) & (out > high)) | ((wanted <= low) & (out < low))
            error = torch.where(same, torch.zeros_like(out), (out - wanted) / unit)
        return _mean(F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none", beta=0.1).mean(-1), mask)


def _mean(loss: Tensor, mask: Tensor) -> Tensor:
    return (loss * mask).sum() / mask.sum().clamp(min=1)


HEADS = ("values", "logits", "mean", "squashed")  # as a policy file names them


def head_of(kind: str, action_space: spaces.Space) -> Head:
    """The head of a ``kind`` in `HEADS` for an action space.

    Raises:
        UnsupportedSpaceError: a space for which there is no such head, or that `check_action_space` refuses.
    """
    check_action_space(action_space)
    if kind == "values" and isinstance(action_space, spaces.Discrete):
        return QValues(action_space)
    if kind == "logits" and isinstance(action_space, spaces.Discrete | spaces.MultiDiscrete):
        return Logits(action_space)
    if kind == "logits" and isinstance(action_space, spaces.MultiBinary):
        return Bits(action_space)
    if kind in ("mean", "squashed") and isinstance(action_space, spaces.Box):
        return Continuous(action_space, kind == "squashed")
    raise UnsupportedSpaceError(f"an actor of {kind} cannot choose among {in_one_line(action_space)}")


def kind_of(head: Head) -> str:
    """The inverse of `head_of`."""
    if isinstance(head, QValues):
        return "values"
    if isinstance(head, Continuous):
        return "squashed" if head.squashed else "mean"
    return "logits"
