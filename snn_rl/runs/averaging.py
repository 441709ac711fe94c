"""An exponential moving average of a network's weights (Polyak and Juditsky 1992): what learning swings around."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from snn_rl.base.files import atomic


class WeightAverage:
    """``average <- decay * average + (1 - decay) * weights`` at each `update`; the first one copies the weights.

    ``updates`` is the time constant: what weights count for falls to 1 / e within so many updates.
    """

    def __init__(self, network: nn.Module, updates: float) -> None:
        self.network = network
        self.updates = updates
        self._average = AveragedModel(network)

    def update(self, made: int = 1) -> None:
        """Take in the weights after ``made`` more updates."""
        self._average.multi_avg_fn = get_ema_multi_avg_fn(math.exp(-made / self.updates))
        self._average.update_parameters(self.network)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The network with the averaged weights, which it gives back at the end."""
        own = {name: weight.clone() for name, weight in self.network.state_dict().items()}
        self.network.load_state_dict(self._average.module.state_dict())
        try:
            yield
        finally:
            self.network.load_state_dict(own)

    def save(self, path: Path) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in self._average.state_dict().items()}
        with atomic(path) as temporary:
            save_file(tensors, temporary)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote. Raises ValueError for a file that does not fit."""
        try:
            self._average.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(
                f"{path} holds no average of these weights ({str(error).splitlines()[0]}); remove "
                "the checkpoint beside it to begin the stage again"
            ) from error
