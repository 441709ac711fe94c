"""Atomic files: what stands under a name is whole, whatever kills the writer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

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
def alone_in(directory: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold a folder against other processes, which would write over what this one writes. A kill lets go of it.

    Where another process holds it, ``wait`` that many seconds for it.

    Raises:
        ValueError: another process holds it still, or a file stands in its place.
        OSError: nothing can be written there.
    """
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
    """Write ``value`` as JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ValueError naming the file where it is not JSON."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); remove it or restore it") from error
