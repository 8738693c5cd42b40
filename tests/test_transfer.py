"""Caches that travel: what comes back is what left, or an error that says what is wrong."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cache2cache import C2C, C2CError, FuserConfig, load_lm
from cache2cache.kv import KV, Prefilled, prefill_prompts
from cache2cache.models import LM
from cache2cache.packing import FORMATS, Coded, decode, encode, pack, relative_error, unpack
from cache2cache.pair import FusedCache
from cache2cache.transfer import from_bytes, load, save, to_bytes
from tiny import FAMILIES, TOKENIZER_OF, tiny_model, tiny_tokenizer

OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
ROWS = [[9, 10, 11, 12, 13], [20], [30 + i for i in range(17)]]


def lm_of(family: str, seed: int = 0, **overrides: Any) -> LM:
    return load_lm(tiny_model(family, seed, **overrides), tokenizer=tiny_tokenizer(TOKENIZER_OF[family]))


def pair_of(receiver: str, sharer: str) -> C2C:
    torch.manual_seed(0)
    config = FuserConfig(hidden_dim=16, intermediate_dim=12, gate_init=1.0)
    return C2C.from_models(lm_of(receiver), lm_of(sharer, 7), config)


def rows_of(cache: Prefilled) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(cache.input_ids, cache.attention_mask, strict=True)]


def real(cache: Prefilled) -> torch.Tensor:
    """The numbers at positions that are no padding."""
    counts = (cache.attention_mask.sum(1) - 1).tolist()
    return pack(cache.kv, counts)


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family: str) -> None:
    lm = lm_of(family)
    cache = prefill_prompts(lm, ROWS)
    back = from_bytes(to_bytes(cache, lm), lm, ROWS)
    assert type(back) is Prefilled
    assert torch.equal(back.input_ids, cache.input_ids) and torch.equal(back.attention_mask, cache.attention_mask)
    assert torch.equal(real(back), real(cache))
    assert torch.equal(lm.model.generate(**back.inputs(), **OPTIONS), lm.model.generate(**cache.inputs(), **OPTIONS))


def test_a_prompt_of_one_token_travels() -> None:
    lm = lm_of("llama")
    for numbers in FORMATS:
        back = from_bytes(to_bytes(prefill_prompts(lm, [[5]]), lm, numbers), lm)
        assert back.kv.length == 0 and back.input_ids.tolist() == [[5]]


def test_another_process_goes_on_with_a_fused_cache(tmp_path: Path) -> None:
    pair = pair_of("llama", "qwen3")
    pair.receiver.model.save_pretrained(tmp_path / "receiver")
    pair.receiver.need_tokenizer().save_pretrained(tmp_path / "receiver")
    chats = [[{"role": "user", "content": text}] for text in ("What is water?", "Why do plants need light to grow?")]
    fused = pair.prefill(chats)
    save(fused, tmp_path / "cache", pair.receiver)
    back = load(tmp_path / "cache", pair.receiver)
    assert isinstance(back, FusedCache)
    assert (back.fused_positions, back.bytes_passed) == (fused.fused_positions, fused.bytes_passed)
    assert [list(row) for row in back.coverage] == [list(row) for row in fused.coverage]
    code = (
        "import sys, json; from cache2cache import decode, load_lm; from cache2cache.transfer import load\n"
        "lm = load_lm(sys.argv[1]); out = decode.generate(lm, load(sys.argv[2], lm), **json.loads(sys.argv[3]))\n"
        "print(out.tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "receiver"), str(tmp_path / "cache"), json.dumps(OPTIONS)],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert json.loads(done.stdout) == pair.generate(fused, **OPTIONS).tolist(), done.stderr
    closed = Prefilled(fused.input_ids, fused.attention_mask, prefill_prompts(pair.receiver, rows_of(fused)).kv)
    unfused = pair.receiver.model.generate(**closed.inputs(), pad_token_id=0, **OPTIONS)
    assert json.loads(done.stdout) != unfused.tolist()  # the random models' answers do hang on the cache


@pytest.mark.parametrize("seed", range(20))
def test_the_stated_error_holds_and_padding_spoils_nothing(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 12, (3,), generator=generator).tolist()
    shape = (2, 3, 2, max(counts), 4)
    keys, values = torch.randn(shape, generator=generator) + 50 * seed, torch.randn(shape, generator=generator)
    for row, n in enumerate(counts):
        for x in (keys, values):
            x[:, row, :, : max(counts) - n] = float("nan") if seed % 2 else 1e30
    packed = pack(KV(keys, values), counts)
    coded = encode(packed, counts, "int8")
    off = (decode(coded, counts) - packed).abs()
    for row, (part, wrong) in enumerate(zip(packed.split(counts, 2), off.split(counts, 2), strict=True)):
        if counts[row]:
            step = (part.amax(2, keepdim=True) - part.amin(2, keepdim=True)) / 255
            assert bool((wrong <= 0.51 * step + 1e-5 * part.abs()).all())
    assert relative_error(decode(coded, counts), packed, counts) <= coded.error + 1e-9
    assert coded.error < 0.02
    assert torch.equal(pack(unpack(packed, counts), counts), packed)


def test_the_relative_error_by_hand() -> None:
    """Off by 3 and 4 in the values of the second layer, whose channel spreads by 30 and 40 about its means of 5 and 7:
    5 of 50. The first layer is off by less of what it spreads; a channel's mean counts for nothing."""
    exact = torch.zeros(2, 2, 4, 1, 1)  # layers, kinds, positions of rows of two, heads, channels
    exact[:, 0] = 1000.0
    exact[1, 1] = torch.tensor([5 + 30, 5 - 30, 7 + 40, 7 - 40]).view(4, 1, 1) / 2**0.5
    exact[0, 1] = torch.tensor([100.0, -100, 100, -100]).view(4, 1, 1)
    exact[1, 0, :2, 0, 0] += torch.tensor([8.0, -8.0])
    decoded = exact.clone()
    decoded[1, 1, 0] += 3
    decoded[1, 1, 3] -= 4
    decoded[0, 1, 0] += 6
    assert relative_error(decoded, exact, [2, 2]) == pytest.approx(5 / 50)
    assert relative_error(exact, exact, [2, 2]) == 0


