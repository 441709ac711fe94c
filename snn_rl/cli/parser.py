"""The options of a command and their help."""

from __future__ import annotations

import argparse
import sys
import textwrap
from typing import Any, NoReturn

from snn_rl.cli.status import exit_status, open_streams

DEVICE_HELP = "cpu, cuda, or auto: cuda if there is a GPU, else cpu"
MINUTES_HELP = "stop at the end of the epoch in which so many minutes have passed, with status 3 (default: no limit)"
STICKY_HELP = "probability that an Atari game repeats the last action"


class Parser(argparse.ArgumentParser):
    """The options of a command, without abbreviations. The help shows each option's default; an error is one line."""

    def __init__(self, description: str | None, **settings: Any) -> None:
        open_streams()
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Help, **settings)

    def print_help(self, file: Any = None) -> None:
        if status := exit_status(lambda: print(self.format_help(), end="", file=file)):
            raise SystemExit(status)

    def format_help(self) -> str:
        given = self.usage
        if given is None:  # argparse's own names every option, over several lines
            positional = [_named(action) for action in self._actions if not action.option_strings]
            self.usage = " ".join(("%(prog)s", *positional, "[OPTIONS]"))
        try:
            return super().format_help()
        finally:
            self.usage = given

    def error(self, message: str) -> NoReturn:
        print(f"error: {' '.join(message.split())}; {self.prog} --help lists the options", file=sys.stderr)
        raise SystemExit(2)


def _named(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest)
    return f"{name} [{name} ...]" if action.nargs == "+" else name


class _Help(argparse.HelpFormatter):
    """Ends an option's help with its default, and keeps paragraphs and indented lines as they are."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, max_help_position=32, **settings)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        words = super()._format_args(action, default_metavar)
        return f"{words.split()[0]} ..." if action.nargs == "+" else words

    def _get_help_string(self, action: argparse.Action) -> str | None:
        words = action.help or ""
        if not action.option_strings or action.dest == "help" or "(default: " in words:
            return words
        if action.required:
            return f"{words} (required)"
        default = "off" if action.const is True else _words(action.default)
        return f"{words} (default: {default.replace('%', '%%')})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = textwrap.dedent(text).strip().split("\n\n")
        return "\n\n".join(p if p.startswith(" ") else textwrap.fill(p, width) for p in paragraphs)


def _words(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
