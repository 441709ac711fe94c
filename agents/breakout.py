"""Breakout: pong-lite's network and stages on another game."""

from __future__ import annotations

import dataclasses
from functools import partial

from agents.pong import PONG_LITE
from envs.atari import make_atari

BREAKOUT_LITE = dataclasses.replace(
    PONG_LITE,
    name="breakout-lite",
    env_id="ALE/Breakout-v5",
    make_env=partial(make_atari, "breakout"),
    ann=dataclasses.replace(PONG_LITE.ann, env_steps=600_000),
    target_return=None,  # unlike Pong, there is always more to be had
)
