"""The lm-evaluation-harness with a real model: the same answers as our own evaluation, question by question."""

from __future__ import annotations

from pathlib import Path

import torch

from cache2cache import C2C, FuserConfig
from cache2cache.models import LM
from cache2cache.tasks import load
from evaluation.harness import compare


def test_arc_easy_with_smollm2(smollm2: LM, data_dir: Path, tmp_path: Path) -> None:
    """Alone and with an open fuser."""
    torch.manual_seed(0)
    pair = C2C.from_models(smollm2, smollm2, FuserConfig(hidden_dim=8, intermediate_dim=8, gate_init=1.0))
    compare(pair, load("arc-easy", "validation", data_dir)[:6], tmp_path, ["receiver", "c2c"], 1e-2)
