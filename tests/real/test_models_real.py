"""The smallest model of the catalogue, fetched for real into the user's cache and asked a question."""

from __future__ import annotations

import json

import pytest
import torch

from cache2cache.models import LM, catalogue, load_lm

NAME = "smollm2-135m-instruct"


def test_it_knows_the_capital_of_france(smollm2: LM) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = smollm2.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(smollm2.device)
    answer = smollm2.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    text = smollm2.tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == "The capital of France is Paris."


def test_it_has_the_shapes_of_smollm2(smollm2: LM) -> None:
    assert (smollm2.num_layers, smollm2.num_kv_heads, smollm2.head_dim) == (30, 3, 64)
    assert smollm2.context_length == 8192
    assert smollm2.revision == catalogue.entry(NAME).sha256


def test_the_converted_folder_is_an_ordinary_one(smollm2: LM) -> None:
    folder = catalogue.path(NAME)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert smollm2.fingerprint == load_lm(folder, dtype=torch.bfloat16).fingerprint
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert size == pytest.approx(catalogue.entry(NAME).folder_size, rel=0.01)
