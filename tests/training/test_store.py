"""The prefill store: what it keeps, how exactly, and what a kill in the middle leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cache2cache import C2CError
from cache2cache.kv import CACHE, KV, pad_left, prefill
from cache2cache.models import LM
from cache2cache.packing import dequantize, quantize
from cache2cache.training import store as module
from cache2cache.training.store import PROMPTS_PER_SHARD, Store, key_of
from training.runs import lm_of

PROMPTS = [[1 + (7 * n + 3 * i) % 250 for i in range(3 + n * 5 % 17)] for n in range(10)]


@pytest.fixture(scope="module")
def sharer() -> LM:
    return lm_of("qwen3")


def truth(sharer: LM, ids: list[int]) -> KV:
    """A prompt's cache from stock transformers, (L, 1, H, T, D)."""
    layers = sharer.model(torch.tensor([ids]))[CACHE].layers
    return KV(torch.stack([layer.keys for layer in layers]), torch.stack([layer.values for layer in layers]))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what comes back ------------------------------------------------------------------------------------------------


def test_bfloat16_is_exact_to_rounding(sharer: LM, tmp_path: Path) -> None:
    store = Store(tmp_path, sharer, "bfloat16")
    store.fill(sharer, PROMPTS, batch_tokens=1)  # one prompt at a time, so that not a bit can differ
    for opened in (store, Store(tmp_path, sharer)):
        for ids in PROMPTS:
            assert ids in opened and [*ids, 1] not in opened
            kv = opened.read([ids])
            exact = prefill(sharer, *pad_left([ids], 0, "cpu"))
            for got, expected in ((kv.keys, exact.keys), (kv.values, exact.values)):
                assert got.dtype == torch.float32
                assert torch.equal(got, expected.to(torch.bfloat16).float())
            torch.testing.assert_close(kv.keys, truth(sharer, ids).keys, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_batch_is_padded_on_the_left_and_cut_on_the_right(sharer: LM, tmp_path: Path, precision: Any) -> None:
    store = Store(tmp_path, sharer, precision)
    store.fill(sharer, PROMPTS, batch_tokens=40)  # several prompts at a time
    rows = [PROMPTS[3], PROMPTS[0], PROMPTS[5], PROMPTS[3]]
    lengths = [len(rows[0]), 2, 0, 4]
    kv = store.read(rows, lengths)
    longest = max(lengths)
    assert kv.keys.shape == (4, 4, 2, longest, 16)
    for row, (ids, length) in enumerate(zip(rows, lengths, strict=True)):
        whole = truth(sharer, ids)
        for got, expected in ((kv.keys, whole.keys), (kv.values, whole.values)):
            assert not got[:, row, :, : longest - length].any()
            torch.testing.assert_close(
                got[:, row, :, longest - length :], expected[:, 0, :, :length], atol=2e-2, rtol=1e-2
            )


def test_int8_is_off_by_half_a_step_of_each_channel(sharer: LM, tmp_path: Path) -> None:
    store = Store(tmp_path, sharer, "int8")
    store.fill(sharer, PROMPTS, batch_tokens=1)
    worst = 0.0
    for ids in PROMPTS:
        kv, exact = store.read([ids]), prefill(sharer, *pad_left([ids], 0, "cpu"))
        for got, expected in ((kv.keys, exact.keys), (kv.values, exact.values)):
            step = (expected.amax(3, keepdim=True) - expected.amin(3, keepdim=True)) / 255
            error = (got - expected).abs()
            assert (error <= step / 2 * 1.001 + 1e-5).all()
            worst = max(worst, (error / step.clamp(min=1e-6)).max().item())
    assert worst > 0.4  # and the bound is tight


def test_quantize_keeps_ends_and_constants() -> None:
    x = torch.tensor([[-3.0, 7.0, 200.0], [5.0, 7.0, 260.0], [0.01, 7.0, 231.0]])
    codes, low, scale = quantize(x)
    assert codes.dtype == torch.int8
    assert codes[:2, 0].tolist() == [-128, 127] and codes[:2, 2].tolist() == [-128, 127]
    back = dequantize(codes, low, scale)
    torch.testing.assert_close(back[:2], x[:2])
    assert torch.equal(back[:, 1], x[:, 1])
    assert abs(back[2, 0] - 0.01) <= 8 / 255 / 2 and abs(back[2, 2] - 231) <= 60 / 255 / 2


# ---- sizes and limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_the_estimate_is_what_is_written(sharer: LM, tmp_path: Path, precision: Any) -> None:
    store = Store(tmp_path, sharer, precision)
    store.fill(sharer, PROMPTS[:4])
    before = {path.name for path in tmp_path.glob("shard-*")}
    estimate = store.estimate([*PROMPTS, *PROMPTS[2:7]])  # each once, and those that are there not at all
    store.fill(sharer, PROMPTS)
    new = [load_file(path) for path in tmp_path.glob("shard-*") if path.name not in before]
    assert estimate == sum(tensor.nbytes for shard in new for tensor in shard.values()) > 0
    tokens = sum(map(len, PROMPTS[4:]))
    width = 2 * 4 * 2 * 16  # keys and values, layers, heads, head size
    assert estimate == (tokens * width * 2 if precision == "bfloat16" else tokens * width + 6 * 8 * width)
    assert store.estimate(PROMPTS) == 0


def test_nothing_is_written_beyond_the_cap(sharer: LM, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "store"
    need = Store(folder, sharer, "bfloat16").estimate(PROMPTS)
    with pytest.raises(C2CError, match=r"would need .* GB, the limit is .* GB; use fewer prompts, int8"):
        Store(folder, sharer, "bfloat16").fill(sharer, PROMPTS, max_bytes=need - 1)
    assert not (tmp_path / "new").exists()
    Store(folder, sharer, "int8").fill(sharer, PROMPTS, max_bytes=need)  # as advised
    before = contents(folder)
    with pytest.raises(C2CError, match="the limit is"):
        Store(folder, sharer).fill(sharer, [[9] * 500], max_bytes=need)
    assert contents(folder) == before
    Store(folder, sharer).fill(sharer, PROMPTS, max_bytes=0)  # nothing is missing


def test_nothing_is_written_on_a_full_disk(sharer: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "store"
    store = Store(folder, sharer, "bfloat16")
    need = store.estimate(PROMPTS)
    usage = namedtuple("usage", "total used free")
    asked: list[Path] = []

    def disk(path: Path) -> usage:
        asked.append(path)
        return usage(0, 0, 10**9 + need - 1)

    monkeypatch.setattr(shutil, "disk_usage", disk)
    with pytest.raises(C2CError, match=r"needs 0.0 GB and 1 GB of slack, .* has 1.0 GB free; make room or use int8"):
        store.fill(sharer, PROMPTS)
    assert asked == [tmp_path] and not folder.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 10**9 + need))
    store.fill(sharer, PROMPTS)


# ---- stops and resumes ----------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from cache2cache.training import store as module
from training.runs import lm_of
from training.test_store import PROMPTS

written = 0
def save_file(tensors, path, metadata, original=module.save_file):
    global written
    if written == 2:
        Path(path).write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    original(tensors, path, metadata)
    written += 1

module.save_file = save_file
module.PROMPTS_PER_SHARD = 3
sharer = lm_of("qwen3")
module.Store(sys.argv[2], sharer, "bfloat16").fill(sharer, PROMPTS, batch_tokens=1)
"""


def test_a_killed_fill_goes_on_where_it_was(sharer: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "store"
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parents[1]), str(folder)]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = contents(folder)
    assert sorted(name.split("-")[0] for name in before) == [".shard", "shard", "shard", "store.json"]

    store = Store(folder, sharer, "bfloat16")
    longest_first = sorted(PROMPTS, key=len, reverse=True)
    assert [ids for ids in longest_first if ids in store] == longest_first[:6]
    computed: list[int] = []
    monkeypatch.setattr(
        module, "prefill", lambda lm, ids, mask: computed.append(ids.shape[1]) or prefill(lm, ids, mask)
    )
    told: list[int] = []
    store.fill(sharer, PROMPTS, batch_tokens=1, progress=told.append)
    assert computed == told == [len(ids) for ids in longest_first[6:]]
    after = contents(folder)
    assert {name: after[name] for name in before} == before  # what was there is as it was

    whole = Store(tmp_path / "whole", sharer, "bfloat16")
    whole.fill(sharer, PROMPTS, batch_tokens=1)
    for opened in (store, Store(folder, sharer)):
        got, expected = opened.read(PROMPTS), whole.read(PROMPTS)
        assert torch.equal(got.keys, expected.keys) and torch.equal(got.values, expected.values)
    computed.clear()
    store.fill(sharer, PROMPTS)
    assert computed == []

    (stale,) = folder.glob(".shard-*")
    os.utime(stale, times=(time.time() - 4000,) * 2)  # an hour later nobody is writing it any more
    store.fill(sharer, [*PROMPTS, [5, 6]])
    assert not stale.exists()


def test_a_failed_write_leaves_nothing_half_done(sharer: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    store = Store(tmp_path, sharer, "bfloat16")
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        store.fill(sharer, PROMPTS)
    assert [path.name for path in tmp_path.iterdir()] == ["store.json"]


def test_many_prompts_make_several_shards(sharer: LM, tmp_path: Path) -> None:
    prompts = [[1 + n % 200, 2 + n // 200] for n in range(PROMPTS_PER_SHARD + 5)]
    store = Store(tmp_path, sharer, "bfloat16")
    store.fill(sharer, prompts + prompts[:3] + [[]])  # each once; an empty one has nothing to keep
    assert len(list(tmp_path.glob("shard-*"))) == 2 and len(store.index) == len(prompts)
    torch.testing.assert_close(store.read([prompts[66]]).keys, truth(sharer, prompts[66]).keys, atol=1e-2, rtol=1e-2)


def test_keys_tell_prompts_apart() -> None:
    keys = {key_of(ids) for ids in ([1], [1, 0], [0, 1], [256], [1, 1], [65536], [])}
    assert len(keys) == 7 and key_of((3, 4)) == key_of([3, 4])


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_another_sharer_is_refused(sharer: LM, tmp_path: Path) -> None:
    Store(tmp_path, sharer, "bfloat16").fill(sharer, PROMPTS[:1])
    before = contents(tmp_path)
    other = lm_of("qwen3", seed=1)
    for arguments in ((), ("bfloat16",)):
        with pytest.raises(C2CError) as error:
            Store(tmp_path, other, *arguments)  # type: ignore[arg-type]
        for lm in (sharer, other):
            assert f"{lm.name} (weights {lm.fingerprint[:12]})" in str(error.value)
    with pytest.raises(C2CError, match="holds bfloat16, int8 was asked for; use another folder"):
        Store(tmp_path, sharer, "int8")
    assert contents(tmp_path) == before


def test_what_is_no_store(sharer: LM, tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(C2CError, match=r"is no prefill store \(FileNotFoundError\); make one with c2c precompute"):
            Store(folder, sharer)
    (tmp_path / "store.json").write_text("{half")
    for arguments in ((), ("int8",)):
        with pytest.raises(C2CError, match=r"is no prefill store \(JSONDecodeError\)"):
            Store(tmp_path, sharer, *arguments)  # type: ignore[arg-type]
    (tmp_path / "store.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(C2CError, match="has store format 99, this version reads 1"):
        Store(tmp_path, sharer)


def test_a_damaged_shard_is_named(sharer: LM, tmp_path: Path) -> None:
    Store(tmp_path, sharer, "bfloat16").fill(sharer, PROMPTS)
    (path,) = tmp_path.glob("shard-*")
    whole = path.read_bytes()
    for content in (whole[:-100], whole[:50], b"", b"x" * 1000):
        path.write_bytes(content)
        with pytest.raises(C2CError, match=rf"{path.name} is damaged \(\w+\); remove it and run c2c precompute again"):
            Store(tmp_path, sharer)
    path.unlink()
    store = Store(tmp_path, sharer)  # as the message says
    assert len(store.missing(PROMPTS)) == 10


def test_a_missing_prompt(sharer: LM, tmp_path: Path) -> None:
    store = Store(tmp_path, sharer, "bfloat16")
    store.fill(sharer, PROMPTS[:2])
    with pytest.raises(C2CError, match=r"a prompt of 13 tokens is not in the store .*; run c2c precompute with"):
        store.read([PROMPTS[0], PROMPTS[2]])
