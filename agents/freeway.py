"""Freeway: pong-lite's recipe on another game."""

from __future__ import annotations

import dataclasses
from functools import partial

from agents.pong import PONG_LITE
from envs.atari import make_atari

FREEWAY_LITE = dataclasses.replace(
    PONG_LITE,
    name="freeway-lite",
    env_id="ALE/Freeway-v5",
    make_env=partial(make_atari, "freeway"),
    # A game lasts 8,192 frames, whatever the agent does.
    env_kwargs={**PONG_LITE.env_kwargs, "max_episode_frames": 27_000},
    target_return=None,
)
