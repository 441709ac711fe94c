"""Environments: one module per family, each building a stable-baselines3 ``VecEnv``."""
