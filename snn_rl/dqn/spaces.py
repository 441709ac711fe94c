"""Which spaces a `SpikingDQN` learns in; it refuses the others before it builds anything."""

from __future__ import annotations

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
            f"DQN needs a Discrete action space, got {named(action_space)}; discretise the actions first"
        )
    if action_space.start != 0:  # SB3's DQN would play the first n integers from 0 on
        raise UnsupportedSpaceError(
            f"DQN needs Discrete actions from 0 on, got {named(action_space)}; wrap the environment in "
            f"gymnasium.wrappers.TransformAction, to add {action_space.start} to each action"
        )
    reason = _why_not_observed(observation_space)
    if reason is not None:
        raise UnsupportedSpaceError(f"{reason}, got {named(observation_space)}")


def _why_not_observed(space: spaces.Space) -> str | None:
    if isinstance(space, spaces.Dict):
        return "observations must not be a Dict; flatten them with gymnasium.wrappers.FlattenObservation"
    if isinstance(space, spaces.Box):
        if 0 in space.shape or not space.shape:
            return "observations must have an axis and an entry; use gymnasium.wrappers.ReshapeObservation"
    elif isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        starts_at_0 = space.start == 0 if isinstance(space, spaces.Discrete) else not space.start.any()
        if not starts_at_0:  # SB3 encodes k of n as one-hot without a look at the start
            return "observations must count from 0 on; subtract the start in gymnasium.wrappers.TransformObservation"
        if len(space.shape) > 1:
            return (
                "MultiDiscrete observations must have one axis; flatten them with gymnasium.wrappers.FlattenObservation"
            )
    elif not isinstance(space, spaces.MultiBinary):
        return "observations must be Box, Discrete, MultiDiscrete or MultiBinary"
    return None


def channels_first(space: spaces.Space) -> spaces.Space:
    """The observation space that SB3's algorithms see: they transpose images whose channels are last."""
    if is_image_space(space) and not is_image_space_channels_first(space):  # type: ignore[arg-type]
        return VecTransposeImage.transpose_space(space)  # type: ignore[arg-type]
    return space


def named(space: spaces.Space) -> str:
    """A space in one line, however many bounds it has."""
    return " ".join(str(space).split())
