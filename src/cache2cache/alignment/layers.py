"""Layer maps: which sharer layer each receiver layer reads (paper section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import MAX_LAYERS
from ..errors import C2CError, short

LAYER_MAPS = ("terminal", "last_aligned", "k_nearest")


def layer_map(
    kind: str | Sequence[tuple[int, int]], receiver_layers: int | None, sharer_layers: int | None
) -> list[tuple[int, int]]:
    """Pairs (receiver layer, sharer layer), ascending in the receiver layer; layers not named stay unfused.

    Args:
        kind: `terminal` pairs top with top and goes down until the shallower model runs out; `last_aligned` does the
            same but lets every receiver layer below the overlap read sharer layer 0 (as the published fusers do);
            `k_nearest` pairs by relative depth, ties to the lower sharer layer; or the pairs themselves.
        receiver_layers, sharer_layers: the depths of the two models; None, where unknown, goes with pairs only.
    """
    if isinstance(kind, str) and (receiver_layers is None or sharer_layers is None):
        raise C2CError(f"layer map {short(kind)} needs the depths of both models; give the pairs themselves")
    lr, ls = receiver_layers or MAX_LAYERS, sharer_layers or MAX_LAYERS
    if kind == "terminal":
        return [(t, t + ls - lr) for t in range(max(0, lr - ls), lr)]
    if kind == "last_aligned":
        return [(t, min(max(t + ls - lr, 0), ls - 1)) for t in range(lr)]
    if kind == "k_nearest":
        # s = t (ls-1)/(lr-1), rounded in integers, so that ties are exact and go to the lower s.
        steps = max(lr - 1, 1)
        return [(t, (2 * t * (ls - 1) + steps - 1) // (2 * steps)) for t in range(lr)]
    if isinstance(kind, str):
        raise C2CError(
            f"unknown layer map {short(kind)}; expected {', '.join(LAYER_MAPS)} or a list of [receiver, sharer] pairs"
        )
    pairs = sorted((int(t), int(s)) for t, s in kind)
    for t, s in pairs:
        if not (0 <= t < lr and 0 <= s < ls):
            raise C2CError(
                f"layer pair {short([t, s])} is outside the models: the receiver has layers 0 to {lr - 1}, the sharer "
                f"0 to {ls - 1}"
            )
    if len({t for t, _ in pairs}) != len(pairs) or not pairs:
        raise C2CError(
            f"the layer map {short(pairs, 200)} must name at least one receiver layer and none of them twice"
        )
    return pairs
