"""The prefill store: what it keeps, how exactly, and what a kill in the middle leaves."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import namedtuple
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cache2cache import C2CError
from cache2cache.kv import CACHE, KV, pad_left, prefill
from cache2cache.models import LM
from cache2cache.packing import dequantize, quantize
from cache2cache.training import store as module
from cache2cache.training.precompute import _typical
from cache2cache.training.store import PROMPTS_PER_SHARD, Asked, Store, check_room, key_of
from tiny import tiny_tokenizer
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
                assert torch.equal(got, expected.to(torch.bfloat16))
            torch.testing.assert_close(kv.keys.float(), truth(sharer, ids).keys, atol=1e-2, rtol=1e-2)


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
                got[:, row, :, longest - length :].float(), expected[:, 0, :, :length], atol=2e-2, rtol=1e-2
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


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_only_some_layers(sharer: LM, tmp_path: Path, precision: Any) -> None:
    store = Store(tmp_path, sharer, precision)
    store.fill(sharer, PROMPTS)
    rows, lengths = PROMPTS[:4], [3, 0, 9, 18]
    for dtype in (None, torch.float32, torch.bfloat16):
        whole, part = store.read(rows, lengths, dtype), store.read(rows, lengths, dtype, layers=(1, 3))
        assert whole.keys.dtype == (dtype or (torch.bfloat16 if precision == "bfloat16" else torch.float32))
        for got, expected in ((part.keys, whole.keys), (part.values, whole.values)):
            assert got.dtype == expected.dtype and got.shape == expected.shape
            assert torch.equal(got[1:3], expected[1:3])
        assert whole.keys.abs().sum((1, 2, 3, 4)).all()


# ---- reading ahead --------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(sharer: LM, tmp_path: Path) -> Store:
    store = Store(tmp_path, sharer, "bfloat16")
    store.fill(sharer, PROMPTS)
    return store


ASKED = [Asked(PROMPTS[n : n + 2], [3, n % 3], layers=(0, 3)) for n in range(8)]


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_reading_ahead_reads_the_same(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [filled.read(*asked) for asked in ASKED]
    started: list[Asked] = []
    read = filled._read
    monkeypatch.setattr(filled, "_read", lambda asked, out: started.append(asked) or read(asked, out))
    last: list[Any] = []
    for n, asked in enumerate(filled.ahead(iter(ASKED), lambda asked: asked)):
        assert asked is ASKED[n]
        assert all(before() is None for before in last), "a cache is kept beyond its turn"
        kv = filled.read(*asked)
        assert torch.equal(kv.keys[:3], expected[n].keys[:3]) and torch.equal(kv.values[:3], expected[n].values[:3])
        assert len(started) <= n + 3  # this one and two more
        other = filled.read(PROMPTS[:1])  # as the hold-out, in between
        started.remove(Asked(PROMPTS[:1]))
        assert other.length == len(PROMPTS[0])
        last.append(weakref.ref(kv))
        del kv
    assert started == ASKED and n == 7  # each once
    assert readers() == []


def test_reading_ahead_takes_one_thread_and_changes_no_others(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read, inside = filled._read, []
    monkeypatch.setattr(filled, "_read", lambda asked, out: inside.append(torch.get_num_threads()) or read(asked, out))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for asked in filled.ahead(ASKED[:2], lambda asked: asked):
            filled.read(*asked)
            assert torch.get_num_threads() == 3
        started: list[int] = []
        later = threading.Thread(target=lambda: started.append(torch.get_num_threads()))
        later.start()
        later.join()
    finally:
        torch.set_num_threads(before)
    assert inside == [1, 1] and started == [3]


def test_what_reading_ahead_raises_is_raised_in_its_turn(filled: Store) -> None:
    asked = [*ASKED[:3], Asked([[1, 2]]), *ASKED[3:]]
    done = 0
    with pytest.raises(C2CError, match="a prompt of 2 tokens is not in the store"):
        for one in filled.ahead(asked, lambda one: one):
            filled.read(*one)
            done += 1
    assert done == 3


def test_a_stop_ends_reading_ahead(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read, started = filled._read, []

    def slow(asked: Asked, out: torch.Tensor) -> KV:
        started.append(asked)
        time.sleep(0.5 if started[1:] else 0.05)
        return read(asked, out)

    monkeypatch.setattr(filled, "_read", slow)
    turns = filled.ahead(ASKED, lambda asked: asked)
    next(turns)
    assert readers()
    turns.close()
    assert readers() == [] and len(started) < 3  # what had not begun never does
    assert len(list(filled.ahead([], lambda asked: asked))) == 0
    assert filled.read(*ASKED[0]).length == 3


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
    with pytest.raises(C2CError, match=r"the limit is .* GB; use fewer prompts or a higher limit"):  # int8 already
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
    with pytest.raises(C2CError, match=r"need 0.0 GB and 1 GB of slack, 1.0 GB are free there; make room or use int8"):
        store.fill(sharer, PROMPTS)
    assert asked == [tmp_path] and not folder.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 10**9 + need))
    second = Store(tmp_path / "second", sharer, "bfloat16")
    with pytest.raises(C2CError, match=r"store, .*second need 0.0 GB and 1 GB of slack"):  # each alone would fit
        check_room([(store, PROMPTS), (second, PROMPTS)], 2 * need)
    with pytest.raises(C2CError, match=r"the 2 stores would need 0.0 GB, the limit is"):
        check_room([(store, PROMPTS), (second, PROMPTS)], 2 * need - 1)
    store.fill(sharer, PROMPTS)
    check_room([(store, PROMPTS), (second, PROMPTS)], need)


# ---- stops and resumes ----------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from cache2cache.training import store as module
from training.runs import lm_of
from training.test_store import PROMPTS

written = 0
def save_tensors(tensors, path, metadata, original=module.save_tensors):
    global written
    if written == 2:
        Path(path).write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    original(tensors, path, metadata)
    written += 1

module.save_tensors = save_tensors
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
        module, "prefill", lambda lm, ids, mask, **more: computed.append(ids.shape[1]) or prefill(lm, ids, mask, **more)
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
    others = folder / ".secrets.toml"
    others.write_text("not the store's")
    for path in (stale, others):
        os.utime(path, times=(time.time() - 4000,) * 2)  # an hour later nobody is writing it any more
    store.fill(sharer, [*PROMPTS, [5, 6]])
    assert not stale.exists() and others.exists()
    assert all(shard.stat().st_mode & 0o444 == 0o444 for shard in folder.glob("shard-*"))  # by whoever shares it


@pytest.mark.parametrize("broken", ["save_tensors", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_gets_full_leaves_whole_shards(
    sharer: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, number: int
) -> None:
    """In the third shard, wherever it is noticed: two are kept, nothing else, and the rest can be filled in."""
    monkeypatch.setattr(module, "PROMPTS_PER_SHARD", 3)
    store = Store(tmp_path, sharer, "bfloat16")
    store.fill(sharer, PROMPTS[:0])  # store.json is there
    owner = module if broken == "save_tensors" else os
    works, calls = getattr(owner, broken), []

    def fails(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) < 3:
            return works(*arguments, **named)
        if broken == "save_tensors":
            arguments[1].write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(owner, broken, fails)
        if number == errno.EIO:  # another trouble is told as it is
            with pytest.raises(OSError, match="Input/output error"):
                store.fill(sharer, PROMPTS)
        else:
            with pytest.raises(C2CError, match=r"no room is left .*; its 6 prompts are kept: make room and run c2c"):
                store.fill(sharer, PROMPTS)
    before = contents(tmp_path)
    assert sorted(name.split("-")[0] for name in before) == ["shard", "shard", "store.json"]
    store.fill(sharer, PROMPTS)  # the same object goes on, as does a new one
    assert not store.missing(PROMPTS) and not Store(tmp_path, sharer).missing(PROMPTS)
    assert {name: contents(tmp_path)[name] for name in before} == before


def test_a_file_that_cannot_grow(sharer: LM, tmp_path: Path) -> None:
    """A limit of the system that safetensors itself runs into, as into a full disk."""
    resource = pytest.importorskip("resource")
    store = Store(tmp_path, sharer, "bfloat16")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(C2CError, match="no room is left to write the store"):
            store.fill(sharer, PROMPTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(contents(tmp_path)) == ["store.json"]
    store.fill(sharer, PROMPTS)
    assert not Store(tmp_path, sharer).missing(PROMPTS)


# ---- several processes ----------------------------------------------------------------------------------------------

# Per run: that many processes on one store, killed after as many seconds as drawn and started again, until all have
# ended by themselves. All runs in one process that forks, so that torch is imported once. Prints, per run, the exit
# codes and the keys of all prompts that were computed.
MANY = """
import json, os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from cache2cache.training import store as module
from training.runs import lm_of
from training.test_store import CROWD, RUNS

