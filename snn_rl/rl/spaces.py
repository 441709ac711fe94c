"""Which spaces a `SpikingDQN` learns in; it refuses the others before it builds anything."""

from __future__ import annotations

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.vec_env import VecTransposeImage


class UnsupportedSpaceError(ValueError, AssertionError):
    """A space that `SpikingDQN` cannot learn in. SB3's DQN raises an ``AssertionError`` there, so this is one too."""


def check_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """Check that `SpikingDQN` can learn in these spaces.

    Actions must be ``Discrete`` from 0 on. Observations may be ``Box`` of any number type, ``Discrete`` and
    ``MultiDiscrete`` from 0 on, and ``MultiBinary``.

    Raises:
        UnsupportedSpaceError: any other space, in one line, with the way out.
    """
    if not isinstance(action_space, spaces.Discrete):
        raise UnsupportedSpaceError(
            f"DQN needs a Discrete action space, got {in_one_line(action_space)}; discretise the actions first"
        )
    if action_space.start != 0:  # SB3's DQN would play the first n integers from 0 on
        raise UnsupportedSpaceError(
            f"DQN needs Discrete actions from 0 on, got {in_one_line(action_space)}; wrap the environment in "
            f"gymnasium.wrappers.TransformAction, to add {action_space.start} to each action"
        )
    check_observation_space(observation_space)


def check_observation_space(observation_space: spaces.Space) -> None:
    """Check that an agent can observe this space, as `check_spaces` says. Raises UnsupportedSpaceError."""
    refused = _why_not_observed(observation_space)
    if refused is not None:
        must, way_out = refused
        raise UnsupportedSpaceError(f"observations must {must}, got {in_one_line(observation_space)}; {way_out}")


def _why_not_observed(space: spaces.Space) -> tuple[str, str] | None:
    """What the observations must be, and the way there."""
    if isinstance(space, spaces.Dict):
        return "not be a Dict", "flatten them with gymnasium.wrappers.FlattenObservation"
    if isinstance(space, spaces.Box):
        if not space.shape:
            return "have an axis", "wrap the environment in gymnasium.wrappers.ReshapeObservation, with shape (1,)"
        if 0 in space.shape:
            return "have an entry", "the agent cannot learn from nothing"
    elif isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        if np.any(space.start):  # SB3 encodes k of n as one-hot without a look at the start
            return "count from 0 on", "subtract the start in gymnasium.wrappers.TransformObservation"
        if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim > 1:
            return "have one axis", "flatten them with gymnasium.wrappers.FlattenObservation"
    elif not isinstance(space, spaces.MultiBinary):
        return "be Box, Discrete, MultiDiscrete or MultiBinary", "convert them in a gymnasium.ObservationWrapper"
    return None


def channels_first(space: spaces.Space) -> spaces.Space:
    """The observation space that SB3's algorithms see: they transpose images whose channels are last."""
    if is_image_space(space) and not is_image_space_channels_first(space):  # type: ignore[arg-type]
        return VecTransposeImage.transpose_space(space)  # type: ignore[arg-type]
    return space


def in_one_line(space: spaces.Space) -> str:
    """A space in one line, however many bounds it has."""
    return " ".join(str(space).split())
