"""The layers that conversion knows, and what counts as one of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SYNAPSES = (nn.Linear, *CONVOLUTIONS)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
AVERAGE_POOLINGS = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
AVERAGE_POOLING_FUNCTIONS = (
    F.avg_pool1d,
    F.avg_pool2d,
    F.avg_pool3d,
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
)
MAX_POOLINGS = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
)
MAX_POOLING_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.max_pool1d: nn.MaxPool1d,
    F.max_pool2d: nn.MaxPool2d,
    F.max_pool3d: nn.MaxPool3d,
    torch.max_pool1d: nn.MaxPool1d,
    torch.max_pool2d: nn.MaxPool2d,
    torch.max_pool3d: nn.MaxPool3d,
    F.adaptive_max_pool1d: nn.AdaptiveMaxPool1d,
    F.adaptive_max_pool2d: nn.AdaptiveMaxPool2d,
    F.adaptive_max_pool3d: nn.AdaptiveMaxPool3d,
}
CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)

KNOWN = (
    *SYNAPSES,
    *BATCH_NORMS,
    *DROPOUTS,
    *AVERAGE_POOLINGS,
    *MAX_POOLINGS,
    nn.ReLU,
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
)
# What decides the output of a layer beside its parameters.
METHODS = ("__call__", "__getattr__", "__getattribute__", "forward", "_conv_forward")


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """Which of `KNOWN` computes what ``module`` does; None for any other module.

    A subclass counts as its base class where it does not override how the output is computed.
    """
    for kind in KNOWN:
        if isinstance(module, kind):
            same = all(getattr(type(module), name, None) is getattr(kind, name, None) for name in METHODS)
            return kind if same and "forward" not in vars(module) else None
    return None


def is_kind(module: nn.Module | None, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether ``module`` computes what one of ``kinds`` does."""
    return module is not None and kind_of(module) in kinds