torch.set_num_threads(1)
module.PROMPTS_PER_SHARD = 4
sharer = lm_of("qwen3")
compute = module.prefill

def start(folder, log):
    def prefill(lm, ids, mask, **more):
        time.sleep(0.01)
        for row, real in zip(ids, mask):
            os.write(log, (module.key_of(row[real.bool()].tolist()) + "\\n").encode())
        return compute(lm, ids, mask, **more)

    module.prefill = prefill
    if pid := os.fork():
        return pid
    try:
        module.Store(folder, sharer, "bfloat16").fill(sharer, CROWD, batch_tokens=30)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)

results = {}
for name, (count, kills) in RUNS.items():
    file = Path(sys.argv[2]) / (name + ".log")
    arguments = Path(sys.argv[2]) / name, os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    draw = random.Random(name)
    running = [start(*arguments) for _ in range(count)]
    for _ in range(kills):
        time.sleep(draw.uniform(0, 0.1))
        pid = running.pop(draw.randrange(count))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        running.append(start(*arguments))
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in running]
    results[name] = {"codes": codes, "computed": file.read_text().split()}
print(json.dumps(results))
"""
RUNS = {"alone": (1, 0), "three": (3, 0), "killed": (3, 15), "killed again": (2, 15)}  # processes, kills
CROWD = [[1 + (11 * n + 3 * i) % 250 for i in range(3 + n * 5 % 13)] for n in range(90)]


Runs = tuple[Path, dict[str, list[str]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The folder of the stores that the runs left, and what each of them computed."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-c", MANY, str(Path(__file__).parents[1]), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for result in results.values():
        assert set(result["codes"]) == {0}, done.stderr
    return folder, {name: result["computed"] for name, result in results.items()}


def test_processes_share_the_work(runs: Runs) -> None:
    """Nobody computes what another one has or is computing, and together they write what one would."""
    folder, computed = runs
    for name in ("alone", "three"):
        assert sorted(computed[name]) == sorted(map(key_of, CROWD))  # each once
    assert contents(folder / "three") == contents(folder / "alone")


@pytest.mark.parametrize("name", ["killed", "killed again"])
def test_kills_at_any_moment(runs: Runs, sharer: LM, name: str) -> None:
    folder, computed = runs
    assert set(computed[name]) == set(map(key_of, CROWD))
    assert len(computed[name]) <= len(CROWD) + 15 * 4  # a kill costs its shard at most
    after = contents(folder / name)
    assert {name: data for name, data in after.items() if not name.startswith(".")} == contents(folder / "alone")
    opened = Store(folder / name, sharer)
    assert not opened.missing(CROWD) and len(opened.index) == len(CROWD)


def test_the_last_one_waits_for_what_another_still_computes(sharer: LM, tmp_path: Path) -> None:
    """Both fills end with all prompts there; the waiting one tells what the other has computed."""
    ready, go = os.pipe(), os.pipe()
    script = KILLED.partition("written = 0")[0] + WAITS
    command = [sys.executable, "-c", script, str(Path(__file__).parents[1]), str(tmp_path), str(ready[1]), str(go[0])]
    other = subprocess.Popen(command, pass_fds=(ready[1], go[0]))
    try:
        assert os.read(ready[0], 1) == b"x"  # it holds its shard
        store, told = Store(tmp_path, sharer, "bfloat16"), []
        threading.Timer(0.3, lambda: os.write(go[1], b"x")).start()
        store.fill(sharer, PROMPTS, batch_tokens=1, progress=told.append)
        assert told == [sum(map(len, PROMPTS))] and not store.missing(PROMPTS)
        assert other.wait(60) == 0
    finally:
        other.kill()
        other.wait()
        for end in (*ready, *go):
            os.close(end)


WAITS = """
def prefill(*arguments, original=module.prefill, seen=[], **more):
    if not seen:
        os.write(int(sys.argv[3]), b"x")
        os.read(int(sys.argv[4]), 1)
    seen.append(1)
    return original(*arguments, **more)

