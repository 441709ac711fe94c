"""The LIF layer against hand-computed trajectories, snnTorch, and PyTorch's autograd on the plain equations."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import snntorch
import torch
from hypothesis import given, settings
from torch import Tensor

from snn_rl.core.neuron import LIF
from snn_rl.core.scan import MIN_THRESHOLD
from snn_rl.core.surrogate import spike


def reference(
    current: Tensor, carry: Tensor, v: Tensor, leak: Tensor, keep: Tensor | None, leak_reset: bool
) -> tuple[Tensor, Tensor]:
    """The paper's equation 2 step by step, differentiated by autograd."""
    spikes = []
    frame = len(current) if keep is None else len(current) // len(keep)
    for t, current_t in enumerate(current):
        if keep is not None and t % frame == 0:
            carry = carry * keep[t // frame].view(-1, *[1] * (carry.dim() - 1))
        u = carry + current_t
        o = spike(u / v - 1)
        spent = v * o.detach()
        carry = leak * (u - spent) if leak_reset else leak * u - spent
        spikes.append(o)
    return torch.stack(spikes), carry


def test_trajectory_by_hand() -> None:
    # v = 1, l = 0.5, current 0.75 throughout:
    # u = 0.75            -> 0, carry 0.375
    # u = 1.125           -> 1, carry 0.5625 - 1 = -0.4375
    # u = 0.3125          -> 0, carry 0.15625
    # u = 0.90625         -> 0, carry 0.453125
    # u = 1.203125        -> 1, carry 0.6015625 - 1 = -0.3984375
    spikes, carry = LIF(threshold=1.0, leak=0.5)(torch.full((5, 1, 1), 0.75))
    assert spikes.flatten().tolist() == [0, 1, 0, 0, 1]
    assert carry.item() == -0.3984375


def test_trajectory_by_hand_with_leaking_reset() -> None:
    # carry = l * (u - v * o): u = 0.75, carry 0.375; u = 1.125, carry 0.5 * 0.125 = 0.0625; u = 0.8125, carry 0.40625
    spikes, carry = LIF(threshold=1.0, leak=0.5, leak_reset=True)(torch.full((3, 1, 1), 0.75))
    assert spikes.flatten().tolist() == [0, 1, 0]
    assert carry.item() == 0.40625


def test_at_the_threshold_there_is_no_spike() -> None:
    spikes, _ = LIF(threshold=0.3, leak=1.0)(torch.full((1, 1, 1), LIF(0.3).threshold.item()))
    assert spikes.item() == 0


@pytest.mark.parametrize(("threshold", "leak"), [(1.0, 0.9), (0.7, 0.5), (2.5, 1.0), (1.0, 0.0)])
def test_same_spikes_as_snntorch(threshold: float, leak: float) -> None:
    # snnTorch's Leaky with a delayed subtractive reset is this very neuron
    torch.manual_seed(0)
    current = torch.randn(300, 4, 5)
    theirs = snntorch.Leaky(beta=leak, threshold=threshold, reset_mechanism="subtract", reset_delay=True)
    membrane = theirs.init_leaky()
    expected = []
    for current_t in current:
        spikes_t, membrane = theirs(current_t, membrane)
        expected.append(spikes_t)
    spikes, _ = LIF(threshold, leak)(current)
    assert 0 < spikes.mean() < 1
    torch.testing.assert_close(spikes, torch.stack(expected), rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(1, 3),
    steps=st.integers(1, 7),
    batch=st.integers(1, 4),
    shape=st.lists(st.integers(1, 3), max_size=3),
    threshold=st.floats(0.05, 3.0),
    leak=st.floats(0.0, 1.0),
    leak_reset=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_forward_and_all_gradients_match_autograd(
    frames: int,
    steps: int,
    batch: int,
    shape: list[int],
    threshold: float,
    leak: float,
    leak_reset: bool,
    masked: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    # a transposed view: the layer must not rely on memory order
    current = torch.randn(batch, frames * steps, *shape, dtype=torch.float64).transpose(0, 1).requires_grad_()
    carry = torch.randn(batch, *shape, dtype=torch.float64, requires_grad=True)
    keep = torch.randint(0, 2, (frames, batch)).double() if masked else None
    lif = LIF(threshold, leak, leak_reset=leak_reset).double()
    weights = torch.randn(frames * steps, batch, *shape, dtype=torch.float64)
    weights_carry = torch.randn_like(carry)
    inputs = [current, carry, lif.raw_threshold, lif.raw_leak]
    results = []
    for spikes, last in (
        lif(current, carry, keep),
        reference(current, carry, lif.threshold, lif.leak, keep, leak_reset),
    ):
        loss = (spikes * weights).sum() + (last * weights_carry).sum()
        results.append((spikes, last, *torch.autograd.grad(loss, inputs)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_a_sequence_is_its_parts() -> None:
    torch.manual_seed(0)
    lif = LIF(0.8, 0.7)
    current = torch.randn(9, 2, 3)
    whole, last = lif(current)
    first, carry = lif(current[:4])
    second, carry = lif(current[4:], carry)
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=0)
    torch.testing.assert_close(carry, last, rtol=0, atol=0)


def test_where_keep_is_zero_the_frame_starts_from_silence() -> None:
    torch.manual_seed(0)
    lif = LIF(0.8, 0.7)
    current = torch.randn(6, 2, 3)  # two frames of three steps
    spikes, carry = lif(current, None, torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    fresh, fresh_carry = lif(current[3:])
    kept, kept_carry = lif(current)
    torch.testing.assert_close(spikes[3:, 0], fresh[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(carry[0], fresh_carry[0], rtol=0, atol=0)
    torch.testing.assert_close(spikes[:, 1], kept[:, 1], rtol=0, atol=0)
    torch.testing.assert_close(carry[1], kept_carry[1], rtol=0, atol=0)


@given(raw=st.floats(-1e6, 1e6), gradient=st.floats(-1e6, 1e6), lr=st.floats(1e-6, 1e3))
@settings(max_examples=50, deadline=None)
def test_threshold_and_leak_stay_legal_whatever_the_optimiser_does(raw: float, gradient: float, lr: float) -> None:
    lif = LIF()
    with torch.no_grad():
        lif.raw_threshold.fill_(raw)
        lif.raw_leak.fill_(raw)
    optimiser = torch.optim.SGD(lif.parameters(), lr=lr)
    for p in lif.parameters():
        p.grad = torch.tensor(gradient)
    optimiser.step()
    # in the parameter's own precision, in which the bound is the nearest number to MIN_THRESHOLD
    assert lif.threshold >= torch.tensor(MIN_THRESHOLD)
    assert lif.threshold > 0
    assert 0 <= lif.leak <= 1
    spikes, _ = lif(torch.ones(3, 1, 1))
    assert torch.isfinite(spikes).all()


def test_a_leak_thrown_out_of_bounds_comes_back() -> None:
    lif = LIF(leak=0.9)
    with torch.no_grad():
        lif.raw_leak.fill_(1.5)
    optimiser = torch.optim.SGD(lif.parameters(), lr=0.1)
    for _ in range(20):
        optimiser.zero_grad()
        (lif.leak**2).backward()  # descends towards smaller leaks
        optimiser.step()
    assert lif.leak < 0.9


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_threshold_is_named(threshold: float) -> None:
    with pytest.raises(ValueError, match=f"threshold must be .*, got {threshold}"):
        LIF(threshold=threshold)


@pytest.mark.parametrize("leak", [-0.1, 1.1, float("nan")])
def test_bad_leak_is_named(leak: float) -> None:
    with pytest.raises(ValueError, match=rf"leak must lie in \[0, 1\], got {leak}"):
        LIF(leak=leak)


def test_bad_shapes_are_named() -> None:
    lif = LIF()
    with pytest.raises(ValueError, match=r"current must be \(steps >= 1, batch"):
        lif(torch.zeros(0, 2, 3))
    with pytest.raises(ValueError, match=r"carry must have the shape .*\(2, 3\), got \(3, 3\)"):
        lif(torch.zeros(4, 2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"keep must be \(frames, batch\)"):
        lif(torch.zeros(4, 2, 3), None, torch.ones(3, 2))
