"""One prompt looked at closely, as a page: token map, layer map, gates, weights and next tokens.

The page is one HTML file with its data inside; it loads nothing from anywhere.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..decode import next_token
from ..files import replace_text
from ..fuser.c2c import KINDS
from ..kv import prefill_prompts, prefilled
from ..models.load import LM
from ..pair import C2C, Messages
from . import runs
from .gates import gates, weights_at
from .runs import Setup

TEMPLATE = Path(__file__).with_name("page.html")
TOP = 10  # next tokens shown of each
PAGE_WEIGHTS = 1_500_000  # above that the page has each layer's mean over heads; the JSON has every number


def run(setup: Setup, messages: Messages, *, prefix: str = "") -> dict[str, Any]:
    """Write the page to `setup.output`, and every number of it as JSON beside it.

    Args:
        setup: the pair; its store, seed and batch size don't matter.
        messages: the chat.
        prefix: the start of the answer, behind which the next token stands.
    """
    pair, _, settings = runs.open_pair(setup)
    about = {**settings, "command": setup.command, "version": __version__}
    data = {"about": about, **look(pair, messages, prefix=prefix)}
    text = page(data)
    setup.output.parent.mkdir(parents=True, exist_ok=True)
    replace_text(setup.output.with_suffix(".json"), json.dumps(data, ensure_ascii=False) + "\n")
    replace_text(setup.output, text)
    return data


@torch.no_grad()
def look(pair: C2C, messages: Messages, *, prefix: str = "") -> dict[str, Any]:
    """Everything that the page shows.

    Returns:
        `prompt`, `prefix`; per model its `tokens` as text; `content` and `map` of the receiver's tokens (-1: none);
        `layers` as `gates.gates` gives them; `fused`, the positions that are; `weights` (2n, N, heads), keys and then
        values, None of a fuser that has none; `change` (2n, N), the norm of what is added in units of that of the
        receiver's own numbers there; `next`, the likeliest tokens of receiver, sharer and C2C with their probabilities.
    """
    fuser, receiver, sharer = pair.fusers[0], pair.receiver, pair.sharers[0]
    prompt = pair.encode(list(messages), prefix=prefix)
    made = runs.fuse(pair, [prompt], None)
    clean, cache, fused, where = made.clean, made.sharer, made.fused, made.where
    weights = None
    if fuser.config.weighting:
        pieces = list(weights_at(fuser, clean.kv, cache, where))
        weights = torch.cat(pieces, dim=1).cpu()
    change = []
    for kind in KINDS:
        old, new = (getattr(kv, kind)[fuser.receiver_layers, 0][:, :, where[1]].float() for kv in (clean.kv, fused.kv))
        change.append(((new - old).norm(dim=(1, 3)) / old.norm(dim=(1, 3)).clamp(min=1e-30)).cpu())  # (n, N)
    if fuser.config.token_map == "span":
        alone = prefilled(sharer, prompt.sharers, cache)
    else:  # with a published token map the sharer reads other tokens than its own
        alone = prefill_prompts(sharer, [pair.rendered(sharer, list(messages), prefix).ids])
    index = list(prompt.maps[0])
    found = {
        "prompt": [dict(m) for m in messages],
        "prefix": prefix,
        "receiver": {"name": Path(receiver.name).name, "tokens": texts(receiver, prompt.receiver)},
        "sharer": {"name": Path(sharer.name).name, "tokens": texts(sharer, prompt.sharers[0])},
        "content": [bool(x) for x in prompt.content],
        "map": [*index[:-1], -1],
        "coverage": prompt.coverage[0],
        "layers": gates(fuser),
        "fused": where[1].tolist(),
        "weights": weights,
        "change": torch.cat(change),
        "next": {
            "receiver": likeliest(receiver, next_token(receiver, clean)[0]),
            "sharer": likeliest(sharer, next_token(sharer, alone)[0]),
            "c2c": likeliest(receiver, next_token(receiver, replace(clean, kv=fused.kv))[0]),
        },
    }
    return runs.rounded(found, 5)


def texts(lm: LM, ids: Sequence[int]) -> list[str]:
    """Each token as text; one that is part of a character as its vocabulary spells it."""
    tokenizer = lm.need_tokenizer()
    found = [str(tokenizer.decode([i])) for i in ids]
    return [str(tokenizer.convert_ids_to_tokens(i)) if "\ufffd" in t else t for i, t in zip(ids, found, strict=True)]


def likeliest(lm: LM, probabilities: Tensor) -> dict[str, Any]:
    """The TOP tokens of a distribution (V,) with their probabilities, and its entropy in bits."""
    top = probabilities.topk(min(TOP, len(probabilities)))
    entropy = -torch.xlogy(probabilities, probabilities).sum() / torch.log(torch.tensor(2.0))
    names = texts(lm, top.indices.tolist())
    return {"tokens": list(zip(names, top.values.tolist(), strict=True)), "entropy": entropy.item()}


# ---- the page --------------------------------------------------------------------------------------------------------


def page(data: dict[str, Any]) -> str:
    """The HTML page. Whatever comes from the prompt or a model stands in it as data, never as markup."""
    compact = {k: v for k, v in data.items() if k not in ("weights", "change")}
    compact["weights"], compact["heads"] = None, 0
    if data["weights"] is not None:
        weights = torch.tensor(data["weights"]).reshape(len(data["weights"]), len(data["fused"]), -1)
        if weights.numel() > PAGE_WEIGHTS:
            weights = weights.mean(-1, keepdim=True)
        compact["weights"], compact["heads"] = _bytes(weights), weights.shape[-1]
    change = torch.tensor(data["change"])
    compact["change_unit"] = max(change.max().item() if change.numel() else 0.0, 1e-9)
    compact["change"] = _bytes(change / compact["change_unit"])
    # In a script element the characters < > & could end it or start a comment; as JSON escapes they can't.
    text = json.dumps(compact, ensure_ascii=True)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    title = html.escape(f"{data['receiver']['name']} ← {data['sharer']['name']}")
    head, rest = TEMPLATE.read_text(encoding="utf-8").split("@@title@@")
    middle, tail = rest.split("@@data@@")
    return f"{head}{title}{middle}{text}{tail}"


def _bytes(shares: Tensor) -> str:
    """Numbers from 0 to 1 as one byte each, base64."""
    return base64.b64encode(
        (shares * 255).round().clamp(0, 255).to(torch.uint8).contiguous().numpy().tobytes()
    ).decode()