module.prefill = prefill
sharer = lm_of("qwen3")
module.Store(sys.argv[2], sharer, "bfloat16").fill(sharer, PROMPTS)
"""


def test_a_new_store_belongs_to_who_was_first(sharer: LM, tmp_path: Path) -> None:
    """Two that both found no store: the second one's settings are held against the first one's."""
    late, same = Store(tmp_path / "store", sharer, "int8"), Store(tmp_path / "store", sharer, "bfloat16")
    stranger = lm_of("qwen3", seed=1)
    third = Store(tmp_path / "store", stranger, "bfloat16")
    Store(tmp_path / "store", sharer, "bfloat16").fill(sharer, PROMPTS[:5])
    before = contents(tmp_path / "store")
    with pytest.raises(C2CError, match="holds bfloat16, int8 was asked for"):
        late.fill(sharer, PROMPTS)
    with pytest.raises(C2CError, match="make a store for this sharer, in a folder of its own"):
        third.fill(stranger, PROMPTS)
    assert contents(tmp_path / "store") == before
    same.fill(sharer, PROMPTS)
    assert len(same.index) == 10 and len(list((tmp_path / "store").glob("shard-*"))) == 2


@pytest.mark.parametrize("trouble", ["no locks", "no links", "no fcntl"])
def test_a_poor_file_system(sharer: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if trouble == "no fcntl":
        monkeypatch.setattr(module, "fcntl", None)
    else:
        monkeypatch.setattr(*((module.fcntl, "lockf") if trouble == "no locks" else (os, "link")), refused)
    store = Store(tmp_path, sharer, "bfloat16")
    with pytest.warns(UserWarning, match="can't be locked") if trouble == "no locks" else nullcontext():
        store.fill(sharer, PROMPTS)
    assert not Store(tmp_path, sharer).missing(PROMPTS)
    assert [name for name in contents(tmp_path) if name.startswith(".")] == []


def test_shards_do_not_depend_on_the_order(sharer: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do they grow beyond what a shard may hold."""
    monkeypatch.setattr(module, "TOKENS_PER_SHARD", 30)
    for name, prompts in (("a", CROWD), ("b", CROWD[::-1] + CROWD[:9])):
        Store(tmp_path / name, sharer, "bfloat16").fill(sharer, prompts)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    lengths = [load_file(path)["kv"].shape[0] for path in (tmp_path / "a").glob("shard-*")]
    assert max(lengths) <= 30 and sum(lengths) == sum(map(len, CROWD))


