"""Small training runs: tiny pairs, rows, questions and recipes for the tests of training, evaluation and commands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from cache2cache import C2C, FuserConfig, load_lm
from cache2cache.config import TrainConfig
from cache2cache.models import LM
from cache2cache.training.items import Item
from tiny import TOKENIZER_OF, tiny_model, tiny_tokenizer

FUSER: dict[str, Any] = {"hidden_dim": 8, "intermediate_dim": 6, "gate_init": 0.5}
CHATS = [
    "What is the capital of France?",
    "水是生命之源。 What is water? A magnet attracts iron, and plants need light to grow.",
    "Plants",
    "Which of these is the best answer? 1, 2, 3 or 4",
]
RESPONSES = [" Paris.", " A", " light 北 and water", " 2 or 3"]


def lm_of(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> LM:
    """A tiny model with its natural tokenizer."""
    return load_lm(tiny_model(family, seed, **overrides).to(dtype), tokenizer=tiny_tokenizer(TOKENIZER_OF[family]))


def pair_of(
    receiver: str = "llama",
    sharer: str | Sequence[str] = "qwen3",
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> C2C:
    """A tiny pair with untrained fusers, the same every time."""
    names = [sharer] if isinstance(sharer, str) else sharer
    mine, others = lm_of(receiver, dtype=dtype), [lm_of(name, 7, dtype) for name in names]
    torch.manual_seed(0)
    return C2C.from_models(mine, others, FuserConfig(**{**FUSER, **settings}))


def items_of(pair: C2C, chats: Sequence[str] = CHATS, responses: Sequence[str] = RESPONSES) -> list[Item]:
    """Chats and responses as token ids."""
    tokenizer = pair.receiver.need_tokenizer()
    return [
        Item(
            f"item:{index}",
            pair.encode([{"role": "user", "content": chat}]),
            tokenizer(response, add_special_tokens=False)["input_ids"],
        )
        for index, (chat, response) in enumerate(zip(chats, responses, strict=True))
    ]


def write_rows(path: Path, count: int = 22) -> Path:
    """Instruction data: short prompts and responses of unequal lengths, no two alike."""
    rows = (
        {
            "instruction": f"What is {i} of {'water and ' * (i % 3)}iron?",
            "response": f"It is {'ABCD'[i % 4] * (i % 5)}.",
        }
        for i in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_questions(path: Path, count: int = 9) -> Path:
    """Questions of one's own, with three, four or five options."""
    rows = (
        {
            "id": f"q{i}",
            "question": f"Which {'plant ' * (i % 4)}is number {i}?",
            "options": [f"option {i + k}" for k in range(3 + i % 3)],
            "answer": "ABC"[i % 3],
        }
        for i in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of the tiny pair that `tiny_models` wrote into `folder`: 16 examples to train on, 4 steps an epoch."""
    return {
        "receiver": {"source": str(folder / "llama")},
        "sharer": {"source": str(folder / "qwen3")},
        "output": str(folder / "run"),
        "fuser": {**FUSER, "dropout": 0.1, "normalize": True},
        "data": [{"jsonl": str(folder / "rows.jsonl")}],
        "epochs": 3,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "holdout": 6,
        "evaluate_every": 5,
        "save_every": 3,
        "calibration_prompts": 8,
        **changes,
    }


def config_of(folder: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(recipe_of(folder, **changes))


def write_recipe(folder: Path, **changes: Any) -> Path:
    """The recipe as YAML, with the rows it names."""
    write_rows(folder / "rows.jsonl")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(folder, **changes)))
    return path


def write_models(folder: Path, families: Sequence[str] = ("llama", "qwen3")) -> Path:
    """The recipe's models: llama receives, qwen3 shares."""
    for family in families:
        tiny_model(family).save_pretrained(folder / family)
        tiny_tokenizer(TOKENIZER_OF[family]).save_pretrained(folder / family)
    return folder
