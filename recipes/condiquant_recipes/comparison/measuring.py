"""Time and memory that a function takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

Result = TypeVar("Result")
_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Measured(Generic[Result]):
    """What a function returned, and what it took."""

    result: Result
    seconds: float
    peak_memory_bytes: int | None
    """Highest resident memory meanwhile, over that before; None where there is no ``/proc``."""


def measured(function: Callable[[], Result]) -> Measured[Result]:
    """Call ``function``."""
    before = _reset_peak()
    started = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - started
    peak = None if before is None else memory("VmHWM") - before
    return Measured(result, seconds, peak)


def _reset_peak() -> int | None:
    """Resident memory now, in bytes, which becomes the peak."""
    gc.collect()
    # Freed memory that the allocator keeps would hide what the function takes.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        (_PROCESS / "clear_refs").write_text("5")
        return memory("VmRSS")
    except OSError:
        return None


def memory(key: str) -> int:
    """Of this process, in bytes: ``"VmRSS"`` now, ``"VmHWM"`` at most; 0 where there is no ``/proc``."""
    if not (_PROCESS / "status").is_file():
        return 0
    found = re.search(rf"^{key}:\s+(\d+) kB$", (_PROCESS / "status").read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0
