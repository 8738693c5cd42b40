"""The fuser alone, on random caches of the default pair's shapes: time over its floor, by positions and chunk size.

python benchmarks/fuser.py                       # a table: which CHUNK of cache2cache/fuser/c2c.py is best here
python benchmarks/fuser.py --profile 1024        # where the time goes at 1,024 positions
"""

from __future__ import annotations

import argparse

import measure
import torch
from first_token import UNTRAINED, fuser_weights
from measure import medians, product, take_turns
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cache2cache.config import ModelIdentity
from cache2cache.fuser import C2CFuser, c2c, make_fuser
from cache2cache.kv import KV

RECEIVER = ModelIdentity(name="SmolLM2-135M", num_layers=30, num_kv_heads=3, head_dim=64)
SHARER = ModelIdentity(name="Qwen2.5-Coder-1.5B", num_layers=28, num_kv_heads=2, head_dim=128)


def caches(positions: int, batch: int) -> tuple[KV, KV, Tensor]:
    """Random caches of both models and where they are fused: all positions, with gaps as a token map has them."""

    def make(model: ModelIdentity, length: int) -> KV:
        shape = (model.num_layers, batch, model.num_kv_heads, length, model.head_dim)
        return KV(torch.randn(shape), torch.randn(shape))

    length = positions // batch
    t = torch.arange(length)
    s = (t * 9 // 10).repeat(batch)
    row = torch.arange(batch).repeat_interleave(length)
    return make(RECEIVER, length + 8), make(SHARER, length), torch.stack([row, t.repeat(batch) + 4, row, s])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, nargs="+", default=[64, 256, 1024, 8192])
    parser.add_argument("--chunks", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=60, help="begin no further round of a length after that long")
    parser.add_argument("--profile", type=int, metavar="POSITIONS", help="print a profile instead")
    options = parser.parse_args()
    fuser = make_fuser(UNTRAINED.model_copy(update={"receiver": RECEIVER, "sharer": SHARER})).eval()
    # 31 MiB, freed at once: the C library then keeps what is freed, as it does once a model was loaded. Without it
    # a third of the time goes into fresh pages.
    torch.empty(31 * 2**18)
    console = Console(width=110)
    console.print(", ".join(f"{key} {value}" for key, value in measure.machine().items()))
    with torch.no_grad():
        if options.profile is not None:
            profile(fuser, *caches(options.profile, options.batch), console)
            return
        table = Table("positions", "GFLOP/s", "floor ms", *(f"CHUNK {n}" for n in options.chunks))
        for positions in options.positions:
            receiver, sharer, where = caches(positions, options.batch)
            scratch = KV(receiver.keys.clone(), receiver.values.clone())

            def fuse(chunk: int, caches: tuple[KV, KV, Tensor, KV] = (receiver, sharer, where, scratch)) -> None:
                c2c.CHUNK = chunk
                fuser(*caches)

            large, operations = product(1, 1024, 1536, 8960, receiver.keys)
            quantities = {"rate": large} | {f"{n}": lambda n=n: fuse(n) for n in options.chunks}
            t = medians(take_turns(quantities, options.repeats, options.seconds))
            rate = operations / t["rate"]
            floor = 2 * fuser_weights(fuser) * where.shape[1] / rate
            ratios = [f"{t[f'{n}'] / floor:.2f}" for n in options.chunks]
            table.add_row(
                f"{options.batch} x {positions // options.batch}", f"{rate / 1e9:.0f}", f"{1e3 * floor:.1f}", *ratios
            )
    console.print(table)


def profile(fuser: C2CFuser, receiver: KV, sharer: KV, where: Tensor, console: Console) -> None:
    fuser(receiver, sharer, where, receiver)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as watched:
        for _ in range(5):
            fuser(receiver, sharer, where, receiver)
    console.print(watched.key_averages().table(sort_by="self_cpu_time_total", row_limit=20), highlight=False)


if __name__ == "__main__":
    main()