@pytest.mark.parametrize("numbers", FORMATS)
def test_formats(numbers: str) -> None:
    lm = lm_of("qwen3")
    cache = prefill_prompts(lm, ROWS)
    data = to_bytes(cache, lm, numbers)
    back = from_bytes(data, lm)
    header = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["cache2cache"])
    counts = [len(row) - 1 for row in ROWS]
    assert relative_error(real(back), real(cache), counts) == pytest.approx(header["error"], rel=1e-4)
    assert header["error"] < {"float32": 1e-12, "float16": 1e-2, "bfloat16": 1e-1, "int8": 2e-2}[numbers]
    assert bool(torch.isfinite(back.kv.keys).all())
    assert len(data) < len(to_bytes(cache, lm)) or numbers == "float32"


def test_numbers_that_are_not_finite_are_refused() -> None:
    for numbers in FORMATS:
        for bad in (float("nan"), float("inf"), -float("inf")):
            packed = torch.randn(1, 2, 3, 2, 4)
            packed[0, 0, 1, 0, 0] = bad
            with pytest.raises(C2CError, match="finite"):
                encode(packed, [3], numbers)
            with pytest.raises(C2CError, match="finite"):
                decode(Coded(packed), [3])
    with pytest.raises(C2CError, match="float16"):
        encode(torch.full((1, 2, 3, 2, 4), 1e6), [3], "float16")


def test_what_differs_is_named() -> None:
    lm = lm_of("llama")
    data = to_bytes(prefill_prompts(lm, ROWS), lm)

    def message(other: LM, prompts: Any = None) -> str:
        with pytest.raises(C2CError) as caught:
            from_bytes(data, other, prompts)
        return str(caught.value)

    weights = lm_of("llama", seed=1)
    assert message(weights).count("against") == 1
    assert f"weights ({lm.fingerprint[:12]} against {weights.fingerprint[:12]})" in message(weights)
    assert "shapes (3 layers, 3 KV heads of 8 against 4 layers, 2 KV heads of 16)" in message(lm_of("qwen3"))
    other = LM(lm.model, tiny_tokenizer("bytes"), "other")
    assert "tokenizer (" in message(other) and "weights" not in message(other)
    template = LM(lm.model, tiny_tokenizer("words"), "other")
    template.need_tokenizer().chat_template = "{{ messages }}"
    assert "chat template (" in message(template) and "tokenizer (" not in message(template)
    assert "other tokens" in message(lm, [[1, 2, 3]])
    assert "context" in message(lm_of("llama", max_position_embeddings=10))
    # A tokenizer that has padded and cut in between is the same one; a model without one has nothing that differs.
    busy = LM(lm.model, tiny_tokenizer("words"), "busy")
    busy.need_tokenizer()(["a", "b c d"], padding=True, truncation=True, max_length=2)
    for same in (busy, LM(lm.model, None, "ids only")):
        assert torch.equal(from_bytes(data, same).input_ids, prefill_prompts(lm, ROWS).input_ids)


def test_a_cache_of_another_model_is_not_written() -> None:
    cache = prefill_prompts(lm_of("llama"), ROWS)
    with pytest.raises(C2CError, match="give the model that made it"):
        to_bytes(cache, lm_of("qwen3"))
    with pytest.raises(C2CError, match="expected one of float32"):
        to_bytes(cache, lm_of("llama"), "int4")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = lm_of("llama")
    save(prefill_prompts(lm, ROWS), tmp_path / "cache", lm)
    before = (tmp_path / "cache").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(C2CError, match="No space left on device"):
        save(prefill_prompts(lm, [[1, 2, 3]]), tmp_path / "cache", lm)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert (tmp_path / "cache").read_bytes() == before


