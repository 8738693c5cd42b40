"""Fitting a fuser that has a closed form: the same recipe, data, store and output as training, no gradients."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import TrainConfig
from ..errors import C2CError
from ..files import only_writer, replace_text
from ..fuser.ridge import Fitted
from ..pair import C2C
from .items import Prepared
from .objective import FuserObjective, Stores, fused_inputs, in_pieces, one_each, write_fuser
from .start import start_run
from .store import Store


def fit(
    pair: C2C,
    config: TrainConfig,
    store: Stores,
    data: Prepared,
    progress: Callable[[int], None] = lambda examples: None,
    receiver_store: Store | None = None,
) -> tuple[Path, list[dict[str, Any]]]:
    """Fit the pair's (only) fuser on a recipe's examples, each read once.

    Nothing is written before the fit is done, so an interrupted one leaves nothing and starts again.

    Args:
        progress: called with the number of examples of each batch that was read.

    Returns:
        The fuser's folder and what the fit measured, a row per kind and layer (also in `log.jsonl`).
    """
    if len(pair.sharers) > 1:
        raise C2CError(f"a fuser is fitted for one sharer, {len(pair.sharers)} were given; fit one for each")
    fuser, (own,) = pair.fusers[0], one_each(pair, store)
    assert isinstance(fuser, Fitted)
    if not data.holdout:
        raise C2CError("a fitted fuser chooses its penalty on the hold-out, which is empty; set holdout in the recipe")
    FuserObjective(pair, store, False, receiver_store).check(data)
    with only_writer(config.output):
        start_run(config)
        began = time.perf_counter()

        def pieces(items: list[Any]) -> Iterator[tuple[Tensor, Tensor]]:
            parts = in_pieces(items)
            for part, inputs in zip(parts, fused_inputs(pair, parts, own, receiver_store), strict=True):
                yield inputs
                progress(len(part))

        rows = fuser.fit(pieces(data.train), pieces(data.holdout))
        replace_text(config.output / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        r2 = sum(float(row["r2"]) for row in rows) / len(rows)
        measured = {"seconds": round(time.perf_counter() - began, 1), "r2": r2}
        return write_fuser(pair, config, data, measured, {item.id for item in data.train}), rows
