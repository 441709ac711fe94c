"""Features extractors that recipes name; anything that `to_spiking` accepts may stand in their place."""

from __future__ import annotations

from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn


class ConvExtractor(BaseFeaturesExtractor):
    """Convolutions, each ``(channels, kernel, stride)`` and a ReLU, then a linear layer of ``features_dim`` and a ReLU.

    ``NatureCNN`` for other image sizes and smaller budgets. Observations: (channels, height, width).

    Raises:
        ValueError: the observation is no image, or a kernel is larger than what reaches it.
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        features_dim: int = 256,
        convolutions: tuple[tuple[int, int, int], ...] = ((16, 4, 2), (32, 4, 2), (32, 3, 1)),
    ) -> None:
        super().__init__(observation_space, features_dim)
        if not isinstance(observation_space, spaces.Box) or len(observation_space.shape) != 3:
            got = observation_space.shape if isinstance(observation_space, spaces.Box) else observation_space
            raise ValueError(f"ConvExtractor needs observations (channels, height, width), got {got}")
        channels, height, width = observation_space.shape
        layers: list[nn.Module] = []
        for index, (out_channels, kernel, stride) in enumerate(convolutions):
            if kernel > min(height, width):
                raise ValueError(
                    f"convolutions[{index}]: kernel {kernel} does not fit its input of {height}x{width}; "
                    "use a smaller one"
                )
            layers += [nn.Conv2d(channels, out_channels, kernel, stride), nn.ReLU()]
            channels = out_channels
            height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
        self.cnn = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, features_dim), nn.ReLU())

    def forward(self, observations: Tensor) -> Tensor:
        return self.cnn(observations)
