"""Exit status of a command, and its streams: an error is one line on stderr, whatever the streams are."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

RESUMES = "interrupted; run the same command again to continue from the last checkpoint"


def exit_status(
    command: Callable[[], Any],
    interrupted: str = "interrupted",
    statuses: Mapping[type[Exception], int] | None = None,
) -> int:
    """Run ``command`` and return the exit status of a program.

    A ValueError or an OSError is printed as one line on stderr and gives status 2; an error of ``statuses`` is printed
    as it is and gives the status there. Ctrl-C gives 130. A reader of stdout that leaves early (``| head``) gives 141,
    as if SIGPIPE had ended the program, and no message.
    """
    open_streams()
    try:
        command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except Exception as error:
        for kind, status in (statuses or {}).items():
            if isinstance(error, kind):
                _say(str(error))
                return status
        if not isinstance(error, ValueError | OSError):
            raise
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            return 141
        _say(f"error: {' '.join(str(error).split())}")
        return 2
    return 0


def open_streams() -> None:
    """Python has None for a stream that was closed at the start (``2>&-``), which libraries do not expect."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  open until the process ends


def is_first() -> bool:
    """Whether this is the first of the processes that torchrun has started, or the only process."""
    return int(os.environ.get("RANK", "0")) == 0


def _reader_has_left() -> bool:
    """Whether stdout is the pipe that broke: an environment in a process of its own has pipes too.

    If so, what stdout still holds goes nowhere, or Python would complain of it when it exits.
    """
    with suppress(AttributeError, OSError, ValueError):  # no poll on this system, or no file behind stdout
        pipe = select.poll()
        pipe.register(sys.stdout.fileno(), 0)  # errors alone
        if pipe.poll(0):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return True
    return False


def _say(message: str) -> None:
    if is_first():
        print(message, file=sys.stderr)
