"""Run a command of RL Zoo, with SpikingDQN as the algorithm spiking_dqn.

The options of a command are RL Zoo's own: python scripts/zoo.py COMMAND --help lists them. docs/zoo.md says more.
"""

from __future__ import annotations

import argparse
import importlib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this repository's packages, whatever else is installed

from snn_rl.base.files import atomic
from snn_rl.cli.parser import Parser
from snn_rl.cli.status import exit_status
from snn_rl.runs.stages import check_device
from snn_rl.share.zoo import NAME, register

HYPERPARAMETERS = ROOT / "agents" / "zoo" / f"{NAME}.yml"
MODULES = {
    "train": "rl_zoo3.train",
    "enjoy": "rl_zoo3.enjoy",
    "record": "rl_zoo3.record_video",
}
PLOTS = ("plot_train", "all_plots")
COMMANDS = ", ".join((*MODULES, *PLOTS))


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__, add_help=False)
    parser.add_argument("command", metavar="COMMAND", nargs="?", help=f"one of {COMMANDS}")
    parser.add_argument(
        "--save",
        type=Path,
        metavar="PNG",
        help="write the figure of plot_train or all_plots to this file (default: show it in a window)",
    )
    options, arguments = parser.parse_known_args(argv)
    if options.command is None and {"-h", "--help"} & set(arguments):
        parser.print_help()
        return 0
    return exit_status(lambda: _run(options.command, arguments, options.save))


def _run(command: str | None, arguments: list[str], figure: Path | None) -> None:
    if command not in (*MODULES, *PLOTS):
        raise ValueError(f"unknown command {command!r}; there are {COMMANDS}")
    plots = command in PLOTS
    if figure is not None and not plots:
        raise ValueError(f"--save belongs to plot_train and all_plots, got it with {command}")
    register()
    if not plots:
        arguments = _checked(command, arguments)
    if figure is not None:
        import matplotlib

        matplotlib.use("Agg")
    with mock.patch.object(sys, "argv", [command, *arguments]):
        if plots:
            getattr(importlib.import_module("rl_zoo3.plots"), command)()
        else:  # as a program: record_video is nothing else
            try:
                runpy.run_module(MODULES[command], run_name="__main__")
            except (AssertionError, TypeError) as error:  # how RL Zoo and SB3 refuse a file or a hyperparameter
                raise ValueError(f"{command} was refused: {error or type(error).__name__}") from error
    if figure is not None:
        from matplotlib import pyplot

        with atomic(figure) as temporary:
            pyplot.savefig(temporary)
        print(figure)


def _checked(command: str, arguments: list[str]) -> list[str]:
    """``arguments`` with our algorithm and hyperparameters where they name none; ValueError for what is unknown."""
    from rl_zoo3 import ALGOS, import_envs  # noqa: F401  its environments are known from then on

    parser = argparse.ArgumentParser(add_help=False)  # abbreviations are RL Zoo's too
    parser.add_argument("--algo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("-conf", "--conf-file")
    parser.add_argument("--gym-packages", nargs="+")
    options, _ = parser.parse_known_args(arguments)
    algo = options.algo or NAME
    if algo not in ALGOS:
        raise ValueError(f"unknown algorithm {algo!r}; there are {', '.join(ALGOS)}")
    import gymnasium

    if not options.gym_packages and options.env not in gymnasium.registry:
        raise ValueError(f"unknown environment {options.env!r}: gymnasium has none of that name")
    if {"-optimize", "--optimize-hyperparameters"} & set(arguments) and algo == NAME:
        raise ValueError(f"{NAME} has no search space: set its hyperparameters with -params or -conf")
    check_device(options.device)
    added = [] if options.algo else ["--algo", NAME]
    if command == "train" and algo == NAME and options.conf_file is None:
        added += ["-conf", str(HYPERPARAMETERS)]
    return [*arguments, *added]


if __name__ == "__main__":
    sys.exit(main())
