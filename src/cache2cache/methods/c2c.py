"""The receiver answers from its own cache fused with the sharer's."""

from __future__ import annotations

import time
from collections.abc import Iterator

from cache2cache.methods.base import Answer, Ask, grow
from cache2cache.pair import C2C
from cache2cache.response import fused_sharers


def c2c(pair: C2C, ask: Ask, max_new_tokens: int) -> Iterator[Answer]:
    """Cache-to-cache; with several sharers all of them, or none where the receiver is confident enough (`ask.skip`)."""
    began = time.perf_counter()
    fused = pair.prefill(ask.chat(), skip=ask.skip, keep=bool(fused_sharers(pair)))
    chunks = pair.stream(fused, do_sample=False, max_new_tokens=max_new_tokens)
    blank = Answer(
        "c2c",
        bytes_passed=fused.bytes_passed,
        skipped=fused.skipped[0],
        transfer_bytes=sum(transfer.nbytes for transfer in fused.transfers),
        transfer_s=max((transfer.seconds for transfer in fused.transfers), default=0.0),
    )
    yield from grow(blank, began, chunks)
