"""Packages that a command needs beyond those that snn_rl itself requires."""

from __future__ import annotations

from importlib.util import find_spec


def need(extra: str, *modules: str) -> None:
    """Raises ValueError where one of ``modules`` is not installed; the ``extra`` of snn_rl installs them all."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ValueError(f"this command needs {' and '.join(missing)}: pip install 'snn_rl[{extra}]'")
