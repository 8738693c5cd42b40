"""The memory of the process: let it keep what it frees, and how much it takes.

Every layer of a prefill or a training step frees buffers of megabytes, and glibc hands each back to the system, which
then has to clear the pages again for the next layer: measured on a CPU, a third of a training step (docs/LOG.md).
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_kept = False
_most: int | None = None  # bytes of its own that the process may take


def keep() -> None:
    """Tell glibc to serve large buffers from the heap and never to trim it. Elsewhere than on Linux nothing is done.

    It changes the whole process, so the commands of `c2c` call it and the library doesn't.
    """
    global _kept
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        _kept = True


def bound(more: int) -> None:
    """Let a process that was told to `keep` take so many bytes more than now before `tidy` gives back what is free."""
    global _most
    if _kept:
        give_back()
        _most = (status("RssAnon") or 0) + more


def tidy() -> bool:
    """Give back what is free where the process takes more than it may, see `bound`. Returns whether it did.

    Buffers of ever other sizes leave holes that the next ones don't fit into, so what is kept grows from batch to
    batch. Pages that are given back are cleared anew for their next use.
    """
    if _most is None or (status("RssAnon") or 0) <= _most:
        return False
    give_back()
    return True


def give_back() -> None:
    """Give back what is free now. glibc does that by itself only with what lies at the heap's end."""
    if sys.platform == "linux" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        malloc_trim(0)


def status(name: str, pid: int | str = "self") -> int | None:
    """Bytes, from what Linux says of a process: VmRSS are in memory, VmHWM were at the most, RssAnon are its own and
    no file's; None elsewhere."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
    return None


class Peak:
    """The most memory that is added from here on: of the GPU, or of this process where Linux counts it."""

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda if torch.cuda.is_available() else None
        self.before: int | None
        if self.cuda is not None:
            self.cuda.synchronize()
            self.cuda.reset_peak_memory_stats()
            self.before = self.cuda.memory_allocated()
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            self.before = status("VmRSS")

    def bytes(self) -> int | None:
        """So many; None where the system doesn't say."""
        after = status("VmHWM") if self.cuda is None else self.cuda.max_memory_allocated()
        return None if after is None or self.before is None else max(0, after - self.before)
