"""The way to `confine.c`: refused system calls told and counted, and capabilities given up in every thread."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from pathlib import Path
from typing import Final

from stella_shared.system_call_numbers import NUMBERS

NATIVE: Final = Path(__file__).parent / "native" / "confine.so"


@cache
def _library() -> ctypes.CDLL | None:
    """Return the library, answering SIGSYS; None where it was not built."""
    if not NATIVE.exists():
        return None
    library = ctypes.CDLL(str(NATIVE))
    library.stella_confine_keep.argtypes = (ctypes.c_uint64,)
    library.stella_confine_name.argtypes = (ctypes.c_uint32, ctypes.c_char_p)
    library.stella_confine_name.restype = None
    library.stella_confine_refused.restype = ctypes.c_uint32
    for name, number in NUMBERS[platform.machine()].items():
        library.stella_confine_name(number, name.encode())
    return library if library.stella_confine_answer() == 0 else None


def answers() -> bool:
    """Whether refused calls are told and counted.  From the first time on they are answered with EPERM."""
    return _library() is not None


def refused() -> dict[str, int]:
    """Return how often each call was refused, by its name or number."""
    library = _library()
    if library is None:
        return {}
    names = {number: name for name, number in NUMBERS[platform.machine()].items()}
    counts = ((number, int(library.stella_confine_refused(number))) for number in range(512))
    return {names.get(number, str(number)): count for number, count in counts if count}


def keep_capabilities(mask: int) -> None:
    """Give up all capabilities without a bit in `mask`, in every thread, for good.  Raises `OSError`."""
    library = _library()
    if library is None:
        raise OSError("confine.so is not built")
    error = -int(library.stella_confine_keep(mask))
    if error:
        raise OSError(error, os.strerror(error))
