"""Actions and spaces of those who act: random actions, and the checks before an environment takes one."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from snn_rl.rl.spaces import in_one_line, same_order
from snn_rl.rl.teacher import Player, frames_of


def random_actions(space: spaces.Space, n: int, generator: np.random.Generator) -> np.ndarray:
    """``n`` random actions of ``space``, (n, *space.shape); of unbounded ones standard normal."""
    if isinstance(space, spaces.Discrete):
        return generator.integers(int(space.n), size=n)
    if isinstance(space, spaces.MultiDiscrete):
        return generator.integers(space.nvec, size=(n, *space.nvec.shape))
    if isinstance(space, spaces.MultiBinary):
        return generator.integers(2, size=(n, *space.shape)).astype(np.int8)
    assert isinstance(space, spaces.Box)
    bounded = np.isfinite(space.low) & np.isfinite(space.high)
    low, high = np.where(bounded, space.low, 0.0), np.where(bounded, space.high, 1.0)
    uniform = generator.uniform(low, high, size=(n, *space.shape))
    normal = np.clip(generator.standard_normal((n, *space.shape)), space.low, space.high)
    return np.where(bounded, uniform, normal).astype(space.dtype)


def checked_actions(actions: Any, space: spaces.Space, n: int, who: str) -> np.ndarray:
    """``n`` actions as an array. Raises ValueError, before an environment takes them, where ``space`` has no such."""
    array = np.asarray(actions)
    assert space.shape is not None
    if array.shape == (n, *space.shape):
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            upper = space.n if isinstance(space, spaces.Discrete) else space.nvec
            fits = array.dtype.kind in "iu" and bool(((array >= 0) & (array < upper)).all())
        else:
            low, high = (0, 1) if isinstance(space, spaces.MultiBinary) else (space.low, space.high)  # type: ignore[attr-defined]
            slack = 1e-5 * np.maximum(1.0, np.abs(array))  # a squashed action may round to beyond a bound
            fits = bool(((array >= low - slack) & (array <= high + slack)).all())  # not where an action is NaN
            array = np.clip(array, low, high)
        if fits:
            return array
    shown = f"{' '.join(str(array).split())[:80]} of {array.dtype}"
    if isinstance(space, spaces.Discrete):
        raise ValueError(
            f"{who} must choose one of the actions 0 to {space.n - 1} in each of {n} environments, got {shown}"
        )
    raise ValueError(f"{who} must choose an action of {in_one_line(space)} in each of {n} environments, got {shown}")


def exploration_rate(actor: Player) -> float:
    """The share of random actions in an actor's play."""
    return float(getattr(actor, "exploration_rate", 0.0))


def check_same_spaces(
    ours: Any, theirs: Any, we: str = "the environment", they: str = "the agent was trained on"
) -> None:
    """Check the spaces of an environment or agent against those of another agent, which may have none (a `Player`)."""
    for name in ("observation_space", "action_space"):
        has, wants = getattr(ours, name), getattr(theirs, name, None)
        if has == wants and not same_order(has, wants):
            raise ValueError(
                f"{we}'s observations are of {list(has.spaces)} in this order, but {they} {list(wants.spaces)}; build "
                "the Dict as for that agent's training"
            )
        if wants is None or has == wants:
            continue
        way_out = "build it as for that agent's training"
        if name == "observation_space" and (frames_of(wants, has) or 1) > 1:
            way_out = "StackedTeacher lets a DQN on a stack of frames act on one"
        raise ValueError(f"{we}'s {name} is {in_one_line(has)}, but {they} {in_one_line(wants)}; {way_out}")
