"""Where compiled kernels are kept from one process to the next: numba's cache, which a damaged file does not stop.

numba unpickles what it finds and runs the machine code in it. Here a checksum stands beside the code, and whatever
cannot be read is compiled anew and written over.
"""

from __future__ import annotations

import contextlib
import pickle
import warnings
import zlib
from typing import Any

from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.serialize import dumps

_warned: set[str] = set()


def warn_once(what: str, why: str) -> None:
    """Warn of ``what`` once in a process, whichever kernel it is that meets it first, for its own reason ``why``."""
    if what not in _warned:
        _warned.add(what)
        warnings.warn(f"compiled kernels {what} ({why})", stacklevel=3)


class _Checked(CompileResultCacheImpl):
    """What is stored of a compiled function, with its checksum."""

    def get_filename_base(self, fullname: str, abiflags: str) -> str:
        return "checked-" + super().get_filename_base(fullname, abiflags)  # numba's own files lie in the same folder

    def reduce(self, cres: Any) -> tuple[int, bytes]:
        content = dumps(super().reduce(cres))
        return zlib.crc32(content), content

    def rebuild(self, target_context: Any, payload: tuple[int, bytes]) -> Any:
        checksum, content = payload
        if zlib.crc32(content) != checksum:
            raise ValueError("the checksum of a kernel is wrong")
        return super().rebuild(target_context, pickle.loads(content))


class KernelCache(FunctionCache):
    """The cache of one kernel.

    Raises:
        RuntimeError: there is no folder to keep it in.
    """

    _impl_class = _Checked

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # pickles raise whatever their damaged input leads them to
            warn_once("are damaged, and are compiled anew", self._said(error))
            with contextlib.suppress(OSError):
                self.flush()  # the index, which would be read again before it is written
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:  # no space, no permission any more: the kernel itself is there
            warn_once("cannot be kept, and each start compiles anew", self._said(error))

    def _said(self, error: Exception) -> str:
        return " ".join(f"{self.cache_path}: {type(error).__name__}: {error}".split())[:300]
