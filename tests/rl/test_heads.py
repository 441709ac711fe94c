"""Each head's actions and losses against numbers worked out by hand, and what holds for whatever outputs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence

from snn_rl.rl.heads import HEADS, Bits, Continuous, Head, Logits, QValues, head_of, kind_of
from snn_rl.rl.spaces import UnsupportedSpaceError

LOW, HIGH = np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32)
BOX = spaces.Box(LOW, HIGH)

EVERY: dict[str, Head] = {
    "values": QValues(spaces.Discrete(3)),
    "discrete": Logits(spaces.Discrete(3)),
    "multi-discrete": Logits(spaces.MultiDiscrete([2, 3])),
    "bits": Bits(spaces.MultiBinary((2, 2))),
    "mean": Continuous(BOX, squashed=False),
    "unbounded": Continuous(spaces.Box(-np.inf, np.inf, (2, 2)), squashed=False),
    "squashed": Continuous(BOX, squashed=True),
}
ALL = torch.ones(1, dtype=torch.bool)


def loss(head: Head, out: list[float], wanted: list[float]) -> float:
    """Of one frame."""
    return head.loss(torch.tensor([out]), torch.tensor([wanted]), ALL).item()


def huber(error: float) -> float:
    """By its definition, with its bend at 0.1."""
    return error**2 / 0.2 if abs(error) < 0.1 else abs(error) - 0.05


# --- actions


@pytest.mark.parametrize("kind", ["values", "discrete"])
def test_of_discrete_actions_the_highest_is_taken(kind: str) -> None:
    out = np.array([[0.1, 3.0, -2.0], [-5.0, -4.0, -3.0]], np.float32)
    np.testing.assert_array_equal(EVERY[kind].actions(out), [1, 2])


def test_components_of_multi_discrete_actions_stand_side_by_side() -> None:
    out = np.array([[1.0, 0.0, 9.0, 8.0, 7.0], [0.0, 1.0, -9.0, -8.0, -7.0]], np.float32)
    np.testing.assert_array_equal(EVERY["multi-discrete"].actions(out), [[0, 0], [1, 2]])


def test_bits_are_set_where_their_logit_is_positive() -> None:
    actions = EVERY["bits"].actions(np.array([[0.1, -0.1, 0.0, 5.0]], np.float32))
    np.testing.assert_array_equal(actions, [[[1, 0], [0, 1]]])
    assert actions.dtype == np.int8


def test_a_mean_is_clipped_to_the_bounds() -> None:
    actions = EVERY["mean"].actions(np.array([[3.0, 0.25], [-1.5, -0.5]], np.float32))
    np.testing.assert_array_equal(actions, np.array([[2.0, 0.25], [-1.5, 0.0]], np.float32))
    free = EVERY["unbounded"].actions(np.array([[1e6, -1e6, 0.0, 1.0]], np.float32))
    np.testing.assert_array_equal(free, np.array([[[1e6, -1e6], [0.0, 1.0]]], np.float32))


def test_a_squashed_output_goes_through_a_tanh_onto_the_bounds() -> None:
    actions = EVERY["squashed"].actions(np.array([[math.atanh(0.5), 0.0], [99.0, -99.0]], np.float32))
    np.testing.assert_allclose(actions, [[1.0, 0.5], [2.0, 0.0]], rtol=1e-6)


@settings(deadline=None, max_examples=50)
@given(data=st.data(), name=st.sampled_from(sorted(EVERY)))
def test_actions_are_in_their_space(data: st.DataObject, name: str) -> None:
    head = EVERY[name]
    out = np.array([data.draw(numbers(head.size, 2.0**99))], np.float32)
    (action,) = head.actions(out)
    value = np.int64(action) if isinstance(head.action_space, spaces.Discrete) else action
    assert head.action_space.contains(value)


# --- losses


def test_the_loss_of_logits_is_the_divergence_from_the_teachers_distribution() -> None:
    # probabilities 3/4, 1/4 of the student, 1/2, 1/2 of the teacher
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert loss(Logits(spaces.Discrete(2)), [math.log(3.0), 0.0], [7.0, 7.0]) == pytest.approx(expected, rel=1e-5)
    out, wanted = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    divergence = torch.zeros(4)
    for part in (slice(0, 2), slice(2, 5)):
        divergence += kl_divergence(Categorical(logits=wanted[:, part]), Categorical(logits=out[:, part]))
    given_loss = EVERY["multi-discrete"].loss(out, wanted, torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(given_loss, divergence.mean())


def test_the_loss_of_bits_is_the_divergence_of_each() -> None:
    out, wanted = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))
    divergence = kl_divergence(Bernoulli(logits=wanted), Bernoulli(logits=out)).sum(-1)
    torch.testing.assert_close(EVERY["bits"].loss(out, wanted, torch.ones(6, dtype=torch.bool)), divergence.mean())


def test_the_loss_of_a_mean_is_in_half_widths_of_the_bounds() -> None:
    # half widths 2 and 1/2: errors of 0.1 / 2 and 0.2 / 0.5
    expected = (huber(0.05) + huber(0.4)) / 2
    assert loss(EVERY["mean"], [0.6, 0.7], [0.5, 0.5]) == pytest.approx(expected, rel=1e-4)
    expected = (huber(0.5) + 3 * huber(0.0)) / 4  # where there are no bounds, as it is
    assert loss(EVERY["unbounded"], [1.5, 0, 0, 0], [1.0, 0, 0, 0]) == pytest.approx(expected, rel=1e-4)


def test_outputs_beyond_a_bound_are_the_action_at_the_bound() -> None:
    head = EVERY["mean"]
    assert loss(head, [5.0, 9.0], [2.5, 3.0]) == 0.0  # both clipped to (2, 1)
    assert loss(head, [-5.0, -9.0], [-2.5, -3.0]) == 0.0
    # the teacher's action is clipped: the student is to reach the bound, not what lies behind it
    assert loss(head, [1.9, 0.5], [7.0, 0.5]) == pytest.approx(huber(0.05) / 2, rel=1e-4)
    # the student's output is not: the further beyond the bound, the more it costs
    near, far = (loss(head, [out, 0.5], [1.0, 0.5]) for out in (2.0, 6.0))
    assert (near, far) == pytest.approx((huber(0.5) / 2, huber(2.5) / 2), rel=1e-4)


@pytest.mark.parametrize(("out", "wanted", "sign"), [(9.0, -9.0, 1), (-9.0, 9.0, -1), (9.0, 0.0, 1), (-9.0, 0.0, -1)])
def test_beyond_the_wrong_bound_there_is_still_a_way_back(out: float, wanted: float, sign: int) -> None:
    given_out = torch.tensor([[out, 0.5]], requires_grad=True)
    EVERY["mean"].loss(given_out, torch.tensor([[wanted, 0.5]]), ALL).backward()
    assert given_out.grad is not None
    assert torch.sign(given_out.grad[0, 0]).item() == sign  # a step against it leads back
    assert given_out.grad[0, 1].item() == 0.0


def test_the_loss_of_squashed_outputs_is_that_of_their_tanh() -> None:
    out, wanted = [math.atanh(0.9), math.atanh(-0.3)], [math.atanh(0.85), math.atanh(0.1)]
    assert loss(EVERY["squashed"], out, wanted) == pytest.approx((huber(0.05) + huber(0.4)) / 2, rel=1e-3)


# --- whatever the outputs


def numbers(size: int, most: float = 50.0) -> Any:
    return st.lists(st.floats(-most, most, width=32), min_size=size, max_size=size)


def drawn(data: st.DataObject, head: Head, frames: int) -> Tensor:
    return torch.tensor([data.draw(numbers(head.size)) for _ in range(frames)]).reshape(frames, head.size)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), name=st.sampled_from(sorted(EVERY)), mask=st.lists(st.booleans(), min_size=1, max_size=4))
def test_losses(data: st.DataObject, name: str, mask: list[bool]) -> None:
    """Never negative, zero at equal outputs, and blind to frames outside the mask."""
    head = EVERY[name]
    out, wanted, counted = drawn(data, head, len(mask)), drawn(data, head, len(mask)), torch.tensor(mask)
    value = head.loss(out, wanted, counted)
    assert torch.isfinite(value)
    assert value.item() >= -1e-5
    assert head.loss(wanted, wanted, counted).item() == pytest.approx(0.0, abs=1e-5)
    if not any(mask):
        assert value.item() == 0.0
    hidden = [torch.where(counted[:, None], x, torch.full_like(x, 7.0)) for x in (out, wanted)]
    torch.testing.assert_close(head.loss(*hidden, counted), value, rtol=1e-5, atol=1e-6)
    if any(mask):  # the mean over the frames that count
        torch.testing.assert_close(
            head.loss(out[counted], wanted[counted], counted[counted]), value, rtol=1e-4, atol=1e-5
        )


@settings(deadline=None, max_examples=60)
@given(data=st.data(), name=st.sampled_from(sorted(EVERY)))
def test_gradients_are_finite_and_zero_outside_the_mask(data: st.DataObject, name: str) -> None:
    head = EVERY[name]
    out = drawn(data, head, 2).requires_grad_()
    head.loss(out, drawn(data, head, 2), torch.tensor([True, False])).backward()
    assert out.grad is not None
    assert torch.isfinite(out.grad).all()
    assert not out.grad[1].any()


# --- kinds


@pytest.mark.parametrize("name", sorted(EVERY))
def test_a_head_comes_back_from_its_kind(name: str) -> None:
    head = EVERY[name]
    assert kind_of(head) in HEADS
    again = head_of(kind_of(head), head.action_space)
    assert type(again) is type(head)
    assert (again.size, again.action_space) == (head.size, head.action_space)


@pytest.mark.parametrize(
    ("kind", "space", "message"),
    [
        ("values", BOX, "an actor of values cannot choose among Box"),
        ("values", spaces.MultiDiscrete([2, 2]), r"an actor of values cannot choose among MultiDiscrete\(\[2 2\]\)"),
        ("logits", BOX, "an actor of logits cannot choose among Box"),
        ("mean", spaces.Discrete(2), r"an actor of mean cannot choose among Discrete\(2\)"),
        ("guess", spaces.Discrete(2), "an actor of guess cannot"),
        ("logits", spaces.Discrete(3, start=1), r"Discrete actions from 0 on, got Discrete\(3, start=1\)"),
        ("logits", spaces.MultiDiscrete([2, 2], start=[0, 3]), r"to add \[0, 3\] to each action"),
        ("logits", spaces.MultiDiscrete([[2, 2]]), "MultiDiscrete actions must have one axis"),
        ("mean", spaces.Box(-1, 1, ()), "actions must have an axis and an entry"),
        ("logits", spaces.Dict(a=spaces.Discrete(2)), "actions must be Box, Discrete, MultiDiscrete or MultiBinary"),
    ],
)
def test_what_no_head_fits_is_refused_in_one_line(kind: str, space: spaces.Space, message: str) -> None:
    with pytest.raises(UnsupportedSpaceError, match=message) as caught:
        head_of(kind, space)
    assert "\n" not in str(caught.value)
