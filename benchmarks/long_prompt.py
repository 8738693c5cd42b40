"""Peak memory of one long prompt, by how many tokens go through the model at once, and decoding behind it.

python benchmarks/long_prompt.py                              # 8,192 tokens on the 0.5B of the catalogue
python benchmarks/long_prompt.py --tokens 32768 --chunks 2048

Rows of a padded batch are read in turns one by one, as on a CPU, and together. An answer is decoded in turns with our
cache, which is appended to in place, and with transformers' own. Tokens behind a padded batch are read at once in turns
with grouped keys and values as they are, as on a CPU, and repeated for every query head.
"""

from __future__ import annotations

import argparse
import inspect
import os
from functools import partial
from statistics import median
from unittest.mock import patch

import measure
import torch
from measure import now, peak_rise, take_turns
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from cache2cache import LM, heap, kv, load_lm
from cache2cache.kv import CACHE, Prefilled, prefill, prefill_prompts
from cache2cache.training.loss import response_inputs

DEFAULT = inspect.signature(prefill).parameters["chunk_tokens"].default


def decode(lm: LM, prompt: Prefilled, new_tokens: int, stock: bool) -> None:
    inputs = prompt.inputs()
    if stock:
        inputs[CACHE] = DynamicCache()
        for index, (keys, values) in enumerate(zip(prompt.kv.keys, prompt.kv.values, strict=True)):
            inputs[CACHE].update(keys, values, index)
    lm.model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)  # type: ignore[operator]


def read_rows(lm: LM, rows: list[list[int]], alone_from: int) -> None:
    with patch.object(kv, "_LONG", alone_from):
        prefill_prompts(lm, rows)


@torch.no_grad()
def read_on(lm: LM, prompt: Prefilled, new: torch.Tensor, grouped: bool) -> None:
    with patch.dict(os.environ, TRANSFORMERS_SDPA_FORCE_GQA=str(int(grouped))):
        lm.decoder(**response_inputs(prompt, new))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, DEFAULT])
    parser.add_argument("--rows", type=int, default=2, help="prompts that are answered at once")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    heap.keep()
    lm = load_lm(options.model, dtype=options.dtype)
    console = Console(width=110)
    console.print(", ".join(f"{key} {value}" for key, value in measure.machine().items()))
    weights = sum(p.nbytes for p in lm.model.parameters())
    console.print(f"{lm.name}, {options.tokens:,} tokens, weights {weights / 1e9:.2f} GB")
    torch.manual_seed(0)
    ids = torch.randint(lm.vocab_size, (1, options.tokens), device=lm.device)
    table = Table("tokens at once", "peak above the weights, GB", "of which cache", "time over the first row's")
    sizes: list[int] = []

    def read(chunk: int) -> None:
        sizes.append(prefill(lm, ids, torch.ones_like(ids), chunk_tokens=chunk).nbytes)

    first = None
    for chunk in options.chunks:
        began = now()
        rise = peak_rise(partial(read, chunk))
        seconds = now() - began
        first = first or seconds
        peak = "unknown here" if rise is None else f"{rise / 1e9:.2f}"
        table.add_row(f"{chunk:,}", peak, f"{sizes[-1] / 1e9:.2f}", f"{seconds / first:.2f}")
    console.print(table)
    rows = [ids[0, : options.tokens - options.tokens * row // 32].tolist() for row in range(options.rows)]
    reading = {"alone": partial(read_rows, lm, rows, 1), "together": partial(read_rows, lm, rows, options.tokens + 1)}
    times = {name: median(found) for name, found in take_turns(reading, options.rounds, seconds=300).items()}
    console.print(
        f"{options.rows} rows of {len(rows[-1]):,} to {len(rows[0]):,} tokens: one by one {times['alone']:.2f} s, "
        f"{times['alone'] / times['together']:.2f} of that together, padded"
    )
    padded, new = prefill_prompts(lm, rows), ids[:, : options.new_tokens].expand(options.rows, -1)
    reading = {name: partial(read_on, lm, padded, new, name == "grouped") for name in ("grouped", "repeated")}
    times = {name: median(found) for name, found in take_turns(reading, options.rounds, seconds=300).items()}
    console.print(
        f"{options.new_tokens} tokens at once behind them: {times['grouped']:.2f} s, "
        f"{times['grouped'] / times['repeated']:.2f} of that with keys and values repeated"
    )
    prompt = prefill_prompts(lm, [ids[0].tolist()] * options.rows)
    with torch.no_grad():
        times = take_turns(
            {name: partial(decode, lm, prompt, options.new_tokens, name == "stock") for name in ("ours", "stock")},
            options.rounds, seconds=300,
        )  # fmt: skip
    ours, stock = (median(times[name]) for name in ("ours", "stock"))
    console.print(
        f"{options.new_tokens} tokens behind {options.rows} of them: {1000 * ours / options.new_tokens:.1f} ms a step, "
        f"{ours / stock:.2f} of that with transformers' own cache"
    )


if __name__ == "__main__":
    main()
