"""The spike and its surrogate gradient, against hand-computed values."""

import pytest
import torch

from snn_rl.core.surrogate import spike, surrogate_gradient


def test_fires_strictly_above_zero() -> None:
    z = torch.tensor([-1.0, -0.1, 0.0, 1e-7, 0.1, 3.0])
    assert spike(z).tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("z", "gradient"), [(-1.5, 0.0), (-1.0, 0.0), (-0.5, 0.15), (0.0, 0.3), (0.25, 0.225), (1.0, 0.0), (2.0, 0.0)]
)
def test_gradient_is_a_triangle_of_height_gamma(z: float, gradient: float) -> None:
    x = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    spike(x).backward()
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(gradient, abs=1e-12)
    assert surrogate_gradient(x.detach()).item() == pytest.approx(gradient, abs=1e-12)


def test_gamma_scales_the_gradient() -> None:
    x = torch.tensor(0.5, requires_grad=True)
    spike(x, gamma=1.0).backward()
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(0.5)
