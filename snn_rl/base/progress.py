"""What a training says while it works: its log and its progress bars on stderr, numbers and errors in few words."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any


class _Stderr:
    """``sys.stderr`` as it is by then. What cannot be written is left out: no reason for a training to end."""

    @property
    def encoding(self) -> str:
        return getattr(sys.stderr, "encoding", None) or "ascii"

    def fileno(self) -> int:
        return sys.stderr.fileno()

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError, AttributeError):  # a full disk or a broken pipe, closed, none at all
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()


_STDERR = _Stderr()
_bars: list[Any] = []  # those that stand on stderr now


class _AboveBars(logging.StreamHandler):
    def emit(self, record: logging.LogRecord) -> None:
        for shown in _bars:
            shown.clear()
        super().emit(record)
        for shown in _bars:
            shown.refresh()


@contextmanager
def show_log() -> Iterator[None]:
    """Show on stderr what the package logs to "snn_rl", with the time of day, until the block ends.

    A program that has set up logging itself keeps what it set up: nothing is added where "snn_rl" or the root logger
    has a handler. ``logging.getLogger("snn_rl").setLevel(logging.WARNING)`` turns the messages off.
    """
    log = logging.getLogger("snn_rl")
    if log.hasHandlers():
        yield
        return
    handler = _AboveBars(_STDERR)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    level = log.level
    log.addHandler(handler)
    if level == logging.NOTSET:
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@contextmanager
def bar(shown: bool, description: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], object]]:
    """A progress bar with the time left, on stderr, where ``shown``; yields the function that moves it on.

    Where tqdm, of the extra ``scripts``, is not installed, there is no bar.
    """
    if not shown or find_spec("tqdm") is None:
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=total, initial=done, desc=description, unit=unit, file=_STDERR, leave=False) as it:
        _bars.append(it)
        try:
            yield it.update
        finally:
            _bars.remove(it)


def digits(value: float) -> str:
    """``value`` with three significant digits, and at least one behind the point: 0.512, 9.37, -21.0, 13500.0."""
    for decimals in (1, 2):
        if round(abs(value), decimals + 1) >= 10 ** (2 - decimals):
            return f"{value:.{decimals}f}"
    return f"{value:#.3g}"


def one_line(error: BaseException) -> str:
    """An error's type and what it says, in one line of at most 200 characters or so."""
    message = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
