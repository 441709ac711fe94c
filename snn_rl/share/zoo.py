"""`SpikingDQN` in RL Zoo: `register` makes ``spiking_dqn`` one of its algorithms."""

from __future__ import annotations

from snn_rl.rl import SpikingDQN

NAME = "spiking_dqn"


def register() -> None:
    """Enter `SpikingDQN` as ``spiking_dqn``. Raises ValueError where rl_zoo3 is not installed."""
    try:
        from rl_zoo3 import ALGOS
    except ModuleNotFoundError as error:
        if error.name != "rl_zoo3":
            raise
        raise ValueError("rl_zoo3 is not installed: pip install 'snn_rl[zoo]'") from None
    ALGOS[NAME] = SpikingDQN  # one dictionary, which all of its modules import
