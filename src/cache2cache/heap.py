"""Let the process keep the memory that it frees.

Every layer of a prefill or a training step frees buffers of megabytes, and glibc hands each back to the system, which
then has to clear the pages again for the next layer: measured on a CPU, a third of a training step (docs/LOG.md).
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep() -> None:
    """Tell glibc to serve large buffers from the heap and never to trim it. Elsewhere than on Linux nothing is done.

    It changes the whole process, so the commands of `c2c` call it and the library doesn't.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
