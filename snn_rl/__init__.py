"""Spiking reinforcement-learning agents: train an ANN-DQN, convert it, prune its timesteps."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snn_rl._public import *  # noqa: F403


# The names are imported when one of them is first used: a command that only prints its help needs no torch.
def __getattr__(name: str) -> Any:
    if not name.startswith("_") and name in (public := vars(_names())):
        return public[name]
    raise AttributeError(f"module 'snn_rl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(name for name in vars(_names()) if not name.startswith("_"))})


def _names() -> ModuleType:
    return import_module("snn_rl._public")
