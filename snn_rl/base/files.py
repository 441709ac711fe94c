"""Atomic files and folders: what stands under a name is whole, whatever kills the writer."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY = ".writing-"  # how the names of files begin that are not whole yet


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path`` with the same ending; what was written there replaces ``path`` at the end.

    Where the block fails (a full disk, say), ``path`` is left as it was and the temporary file is removed. One that a
    killed process left behind is overwritten by the next.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        yield temporary
        temporary.chmod(0o644)  # some writers make private files, these are to be shared
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """Yield an empty folder beside ``folder`` that takes its place at the end, whole, as `atomic` does for files.

    ``check(folder)`` raises where what stands there must not be replaced; it is asked before and after the block.
    """
    folder = folder.resolve()
    temporary, before = (folder.with_name(f"{TEMPORARY}{prefix}{folder.name}") for prefix in ("", "before-"))
    if before.is_dir() and not folder.exists():  # a kill came in between two renamings
        os.replace(before, folder)
    check(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        check(folder)
        if not _exchange(temporary, folder):
            shutil.rmtree(before, ignore_errors=True)
            if folder.exists():
                os.replace(folder, before)  # a folder replaces none that has something in it
            try:
                os.replace(temporary, folder)
            except OSError:
                if before.exists():
                    os.replace(before, folder)
                raise
            shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where this system, or this file system, cannot, or one is missing."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


@contextmanager
def alone_in(directory: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold a folder against other processes, which would write over what this one writes. A kill lets go of it.

    Where another process holds it, ``wait`` that many seconds for it.

    Raises:
        ValueError: another process holds it still, or a file stands in its place.
        OSError: nothing can be written there.
    """
    from filelock import FileLock, Timeout  # here, where a run needs it

    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file, and a folder is needed; use another --run-dir")
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        raise ValueError(
            f"another process trains in {directory}; wait for it, stop it, or use another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically, unless the file holds it already."""
    text = json.dumps(value, indent=1) + "\n"
    if path.is_file() and path.read_bytes() == text.encode():  # perhaps as another process has just written it
        return
    with atomic(path) as temporary:
        temporary.write_text(text)


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ValueError naming the file where it is not JSON."""
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # broken text, numbers of thousands of digits; endless brackets
        raise ValueError(f"{path} is not valid JSON ({error}); remove it or restore it") from error
