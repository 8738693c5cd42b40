"""Linear layers with their weights laid out beforehand (models/packed.py), against torch's own.

    OMP_NUM_THREADS=1 python benchmarks/packed.py
    python benchmarks/packed.py --layers 576x576 --rows 8

For each layer (outputs x inputs; by default the MLP of Qwen2.5-1.5B) and each number of rows: torch's time over that of
the packed layer, medians of turns in one run. Above 1 the packed one is faster.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from statistics import median

import torch
from measure import machine, take_turns
from torch import nn

from cache2cache.models.packed import PackedLinear, possible

COPIES = 4  # of each layer, one after the other, so that weights come from memory as they do in a model


def times_faster(outputs: int, inputs: int, rows: int, rounds: int) -> float:
    """torch's time over the packed layer's."""
    own = [nn.Linear(inputs, outputs) for _ in range(COPIES)]
    packed = [PackedLinear(layer) for layer in own]
    x = torch.randn(rows, inputs)

    def through(layers: list[nn.Module]) -> None:
        for layer in layers:
            layer(x)

    times = take_turns({"own": partial(through, own), "packed": partial(through, packed)}, rounds, 60)
    return median(times["own"]) / median(times["packed"])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=["8960x1536", "1536x8960"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 8, 16, 40, 64, 256, 1440])
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    if not possible():
        sys.exit("no packed weights on this processor, or not in this build of torch")
    print(json.dumps(machine()))
    print("layer      " + "".join(f"{rows:>7}" for rows in given.rows) + "  rows")
    for layer in given.layers:
        outputs, inputs = map(int, layer.split("x"))
        found = [times_faster(outputs, inputs, rows, given.rounds) for rows in given.rows]
        print(f"{layer:11}" + "".join(f"{ratio:7.2f}" for ratio in found), flush=True)


if __name__ == "__main__":
    main()