def test_files_that_are_none(tmp_path: Path) -> None:
    lm = lm_of("llama")
    with pytest.raises(C2CError, match="can't be read"):
        load(tmp_path / "nothing", lm)
    with pytest.raises(C2CError, match="can't be read"):
        load(tmp_path, lm)
    (tmp_path / "huge").write_bytes((1 << 60).to_bytes(8, "little") + b"x" * 100)
    with pytest.raises(C2CError, match="huge: no whole cache: its header claims"):
        load(tmp_path / "huge", lm)


def with_header(data: bytes, change: Any) -> bytes:
    """The bytes with another header; `change` edits the parsed metadata in place."""
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    metadata = json.loads(entries["__metadata__"]["cache2cache"])
    change(metadata, entries)
    if isinstance(entries.get("__metadata__"), dict):
        entries["__metadata__"]["cache2cache"] = json.dumps(metadata)
    raw = json.dumps(entries).encode()
    return len(raw).to_bytes(8, "little") + raw + data[8 + size :]


WRONG: dict[str, tuple[Any, str]] = {  # what is changed, and what is said of it
    "huge length": (lambda m, e: m["lengths"].__setitem__(0, 10**15), "'lengths.0': Input should be less"),
    "negative": (lambda m, e: m["lengths"].__setitem__(0, -3), "'lengths.0': Input should be greater"),
    "zero": (lambda m, e: m["lengths"].__setitem__(0, 0), "'lengths.0': Input should be greater"),
    "text for a number": (lambda m, e: m["lengths"].__setitem__(0, "5"), "'lengths.0': Input should be a valid"),
    "bool for a number": (lambda m, e: m["lengths"].__setitem__(1, True), "'lengths.1': Input should be a valid"),
    "no prompts": (lambda m, e: m.update(lengths=[]), "'lengths': List should have at least 1"),
    "format": (lambda m, e: m.update(format_version=99), "has format 99, this version reads 1"),
    "huge error": (lambda m, e: m.update(error=1e400), "'error': Input should be a finite"),
    "numbers": (lambda m, e: m.update(numbers="int4"), "'numbers': Input should be 'float32'"),
    "other numbers": (lambda m, e: m.update(numbers="int8"), r"holds \d+ bytes of numbers, its metadata asks for"),
    "extra": (lambda m, e: m.update(surprise=1), "'surprise': Extra"),
    "kind": (lambda m, e: m.update(kind="fused"), "not of as many prompts"),
    "coverage": (lambda m, e: m.update(coverage=[[1.0]] * 9), "not of as many prompts"),
    "list": (lambda m, e: m.update(model=[]), "'model': Input should be an object"),
    "name": (lambda m, e: m["model"].update(name=3), "'model.name': Input should be a valid string"),
    "hash": (lambda m, e: m["model"].update(weights="zz"), "'model.weights': String should match"),
    "metadata": (lambda m, e: e.update(__metadata__=[1]), "not that of a cache"),
    "shape": (lambda m, e: e["kv"].update(shape=[1 << 62, 1 << 62]), "overflow computing"),
    "dtype": (lambda m, e: e["kv"].update(dtype="F64"), "invalid shape"),
    "offsets": (lambda m, e: e["kv"].update(data_offsets=[0, 1 << 60]), "invalid offset"),
    "missing": (lambda m, e: e.pop("kv"), "incomplete metadata"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_headers(name: str) -> None:
    lm = lm_of("llama")
    data = to_bytes(prefill_prompts(lm, ROWS), lm)
    from_bytes(with_header(data, lambda m, e: None), lm)  # written otherwise, it says the same
    change, words = WRONG[name]
    with pytest.raises(C2CError, match=words):
        from_bytes(with_header(data, change), lm)


@pytest.mark.parametrize("numbers", ["float32", "int8"])
def test_changed_bytes_never_pass(numbers: str) -> None:
    """Any change is an error, or what comes back is the same all the same (white space in the header)."""
    lm = lm_of("llama")
    data = to_bytes(prefill_prompts(lm, ROWS), lm, numbers)
    whole = from_bytes(data, lm)
    header = 8 + int.from_bytes(data[:8], "little")
    chance = random.Random(0)
    mutants = [data[:n] for n in (0, 3, 8, header - 1, header, len(data) - 1)]
    mutants += [data + b"\0", data + data, chance.randbytes(500), b"[" * 100_000, (200_000).to_bytes(8, "little")]
    mutants += [(100_000).to_bytes(8, "little") + b"[" * 200_000, (3).to_bytes(8, "little") + b"1e9"]
    for _ in range(400):
        mutant = bytearray(data)
        for _ in range(chance.choice([1, 1, 3])):
            place = chance.randrange(header if chance.random() < 0.6 else len(data))
            mutant[place] = chance.choice([mutant[place] ^ (1 << chance.randrange(8)), chance.randrange(256)])
        mutants.append(bytes(mutant))
    refused = 0
    for mutant in mutants:
        if mutant == data:
            continue
        try:
            back = from_bytes(mutant, lm)
        except C2CError:
            refused += 1
        else:
            assert torch.equal(back.kv.keys, whole.kv.keys) and torch.equal(back.input_ids, whole.input_ids)
    assert refused > 0.9 * len(mutants)
