"""Tiny random models and tokenizers: four families of unequal shapes, made offline in well under a second each.

model = tiny_model("qwen3")                          # random weights, eval, float32, no gradients
tokenizer = tiny_tokenizer(TOKENIZER_OF["qwen3"])    # its natural tokenizer
"""

from __future__ import annotations

import json
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = ("qwen3", "llama", "qwen2", "gemma3")
TOKENIZER_OF = {"qwen3": "bytes", "qwen2": "bytes", "llama": "words", "gemma3": "pieces"}

# Depths, head counts, head sizes, widths and vocabularies all differ. The large initialisation makes attention matter:
# with the usual 0.02 a random model's answer hardly depends on its cache, and a test of the cache could not fail.
_SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
              "hidden_size": 32, "intermediate_size": 48, "vocab_size": 264},
    "llama": {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8,
              "hidden_size": 48, "intermediate_size": 64, "vocab_size": 400},
    "qwen2": {"num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 1,
              "hidden_size": 48, "intermediate_size": 40, "vocab_size": 272},
    "gemma3": {"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10,
               "hidden_size": 40, "intermediate_size": 56, "vocab_size": 608, "query_pre_attn_scalar": 10,
               "sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2},
}  # fmt: skip
_CLASSES: dict[str, tuple[type, type]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
}


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A frozen random model of `family` (qwen3, llama, qwen2, gemma3); `overrides` are fields of its config."""
    config_class, model_class = _CLASSES[family]
    tokenizer = tiny_tokenizer(TOKENIZER_OF[family])
    settings: dict[str, Any] = {
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = config_class(**{**settings, **_SHAPES[family], **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    return model.eval().requires_grad_(False)


_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_HEADERS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
_TURNS = (  # as Gemma does it: the assistant is called model, the system message goes into the first user turn
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_CORPUS = [
    "Which of these is the best answer? The correct answer is A. Answer with the letter.",
    "What is the capital of France? The capital of France is Paris, and the river is the Seine.",
    "Plants make food from sunlight, water and air. Plants need light to grow; animals eat plants.",
    "You are a helpful assistant. What happens when water is heated? It boils and turns into steam.",
    "A magnet attracts iron. Which material is attracted by a magnet? 1, 2, 3 or 4 of them.",
    "水是生命之源。北京是中国的首都。 Größe, façade, naïve.",
]


def tiny_tokenizer(kind: str = "bytes") -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template.

    "bytes": one token a byte, ChatML. "words": byte-level BPE with merges, bos token, Llama-like headers.
    "pieces": "▁" for a space and byte fallback, Gemma-like turns. "plain": "bytes" without a chat template.
    """
    if kind in ("bytes", "plain"):
        return _byte_level(
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            None,
            "<|im_end|>",
            "<|endoftext|>",
            _CHATML if kind == "bytes" else None,
        )
    if kind == "words":
        return _byte_level(
            ["<|bos|>", "<|start|>", "<|end|>", "<|eot|>", "<|pad|>"], "<|bos|>", "<|eot|>", "<|pad|>", _HEADERS, 400
        )
    if kind == "pieces":
        return _pieces()
    raise ValueError(f"unknown tokenizer kind {kind!r}; expected bytes, words, pieces or plain")


def _byte_level(
    special: list[str], bos: str | None, eos: str, pad: str, template: str | None, size: int = 0
) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=size > 0)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size or len(alphabet) + len(special),
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator(_CORPUS if size else [], trainer)
    return _wrap(core, bos, eos, pad, None, template)


def _pieces() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
    ascii_only = [text.encode("ascii", "ignore").decode() for text in _CORPUS]  # the rest takes the byte fallback
    alphabet = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(ascii_only, trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    vocab = {piece: index for index, piece in enumerate(special + fallback + pieces)}
    merges = [tuple(merge) for merge in model["merges"]]
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(special)
    return _wrap(core, "<bos>", "<eos>", "<pad>", "<unk>", _TURNS)


def spaced_tokenizer(kind: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """One that puts a "▁" before each text, as SentencePiece's do; of the kind "pieces" but for that.

    "prepend": by a normalizer. "first", "always": by the pre-tokenizer, as transformers builds LlamaTokenizer.
    """
    core = Tokenizer.from_str(_pieces().backend_tokenizer.to_str())
    if kind == "prepend":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.normalizer = None
        core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=kind, split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrap(core, "<bos>", "<eos>", "<pad>", "<unk>", template)


def _wrap(
    core: Tokenizer, bos: str | None, eos: str, pad: str, unk: str | None, template: str | None
) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad, unk_token=unk
    )
    tokenizer.chat_template = template
    return tokenizer
