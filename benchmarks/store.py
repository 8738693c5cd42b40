"""The prefill store: reading against a plain copy of as many bytes, and reading ahead beside a step.

python benchmarks/store.py                  # 28 layers of 2 heads of 128, as the default sharer; 0.7 GB on disk
python benchmarks/store.py --folder /mnt/x  # on another disk

The store is a real one, of a random sharer with the default sharer's caches and hardly any weights. Read "cold", it was
just opened and the system told to forget its files, which it does where nobody else has them open.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import measure
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from cache2cache import heap
from cache2cache.models.load import LM, load_lm
from cache2cache.training.store import Asked, Store

BATCH = 16


def sharer(layers: int, heads: int, dim: int) -> LM:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": layers, "num_key_value_heads": heads, "num_attention_heads": heads, "head_dim": dim}
    config = Qwen3Config(hidden_size=32, intermediate_size=32, vocab_size=256, **sizes)
    return load_lm(Qwen3ForCausalLM(config))


def opened(folder: Path, lm: LM, cold: bool) -> Store:
    """The store as a new process would find it; if `cold`, its files no longer in memory."""
    gc.collect()  # an open shard can't be forgotten
    for path in folder.glob("shard-*"):
        with path.open("rb") as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass
    return Store(folder, lm)


def epoch(store: Store, batches: Sequence[Asked], step: Callable[[], None], ahead: bool) -> float:
    """Seconds for all batches, read and then "trained on"."""
    items: Iterator[Asked] = store.ahead(batches, lambda asked: asked) if ahead else iter(batches)
    began = time.perf_counter()
    for asked in items:
        store.read(*asked)
        step()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the store is written; otherwise the system's for such files")
    parser.add_argument("--shape", type=int, nargs=3, default=[28, 2, 128], help="layers, heads, head size")
    parser.add_argument("--batches", type=int, default=8, help="of 16 prompts")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    heap.keep()
    console = Console(width=110)
    console.print(", ".join(f"{key} {value}" for key, value in measure.machine().items()))
    draw = random.Random(0)
    prompts = [[draw.randrange(256) for _ in range(draw.randrange(60, 190))] for _ in range(BATCH * options.batches)]
    batches = [Asked(prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
    lm = sharer(*options.shape)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        table = Table("numbers", "read MB", "read over copy", "cold over copy", "lower half of the layers over copy")
        for precision in ("int8", "bfloat16"):
            place = Path(folder) / precision
            store = Store(place, lm, precision)  # type: ignore[arg-type]
            store.fill(lm, prompts, batch_tokens=4096, max_bytes=10**11)
            kept = [torch.ones(store.bytes_per_token * sum(map(len, a.rows)), dtype=torch.uint8) for a in batches]
            half = (0, options.shape[0] // 2)
            times: dict[str, list[float]] = {"copy": [], "cold": [], "read": [], "half": []}
            for _ in range(options.rounds):
                for name, seconds in times.items():
                    if name == "cold":
                        del store
                        store = opened(place, lm, cold=True)
                    began = time.perf_counter()
                    for asked, x in zip(batches, kept, strict=True):
                        if name == "copy":
                            x.clone()
                        else:
                            store.read(*(asked._replace(layers=half) if name == "half" else asked))
                    seconds.append(time.perf_counter() - began)
            t = {name: median(values) for name, values in times.items()}
            ratios = [f"{t[name] / t['copy']:.2f}" for name in ("read", "cold", "half")]
            table.add_row(precision, f"{sum(x.nbytes for x in kept) / 1e6:.0f}", *ratios)
        console.print(table)

        a = torch.randn(512, 512)
        each = 2 * t["cold"] / len(batches)  # a step of twice the time of a cold read

        def waits() -> None:
            time.sleep(each)

        def products() -> None:
            for _ in range(count):
                a @ a

        began = time.perf_counter()
        for _ in range(20):
            a @ a
        count = max(1, int(each / (time.perf_counter() - began) * 20))
        table = Table("step", "store", "without reading ahead", "with", "with over without")
        for name, step in (("on a device (sleeps)", waits), ("on this processor (products)", products)):
            for cold in (False, True):
                spent: dict[bool, list[float]] = {False: [], True: []}
                alone = []
                for _ in range(options.rounds):
                    began = time.perf_counter()
                    for _ in batches:
                        step()
                    alone.append(time.perf_counter() - began)
                    for ahead, seconds in spent.items():
                        del store
                        store = opened(place, lm, cold)
                        seconds.append(epoch(store, batches, step, ahead))
                without, with_ = (median(spent[ahead]) for ahead in (False, True))
                ratios = [f"{x:.2f}" for x in (without / median(alone), with_ / median(alone), with_ / without)]
                table.add_row(name, "cold" if cold else "in memory", *ratios)
        console.print(table)
        console.print("Columns: times over the steps' alone. A step takes twice the time of reading a batch cold.")


if __name__ == "__main__":
    main()
