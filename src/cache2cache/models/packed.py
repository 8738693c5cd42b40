"""Weights laid out beforehand for batches on a CPU.

With a few dozen rows, as when a batch of answers is decoded, much of a float32 product is arranging the weights. oneDNN
takes weights that are arranged already. A single row takes longer, and long prompts nearly the same
(benchmarks/packed.py, docs/LOG.md); small layers gain nothing.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn

from .. import heap
from .load import LM

LEAST_WEIGHTS = 2**20


class PackedLinear(nn.Module):
    """A linear layer that holds its weight only as oneDNN wants it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed: Tensor = _ops()._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = _ops()._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return made


def pack(lm: LM) -> int:
    """Lay out a model's large linear layers for batches, in place; how many there were.

    Only where it pays: float32 on an x86 CPU. The weights are not held twice, except those that the head shares with
    the embedding; the model can't be saved or trained afterwards.
    """
    if not possible() or hasattr(lm.model, "hf_device_map"):  # whose hooks move what goes in and out of a layer
        return 0
    _ = lm.fingerprint  # is made of the weights
    # By their names, for a list of the layers would keep the weights of those that are done.
    names = [name for name, module in lm.model.named_modules() if type(module) is nn.Linear and _pays(module.weight)]
    for name in names:
        linear = lm.model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        lm.model.set_submodule(name, PackedLinear(linear))
        del linear
        heap.give_back()  # or a heap that keeps what is freed would hold the weights twice
    return len(names)


def _pays(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= LEAST_WEIGHTS


def _ops() -> Any:
    return torch.ops.mkldnn


def possible() -> bool:
    """Whether this is an x86 CPU and torch was built with what torch.compile itself uses there."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    x86 = platform.machine() in ("x86_64", "AMD64")
    return x86 and torch.backends.mkldnn.is_available() and all(hasattr(_ops(), name) for name in names)
