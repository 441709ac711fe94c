"""The spaces that agents can learn in. Others are refused before anything is built."""

from __future__ import annotations

import copy

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.vec_env import VecTransposeImage
from torch import nn


class UnsupportedSpaceError(ValueError, AssertionError):
    """A space that an agent cannot learn in. SB3 raises an ``AssertionError`` there, so this is one too."""


def check_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """Check that `SpikingDQN` can learn in these spaces.

    Actions must be ``Discrete`` from 0 on. Observations may be ``Box`` of any number type, ``Discrete`` and
    ``MultiDiscrete`` from 0 on, ``MultiBinary``, and a ``Dict`` of these.

    Raises:
        UnsupportedSpaceError: any other space, in one line, with the way out.
    """
    if not isinstance(action_space, spaces.Discrete):
        raise UnsupportedSpaceError(
            f"DQN needs a Discrete action space, got {in_one_line(action_space)}; discretise the actions first"
        )
    check_action_space(action_space)
    check_observation_space(observation_space)


def check_action_space(space: spaces.Space) -> None:
    """Check that an agent can act in this space. Raises UnsupportedSpaceError.

    Actions may be ``Box``, ``Discrete`` and ``MultiDiscrete`` from 0 on, and ``MultiBinary``.
    """
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        if np.any(space.start):  # SB3 would play the first n integers from 0 on
            start = space.start if isinstance(space, spaces.Discrete) else space.start.tolist()
            raise UnsupportedSpaceError(
                f"an agent needs {type(space).__name__} actions from 0 on, got {in_one_line(space)}; wrap the "
                f"environment in gymnasium.wrappers.TransformAction, to add {start} to each action"
            )
        if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim != 1:
            raise UnsupportedSpaceError(
                f"MultiDiscrete actions must have one axis, got {in_one_line(space)}; reshape them in "
                "gymnasium.wrappers.TransformAction"
            )
    elif isinstance(space, spaces.Box | spaces.MultiBinary):
        if not space.shape or 0 in space.shape:
            raise UnsupportedSpaceError(
                f"actions must have an axis and an entry, got {in_one_line(space)}; reshape them in "
                "gymnasium.wrappers.TransformAction"
            )
    else:
        raise UnsupportedSpaceError(
            f"actions must be Box, Discrete, MultiDiscrete or MultiBinary, got {in_one_line(space)}; convert them in "
            "a gymnasium.ActionWrapper"
        )


def check_observation_space(observation_space: spaces.Space) -> None:
    """Check that an agent can observe this space, as `check_spaces` says. Raises UnsupportedSpaceError."""
    is_dict = isinstance(observation_space, spaces.Dict)
    parts = observation_space.spaces if is_dict else {"": observation_space}  # type: ignore[attr-defined]
    images = {key: part for key, part in parts.items() if is_image_space(part)}
    first = {key: is_image_space_channels_first(part) for key, part in images.items()}  # type: ignore[arg-type]
    if len(set(first.values())) > 1:  # SB3 transposes all or none
        raise UnsupportedSpaceError(
            "the images of a Dict must have their channels first in all, or last in all, got first: "
            f"{first}; transpose some in a gymnasium.ObservationWrapper"
        )
    if not parts:
        raise UnsupportedSpaceError("observations must have a part, got an empty Dict; the agent cannot learn from it")
    for key, part in parts.items():
        refused = _why_not_observed(part)
        if refused is not None:
            must, way_out = refused
            what = "observations"
            if is_dict:
                what, way_out = f"the observations {key!r}", "change that part in a gymnasium.ObservationWrapper"
            raise UnsupportedSpaceError(f"{what} must {must}, got {in_one_line(part)}; {way_out}")
        if is_dict and (not key or "." in key or hasattr(nn.ModuleDict(), key)):  # of which SB3 makes names of layers
            raise UnsupportedSpaceError(
                f"the observations {key!r} must have another key: PyTorch takes no layers of that name; rename them in "
                "a gymnasium.ObservationWrapper"
            )


def _why_not_observed(space: spaces.Space) -> tuple[str, str] | None:
    """What the observations must be, and the way there."""
    if isinstance(space, spaces.Dict):
        return "not be a Dict in a Dict", ""
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


def same_order(first: spaces.Space, second: spaces.Space) -> bool:
    """Whether the keys of equal ``Dict`` spaces come in one order, which gymnasium does not compare.

    It is the order of the columns behind a features extractor. True of any other spaces.
    """
    if isinstance(first, spaces.Dict) and isinstance(second, spaces.Dict):
        return list(first.spaces) == list(second.spaces)
    return True


def channels_first(space: spaces.Space) -> spaces.Space:
    """The observation space that SB3's algorithms see: they transpose images whose channels are last."""
    if isinstance(space, spaces.Dict):  # a new one might sort its keys, whose order is that of the network's inputs
        transposed = copy.copy(space)
        transposed.spaces = {key: channels_first(part) for key, part in space.spaces.items()}
        return transposed
    if is_image_space(space) and not is_image_space_channels_first(space):  # type: ignore[arg-type]
        return VecTransposeImage.transpose_space(space)  # type: ignore[arg-type]
    return space


def in_one_line(space: spaces.Space) -> str:
    """A space in one line, however many bounds it has."""
    return " ".join(str(space).split())