def test_many_prompts_make_several_shards(sharer: LM, tmp_path: Path) -> None:
    prompts = [[1 + n % 200, 2 + n // 200] for n in range(PROMPTS_PER_SHARD + 5)]
    store = Store(tmp_path, sharer, "bfloat16")
    store.fill(sharer, prompts + prompts[:3] + [[]])  # each once; an empty one has nothing to keep
    assert len(list(tmp_path.glob("shard-*"))) == 2 and len(store.index) == len(prompts)
    kv = store.read([prompts[66]], dtype=torch.float32)
    torch.testing.assert_close(kv.keys, truth(sharer, prompts[66]).keys, atol=1e-2, rtol=1e-2)


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


def test_shards_of_another_store_are_refused(sharer: LM, tmp_path: Path) -> None:
    """Several sharers have a store each; files that were put together are told apart, though their shapes agree."""
    other = lm_of("qwen3", seed=1)
    for name, lm, precision in (("a", sharer, "bfloat16"), ("b", other, "bfloat16"), ("c", sharer, "int8")):
        Store(tmp_path / name, lm, precision).fill(lm, PROMPTS)  # type: ignore[arg-type]
    assert not torch.equal(
        Store(tmp_path / "a", sharer).read(PROMPTS).keys, Store(tmp_path / "b", other).read(PROMPTS).keys
    )
    for name in "bc":
        (shard,) = (tmp_path / name).glob("shard-*")
        moved = tmp_path / "a" / f"shard-{name}.safetensors"
        shutil.copy(shard, moved)
        with pytest.raises(
            C2CError, match=rf"{moved.name} holds caches of another sharer or precision than .*/a; every"
        ):
            Store(tmp_path / "a", sharer)
        moved.unlink()
    (shard,) = (tmp_path / "a").glob("shard-*")
    with safe_open(shard, framework="pt") as file:
        prompts = json.loads(file.metadata()["index"])["prompts"]
    save_file(load_file(shard), shard, metadata={"index": json.dumps(prompts)})  # as earlier versions wrote it
    Store(tmp_path / "a", sharer).read(PROMPTS)


def test_another_tokenizer_is_refused(sharer: LM, tmp_path: Path) -> None:
    Store(tmp_path, sharer, "bfloat16").fill(sharer, PROMPTS[:2])
    assert json.loads((tmp_path / "store.json").read_text())["tokenizer"] == sharer.tokenizer_fingerprint is not None
    other = replace(sharer, tokenizer=tiny_tokenizer("words"))
    assert other.fingerprint == sharer.fingerprint
    for precision in (None, "bfloat16"):
        with pytest.raises(C2CError, match=r"another tokenizer of .*; load the sharer with that one, or use another"):
            Store(tmp_path, other, precision)  # type: ignore[arg-type]
    Store(tmp_path, replace(sharer, tokenizer=None)).read(PROMPTS[:2])  # ids only: none to be wrong
    settings = json.loads((tmp_path / "store.json").read_text())
    del settings["tokenizer"]  # as in stores of earlier versions
    (tmp_path / "store.json").write_text(json.dumps(settings))
    Store(tmp_path, other).read(PROMPTS[:2])


def test_a_sharer_that_computes_in_another_type(sharer: LM, tmp_path: Path) -> None:
    Store(tmp_path, sharer, "bfloat16").fill(sharer, PROMPTS[:2])
    before = contents(tmp_path)
    half = lm_of("qwen3", dtype=torch.bfloat16)
    store = Store(tmp_path, half)  # which reads, and has nothing to add
    store.fill(half, PROMPTS[:2])
    with pytest.raises(C2CError, match=r"computed in float32, .* now computes in bfloat16; go on in float32 \(c2c pre"):
        store.fill(half, PROMPTS)
    assert contents(tmp_path) == before


def test_the_pace_is_estimated_where_most_tokens_are() -> None:
    few_long = [[0] * 4000, [0] * 4000, *([[0] * 100] * 40)]  # 8,000 tokens of 12,000
    assert list(map(len, _typical(few_long, 8192))) == [4000, 100]
    assert list(map(len, _typical([[0] * 9000, [0] * 10], 8192))) == [9000]  # longer than a batch: alone
    assert list(map(len, _typical([[0] * 10] * 6, 40))) == [10] * 4


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


def test_what_all_prompts_begin_with_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharer = lm_of("qwen3")
    start = list(range(20, 32))
    prompts = [[*start, *ids] for ids in PROMPTS]
    read: list[int] = []

    def forward(*arguments: Any, **named: Any) -> Any:
        read.append(named["input_ids"].numel())
        return original(*arguments, **named)

    original = sharer.decoder.forward
    monkeypatch.setattr(sharer.decoder, "forward", forward)
    store = Store(tmp_path / "store", sharer, "bfloat16")
    store.fill(sharer, prompts, batch_tokens=1)
    assert sum(read) == len(start) + sum(map(len, PROMPTS))
    for ids in prompts:
        kv, exact = store.read([ids]), prefill(sharer, *pad_left([ids], 0, "cpu"))
        torch.testing.assert_close(kv.keys.float(), exact.keys, rtol=0.01, atol=0.01)
        torch.testing.assert_close(kv.values.float(), exact.values, rtol=0.01, atol=0.01)
