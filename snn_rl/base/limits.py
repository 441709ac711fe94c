"""Limits that recipes and files share. Imports no torch."""

MAX_TIMESTEPS = 2**10  # micro-steps per frame of a network in a file

# Longer than any episode that is meant to end: an hour of Atari has 54,000 steps.
MAX_EPISODE_STEPS = 100_000
