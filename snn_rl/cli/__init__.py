"""The command line: ``snn-rl COMMAND``. A command is a module here, which is imported when it is called."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from snn_rl.cli.status import exit_status, open_streams

# One line of each in the help. `main(argv, *, prog)` of the module of this name runs it and returns the exit status.
COMMANDS = {
    "spike": "make a trained agent of stable-baselines3 or sb3-contrib spike",
    "train": "train an agent: an ordinary network first, then spiking ones",
    "evaluate": "play episodes with an agent and print the returns",
    "watch": "watch an agent play, in a window or as a video",
    "export": "write an agent or a classifier as NIR or ONNX",
    "report": "write figures and a page about a run",
    "sweep": "train many recipes, variants and seeds, and write one table",
    "hub": "write an agent as a model repository for the Hugging Face hub",
    "vision": "train an image classifier",
}
PROGRAM = "snn-rl"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``snn-rl`` with the words ``argv`` (default: the process's own); returns the exit status."""
    open_streams()
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        return exit_status(lambda: print(_help()))
    if command not in COMMANDS:
        return exit_status(lambda: _refuse(command))
    return int(import_module(f"snn_rl.cli.{command}").main(arguments, prog=f"{PROGRAM} {command}"))


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {words}" for name, words in COMMANDS.items()]
    return "\n".join(
        (
            f"usage: {PROGRAM} COMMAND [OPTIONS]",
            "",
            "Spiking reinforcement-learning agents on stable-baselines3.",
            "",
            "commands:",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help lists the options of a command.",
        )
    )


def _refuse(command: str) -> None:
    raise ValueError(f"unknown command {command!r}; there are {', '.join(COMMANDS)}")
