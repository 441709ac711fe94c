"""Losses against plain loops and against their own definition, state by state."""

from __future__ import annotations

import math

import pytest
import torch

from snn_rl.rl.losses import distillation_loss, n_step_returns
from snn_rl.rl.replay import Windows


def random_windows(length: int, batch: int, seed: int = 0) -> Windows:
    rng = torch.Generator().manual_seed(seed)

    def flags(p: float) -> torch.Tensor:
        return torch.rand(length, batch, generator=rng) < p

    acted = flags(0.8)
    return Windows(
        torch.randn(length, batch, 4, generator=rng),
        torch.randint(0, 2, (length, batch), generator=rng),
        torch.randn(length, batch, generator=rng),
        acted,
        flags(0.2) & acted,
        flags(0.1),
        torch.randn(length, batch, 2, generator=rng),
        flags(0.9),
    )


@pytest.mark.parametrize("n", [1, 3, 5])
def test_n_step_returns_by_a_plain_loop(n: int) -> None:
    start, length, gamma = 2, 6, 0.9
    w = random_windows(start + length + n, 50)
    returns, slot, discount = n_step_returns(w, start, length, n, gamma)
    for b in range(50):
        for t in range(length):
            total, weight, at, terminated = 0.0, 1.0, start + t, False
            for _ in range(n):
                if not w.acted[at, b]:
                    break
                total += weight * w.rewards[at, b].item()
                weight *= gamma
                terminated = bool(w.terminated[at, b])
                at += 1
                if terminated:
                    break
            # behind a terminated step comes its terminal observation, from which no action is taken; where random
            # flags say otherwise the buffer would never have, so only rows that can occur are compared
            if terminated and w.acted[at, b] and at < start + t + n:
                continue
            assert returns[t, b].item() == pytest.approx(total, abs=1e-5)
            assert slot[t, b].item() == at - start
            assert discount[t, b].item() == pytest.approx(0.0 if terminated else weight, abs=1e-6)


# spreads 0.4, 0.2, 4.0: median 0.4, of the first two alone the lower, as torch's own median
@pytest.mark.parametrize(("counted", "median"), [([True, True, True], 0.4), ([True, True, False], 0.2)])
def test_distillation_loss_by_hand(counted: list[bool], median: float) -> None:
    teacher = [[10.0, 10.4], [10.2, 10.0], [9.0, 13.0]]
    student = [[11.0, 11.2], [10.0, 10.1], [9.5, 12.0]]
    pairs = [(q, p) for q, p, counts in zip(student, teacher, counted, strict=True) if counts]
    unit = math.sqrt(sum((sum(p) / 2) ** 2 for _, p in pairs) / len(pairs))
    scale = 0.5 * median
    losses = []
    for q, p in pairs:
        right, right_teacher = (1 / (1 + math.exp((a - b) / scale)) for a, b in (q, p))
        divergence = right_teacher * math.log(right_teacher / right)
        divergence += (1 - right_teacher) * math.log((1 - right_teacher) / (1 - right))
        error = abs(sum(q) - sum(p)) / 2 / unit  # below 1, where Huber's loss is half the square
        losses.append(divergence + 0.1 * error**2 / 2)
    loss = distillation_loss(torch.tensor(student), torch.tensor(teacher), torch.tensor(counted), 0.5)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_distillation_loss_is_zero_at_the_teacher_and_ignores_masked_entries() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(5, 4, 3)
    mask = torch.rand(5, 4) < 0.7
    assert distillation_loss(teacher, teacher, mask, 0.3).item() == pytest.approx(0.0, abs=1e-6)
    student = teacher + torch.randn_like(teacher)
    spoiled = student.clone()
    spoiled[~mask] += 100
    assert distillation_loss(student, teacher, mask, 0.3) > 0
    assert distillation_loss(student, teacher, mask, 0.3) == distillation_loss(spoiled, teacher, mask, 0.3)
    assert distillation_loss(student, teacher, torch.zeros_like(mask), 0.3) == 0
    # the teacher's neither: the scales are those of the entries that count
    hidden = teacher.clone()
    hidden[~mask] *= 1000
    assert distillation_loss(student, hidden, mask, 0.3) == distillation_loss(student, teacher, mask, 0.3)
    # the scale of the return does not matter
    torch.testing.assert_close(
        distillation_loss(student, teacher, mask, 0.3), distillation_loss(7 * student, 7 * teacher, mask, 0.3)
    )


def test_distillation_weighs_the_choice_of_action_where_values_hardly_differ() -> None:
    # a good agent's Q-values on CartPole: about 100 everywhere, actions 0.04 apart
    torch.manual_seed(0)
    gap = 0.04 * torch.randn(200)
    value = 100 + 0.05 * torch.randn(200)
    teacher = torch.stack([value - gap / 2, value + gap / 2], -1)
    everywhere = torch.ones(200, dtype=torch.bool)
    right_choice = distillation_loss(teacher + 1.0, teacher, everywhere, 0.5)
    right_value = distillation_loss(teacher.flip(-1), teacher, everywhere, 0.5)
    assert right_choice < 0.01 * right_value
