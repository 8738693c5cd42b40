"""The sharers' caches of a batch, and what stands in for them in the controls.

A gain is communication only where it is gone without what the sharer read: with its cache of another question, with
zeros, or with noise of the same moments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from ..errors import C2CError
from ..kv import KV, Prefilled, pad_left, positions_from, prefill
from ..pair import C2C, FusedCache, PromptIds
from ..training.store import Store

Known = tuple[KV, list[int]]  # as `C2C.fuse` takes it: a cache, padded on the left, and how many tokens of each row


def sharer_cache(
    pair: C2C, j: int, prompts: Sequence[PromptIds], store: Store | None = None, *, alone: bool = True
) -> KV:
    """Sharer j's caches of whole prompts, from a store that is given them first where they are missing, or computed.

    From a store they are as training reads them, in float32 where it holds int8.
    `alone`: the sharer is to answer from them; otherwise only the layers that the fuser reads are sure to be there.
    """
    sharer, fuser = pair.sharers[j], pair.fusers[j]
    rows = [list(p.sharers[j]) for p in prompts]
    places = [p.positions_of(j) for p in prompts]
    if store is None:
        ids, mask = pad_left(rows, sharer.pad_token_id, sharer.device)
        depth = None if alone else fuser.sharer_depth or 1
        return prefill(sharer, ids, mask, num_layers=depth, positions=positions_from(places, mask))
    if any(place is not None for place in places):
        raise C2CError(
            f"the fuser's token map {fuser.config.token_map!r} moves the sharer's positions, which no store has; "
            "evaluate without a store"
        )
    if store.missing(rows):
        store.fill(sharer, rows, batch_tokens=len(rows) * max(map(len, rows)))
    layers = None if alone else (int(fuser.sharer_layers.min()), int(fuser.sharer_layers.max()) + 1)
    return store.read(rows, layers=layers).to(sharer.device)


def starts_of(cache: KV, lengths: Sequence[int], wanted: Sequence[int]) -> KV:
    """The caches of the first `wanted` tokens of each row, padded on the left anew."""
    longest = max(wanted)
    cut = {n - w for n, w in zip(lengths, wanted, strict=True)}
    if len(cut) == 1:
        return cache.map(lambda t: t[..., : cache.length - min(cut), :])
    made = cache.map(lambda t: torch.zeros_like(t[..., :longest, :]))
    for row, (n, w) in enumerate(zip(lengths, wanted, strict=True)):
        start = cache.length - n
        for to, source in ((made.keys, cache.keys), (made.values, cache.values)):
            to[:, row, :, longest - w :] = source[:, row, :, start : start + w]
    return made


def rows_of(known: Sequence[Known], rows: Sequence[int]) -> list[Known]:
    """The caches of some rows of a batch, in that order."""
    return [(c.map(lambda t: t[:, rows]), [lengths[row] for row in rows]) for c, lengths in known]


def zeroed(known: Sequence[Known]) -> list[Known]:
    """Caches of zeros."""
    return [(cache.map(torch.zeros_like), lengths) for cache, lengths in known]


def gaussian(known: Sequence[Known], names: Sequence[str]) -> list[Known]:
    """Normal noise with the mean and deviation, over a prompt's tokens, of each layer, head and channel.

    `names`, one for each prompt, seed the noise.
    """
    made = []
    for j, (cache, lengths) in enumerate(known):
        noise = cache.map(torch.zeros_like)
        for row, (name, n) in enumerate(zip(names, lengths, strict=True)):
            digest = hashlib.sha256(f"{name}:{j}".encode()).digest()
            random = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            for to, source in ((noise.keys, cache.keys), (noise.values, cache.values)):
                true = source[:, row, :, cache.length - n :].float()  # (L, H, n, D)
                drawn = torch.randn(true.shape, generator=random).to(true.device)
                spread = true.std(dim=2, keepdim=True, correction=0)
                to[:, row, :, cache.length - n :] = (true.mean(dim=2, keepdim=True) + spread * drawn).to(to.dtype)
        made.append((noise, lengths))
    return made


def with_others_cache(prompt: PromptIds, other: PromptIds) -> PromptIds:
    """The prompt with the sharer tokens of another one. Both ends of the prompts are template, so the map is kept
    counted from the end, and what would lie before the other's start reads its first token."""
    maps, sharers = [], []
    for index, mine, theirs in zip(prompt.maps, prompt.sharers, other.sharers, strict=True):
        shift = len(theirs) - len(mine)
        maps.append([-1 if i < 0 else max(0, i + shift) for i in index])
        sharers.append(theirs)
    return PromptIds(
        prompt.receiver, sharers, maps, positions=prompt.positions, sharer_positions=other.sharer_positions
    )


def fuse_others(
    pair: C2C, prompts: Sequence[PromptIds], others: Sequence[PromptIds], clean: Prefilled, theirs: Sequence[Known]
) -> FusedCache:
    """Each prompt fused with the sharers' caches of another one, which are known."""
    return pair.fuse(list(map(with_others_cache, prompts, others)), clean=clean, sharers=theirs)


def next_rows(count: int) -> list[int]:
    """For each row of a batch the one behind it, and for the last one the first: whose caches `other` is given."""
    if count < 2:
        raise C2CError("the control other needs another question; give at least two")
    return [(row + 1) % count for row in range(count)]


def beside_of(count: int) -> list[int]:
    """As `next_rows`, but by twos, each row beside the other, so that which one it is doesn't hang on where batches of
    an even size end; of three that are left each beside the next."""
    if count < 2:
        raise C2CError("the control other needs another row; give at least two")
    threes = count % 2 * 3
    return [row ^ 1 for row in range(count - threes)] + [count - threes + (k + 1) % 3 for k in range(threes)]
