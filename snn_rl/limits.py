"""Limits that recipes and files share. Imports no torch."""

MAX_TIMESTEPS = 2**10  # micro-steps per frame of a network in a file
