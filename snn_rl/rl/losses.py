"""What a spiking Q-network learns from: a teacher's Q-values, and n-step returns."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from snn_rl.rl.replay import Windows


def distillation_loss(q_t: Tensor, teacher_t: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """How far Q-values (..., actions) are from a teacher's, over the entries of ``mask`` (...); a scalar >= 0.

    Two terms, each free of the reward's scale: the Kullback-Leibler divergence between the softmaxes of the Q-values
    (policy distillation, Rusu et al. 2016) at ``temperature`` times the median, over states, of the teacher's spread
    between best and worst action; and a tenth of the Huber loss of the values, the mean over actions, in units of the
    teacher's root mean square. Q-values differ far more between states than between actions, so a plain squared error
    learns the value and leaves the choice of action to noise. The median, because a few states where all is lost
    or won spread widely; not the values' own deviation, because a good agent's may hardly differ at all.
    """
    value, value_teacher = q_t.mean(-1, keepdim=True), teacher_t.mean(-1, keepdim=True)
    counted = mask.sum().clamp(min=1)
    # The median of the mask's entries. Neither indexed by the mask nor by `nanmedian`, which a GPU is waited for.
    spread = torch.where(mask, teacher_t.amax(-1) - teacher_t.amin(-1), torch.inf).flatten().sort().values
    scale = temperature * spread.gather(0, (counted - 1).unsqueeze(0) // 2).clamp(min=1e-6)
    divergence = F.kl_div(
        F.log_softmax((q_t - value) / scale, -1),
        F.log_softmax((teacher_t - value_teacher) / scale, -1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    unit = ((value_teacher.squeeze(-1).square() * mask).sum() / counted).sqrt().clamp(min=1e-6)
    loss = divergence + 0.1 * F.smooth_l1_loss(value / unit, value_teacher / unit, reduction="none").squeeze(-1)
    return (loss * mask).sum() / counted


def n_step_returns(
    windows: Windows, start: int, length: int, n_steps: int, gamma: float
) -> tuple[Tensor, Tensor, Tensor]:
    """n-step returns of the slots ``start .. start + length - 1``, each of shape (length, batch).

    Returns the discounted rewards up to the end of the episode or n steps; the slot, counted from ``start``, to
    bootstrap at; and the discount of that bootstrap, 0 where the episode terminated. A truncated episode bootstraps
    at its terminal observation, which is a slot of its own.
    """
    rewards = torch.zeros_like(windows.rewards[start : start + length])
    steps = torch.zeros_like(windows.actions[start : start + length])
    going = torch.ones_like(windows.acted[start : start + length])
    terminated = torch.zeros_like(going)
    for j in range(n_steps):
        here = slice(start + j, start + j + length)
        going = going & windows.acted[here]
        rewards = rewards + going * gamma**j * windows.rewards[here]
        terminated = terminated | (going & windows.terminated[here])
        steps = steps + going
    slot = torch.arange(length, device=steps.device).unsqueeze(1) + steps
    return rewards, slot, gamma**steps * ~terminated
