"""Damaged and hostile files, generated: fusers in both layouts, and caches that travel.

Whatever is in them, reading ends within seconds and within memory, runs nothing, and gives a usable result or one short
`C2CError`. To hunt with many fresh examples:

    C2C_FUZZ=3000 python -m pytest tests/test_fuzz.py --timeout 0
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
import signal
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as parse
from safetensors.torch import save as serialize
from torch import Tensor

from cache2cache import C2C, C2CError, FuserConfig, decode, load_lm, transfer
from cache2cache.fuser import VARIANTS, C2CFuser, checkpoint, published
from cache2cache.kv import Prefilled, prefill_prompts
from cache2cache.models import LM
from tiny import tiny_model

resource = pytest.importorskip("resource", reason="memory is bounded with the system's limits")

MANY = int(os.environ.get("C2C_FUZZ", "0"))
T = TypeVar("T")


def examples(usual: int) -> settings:
    return settings(
        max_examples=MANY or usual,
        derandomize=not MANY,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# ---- what may come of it ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def little_memory() -> Iterator[None]:
    """One GiB of address space beyond what is taken: more than any example needs, less than any claim asks for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    torch.ones(300, 300) @ torch.ones(300, 300)  # the threads have their stacks
    taken = 0
    if Path("/proc/self/statm").is_file():
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if taken:
        resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(read: Callable[[], T], seconds: float = 5) -> T | None:
    """What reading gives, or None for a `C2CError` that a person can read.

    Args:
        read: what reads.
        seconds: of computing; waiting may take twelve times as long, since other programs take their share.
    """

    def late(*_: object) -> None:
        raise AssertionError(f"still reading after {seconds} seconds of computing or {12 * seconds} of waiting")

    clocks = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, 12 * seconds))
    before = [signal.signal(number, late) for number, _, _ in clocks]
    for _, timer, limit in clocks:
        signal.setitimer(timer, limit)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            result, errors = read(), []
    except C2CError as error:
        result, errors = None, [str(error)]
    finally:
        for (number, timer, _), handler in zip(clocks, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
    for text in [*errors, *(str(warning.message) for warning in said)]:
        assert text.strip() and text.isprintable() and len(text) < 2000, ascii(text[:3000])
    return result


# ---- damage ----------------------------------------------------------------------------------------------------------

VALUES = [
    "null", "true", "false", "0", "1", "2", "-1", "3", "1.5", "-0.0", "1e-400", "1e400", "NaN", "Infinity", "-Infinity",
    "9999", "10000", "2147483648", "9223372036854775808", "9" * 30, "-" + "9" * 30, "9" * 4000, "9" * 5000,
    '""', '"x"', '"1"', '"../../x"', '"/etc/passwd"', r'"\u0000"', r'"\ud800"', r'"a\nb\u001b[2J"',
    f'"{"x" * 200_000}"',
    '"terminal"', '"k_nearest"', '"last_aligned"', '"longest"', '"ridge"', '"bottleneck"', '"c2c-c"', '"unrotated"',
    '"int8"', '"complex64"', "[]", "{}", "[[]]", "[0]", "[[0,0]]", "[[0,0],[0,0]]", "[[1,2],[3,1]]", "[[9999,9999]]",
    "[[9223372036854775808,0]]", "[[-1,0]]", '[["0","0"]]', '[[1,2],["a",3]]', '[{"a":1}]', '{"a":[1]}',
    '{"0":{"1":{}}}',
    "[" * 500 + "]" * 500, "[" * 100_000, '{"a":' * 500 + "1" + "}" * 500, f"[{'0,' * 50_000}0]",
    f'["{"x," * 50_000}"]',
]  # fmt: skip
KEYS = ["", "x", "0", "01", "-1", "../1", "a\nb", "k" * 100_000, "__metadata__", "variant", "\ud800"]


class Brief(str):
    """A text that a failing test doesn't print in full."""

    def __repr__(self) -> str:
        return f"Brief({self[:2000]!a}, {len(self)} characters)"


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


@st.composite
def edited_json(draw: Any, text: str) -> str:
    """A JSON text with one to three of its values, entries or keys changed to something that does not belong there."""
    document, values = [json.loads(text)], []
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([path for path in places(document) if path]))
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        value = f"<{len(values)}>"
        values.append(draw(st.sampled_from(VALUES)))
        how = draw(st.sampled_from(["value"] * 4 + ["drop", "key", "add"]))
        if how == "value" or len(path) == 1:
            parent[path[-1]] = value
        elif how == "drop":
            del parent[path[-1]]
        elif isinstance(parent, list):
            parent.insert(0, value)
        elif how == "key":
            parent[draw(st.sampled_from(KEYS))] = parent.pop(path[-1])
        else:
            parent[draw(st.sampled_from(KEYS))] = value
    out = json.dumps(document[0])
    for index, value in enumerate(values):
        out = out.replace(f'"<{index}>"', value)
    return Brief(out)


@st.composite
def damaged(draw: Any, whole: bytes) -> bytes:
    """Bytes cut short, with bits flipped, and with stretches overwritten, left out, repeated or put in."""
    out = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        # The start and the end, where the structure is, as often as all the rest.
        n = len(out)
        place = st.one_of(st.integers(0, n), st.integers(0, min(n, 300)), st.integers(max(0, n - 300), n))
        start = draw(place)
        end = min(n, start + draw(st.integers(1, 64)))
        how = draw(st.sampled_from(["flip", "flip", "flip", "cut", "write", "omit", "repeat", "insert"]))
        some = draw(st.sampled_from([b"\0", b"\xff", b"\x80", b"[", b"9"])) * (end - start)
        if how == "flip" and start < n:
            out[start] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del out[start:]
        elif how == "write":
            out[start:end] = some
        elif how == "omit":
            del out[start:end]
        elif how == "repeat":
            out[start:start] = out[start:end]
        elif how == "insert":
            out[start:start] = some * draw(st.sampled_from([1, 1, 1000]))
    return bytes(out)


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "nan": lambda x: torch.full_like(x, math.nan) if x.is_floating_point() else x,
    "inf": lambda x: torch.full_like(x, -math.inf) if x.is_floating_point() else x,
    "large": lambda x: torch.full_like(x, 3e38) if x.dtype == torch.float32 else x,
    "zero": torch.zeros_like,
    "negative": lambda x: torch.full_like(x, -5),
    "least": lambda x: torch.full_like(x, torch.iinfo(x.dtype).min) if not x.is_floating_point() else -x,
    "greatest": lambda x: torch.full_like(x, torch.iinfo(x.dtype).max) if not x.is_floating_point() else -x,
    "flat": lambda x: x.flatten(),
    "turned": lambda x: x.T if x.dim() == 2 else x.unsqueeze(0),
    "longer": lambda x: torch.cat([x.flatten(), x.flatten()]),
    "empty": lambda x: x.flatten()[:0],
    **{str(dtype): lambda x, dtype=dtype: x.to(dtype) for dtype in (
        torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64,
        torch.float8_e4m3fn, torch.uint16,
    )},
}  # fmt: skip


@st.composite
def other_tensors(draw: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Named tensors with some of them changed, missing, added or swapped."""
    out = dict(tensors)
    for _ in range(draw(st.integers(1, 3))):
        a, b = draw(st.sampled_from(sorted(tensors))), draw(st.sampled_from(sorted(tensors)))
        how = draw(st.sampled_from(["drop", "add", "swap", *TENSORS]))
        if how == "drop":
            out.pop(a, None)
        elif how == "add":
            out[draw(st.sampled_from([f"{a}.more", "x" * 100_000, "a\nb", ""]))] = tensors[b].clone()
        elif how == "swap" and a in out and b in out:
            out[a], out[b] = out[b].clone(), out[a].clone()
        elif a in out and how in TENSORS:
            out[a] = TENSORS[how](tensors[a]).clone()
    return out


def special(path: Path, kind: str) -> None:
    """Put something into a file's place that is no file, or not this one."""
    path.unlink()
    if kind == "loop":
        path.symlink_to(path)
    elif kind == "nowhere":
        path.symlink_to(path.with_name("nothing"))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "nothing":
        path.symlink_to("/dev/null")
    elif kind == "password":
        path.symlink_to("/etc/passwd")
    elif kind == "terabytes":
        with open(path, "wb") as file:
            file.truncate(1 << 42)


SPECIAL = ("loop", "nowhere", "pipe", "folder", "endless", "nothing", "password", "terabytes", "missing")


# ---- fusers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models() -> tuple[LM, LM]:
    return load_lm(tiny_model("llama")), load_lm(tiny_model("qwen2", 1))


@pytest.fixture(scope="module")
def folders(models: tuple[LM, LM], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good fusers: of ours, normalised and a closed form; and one as published."""
    root = tmp_path_factory.mktemp("fusers")
    small = {"hidden_dim": 4, "intermediate_dim": 3}
    configs: dict[str, dict[str, Any]] = {
        "ours": {"layer_map": [(1, 2)], "gate_init": 1.0, **small},
        "normalized": {"normalize": True, **small},
        "ridge": {"variant": "ridge"},
    }
    for name, config in configs.items():
        C2C.from_models(*models, FuserConfig(**config)).save_pretrained(root / name)
    config = FuserConfig(layer_map=[(1, 2)], hidden_dim=128, intermediate_dim=128)
    C2C.from_models(*models, config).save_pretrained(root / "wide")
    for name, wide in (("ours", "published"), ("wide", "published wide")):
        checkpoint.convert(root / name, root / wide, "published")
    return {path.name: path for path in root.iterdir()}


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def read_fuser(folder: Path, models: tuple[LM, LM], changes: Callable[[Path], None]) -> C2CFuser | None:
    """What loading a changed copy of a fuser gives. A fuser that loads is finite, and fits its models or is refused."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "fuser"
        shutil.copytree(folder, copy)
        changes(copy)
        fuser = outcome(lambda: checkpoint.load(copy))
        about = outcome(lambda: checkpoint.describe(copy))
        assert (fuser is None) == (about is None)
        assert os.listdir(place) == ["fuser"]
    if fuser is not None:
        assert all(bool(tensor.isfinite().all()) for tensor in fuser.state_dict().values())
        assert fuser.temperature > 0
        json.dumps(about)
        outcome(lambda: C2C(models[0], [models[1]], [fuser]).prefill(torch.arange(7, 12)))
    return fuser


KINDS = pytest.mark.parametrize("kind", ["ours", "normalized", "ridge", "published"])


@KINDS
def test_good_ones(kind: str, folders: dict[str, Path], models: tuple[LM, LM]) -> None:
    assert read_fuser(folders[kind], models, lambda copy: None) is not None


@KINDS
@examples(30)
@given(data=st.data())
def test_fuser_bytes(kind: str, folders: dict[str, Path], models: tuple[LM, LM], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(files_of(folders[kind])))
    new = data.draw(damaged((folders[kind] / name).read_bytes()))
    read_fuser(folders[kind], models, lambda copy: (copy / name).write_bytes(new) and None)


@KINDS
@examples(50)
@given(data=st.data())
def test_fuser_settings(kind: str, folders: dict[str, Path], models: tuple[LM, LM], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([file for file in files_of(folders[kind]) if file.endswith(".json")]))
    new = data.draw(edited_json((folders[kind] / name).read_text()))
    read_fuser(folders[kind], models, lambda copy: (copy / name).write_text(new) and None)


@pytest.mark.parametrize("kind", ["ours", "published"])
def test_long_texts(kind: str, folders: dict[str, Path], models: tuple[LM, LM]) -> None:
    """A text of many characters in the place of each setting: no error repeats it."""
    for name in (file for file in files_of(folders[kind]) if file.endswith(".json")):
        whole = (folders[kind] / name).read_text()
        for path in places(json.loads(whole)):
            if path and not set(path) & {"versions", "training"}:
                changed = json.loads(whole)
                parent = changed
                for key in path[:-1]:
                    parent = parent[key]
                parent[path[-1]] = "x" * 100_000
                new = json.dumps(changed)
                read_fuser(
                    folders[kind], models, lambda copy, name=name, new=new: (copy / name).write_text(new) and None
                )


@KINDS
@examples(25)
@given(data=st.data())
def test_fuser_tensors(kind: str, folders: dict[str, Path], models: tuple[LM, LM], data: st.DataObject) -> None:
    if kind == "published":
        name = "final/projector_0.pt"
        file = io.BytesIO()
        torch.save(data.draw(other_tensors(torch.load(folders[kind] / name, weights_only=True))), file)
        new = file.getvalue()
    else:
        name = "fuser.safetensors"
        new = serialize(data.draw(other_tensors(parse((folders[kind] / name).read_bytes()))))
    read_fuser(folders[kind], models, lambda copy: (copy / name).write_bytes(new) and None)


@pytest.mark.parametrize("kind", ["ours", "ridge"])
@examples(25)
@given(data=st.data())
def test_fuser_header(kind: str, folders: dict[str, Path], models: tuple[LM, LM], data: st.DataObject) -> None:
    whole = (folders[kind] / "fuser.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = data.draw(edited_json(whole[8 : 8 + size].decode())).encode()
    new = len(header).to_bytes(8, "little") + header + whole[8 + size :]
    read_fuser(folders[kind], models, lambda copy: (copy / "fuser.safetensors").write_bytes(new) and None)


@pytest.mark.parametrize("what", SPECIAL)
def test_no_files(what: str, folders: dict[str, Path], models: tuple[LM, LM]) -> None:
    for kind in ("ours", "published"):
        for name in files_of(folders[kind]):
            found = read_fuser(folders[kind], models, lambda copy, name=name: special(copy / name, what))
            recipe = kind == "published" and name == "config.json"  # may be absent
            assert found is None or recipe, (kind, name)


@examples(60)
@given(
    parts=st.lists(st.sampled_from(["..", ".", "", "ours", "final", "published", "~", "\0", "x" * 300, "é", "a\nb"]))
)
def test_subfolders(parts: list[str], folders: dict[str, Path]) -> None:
    root = folders["ours"].parent
    for subfolder in ("/".join(parts), "/" + "/".join(parts)):
        found = outcome(lambda subfolder=subfolder: checkpoint.resolve(root, None, subfolder))
        assert found is None or found.resolve() in (root / "ours", root / "published", root / "published" / "final")


# ---- pickles ---------------------------------------------------------------------------------------------------------


def op(code: bytes, *arguments: bytes) -> bytes:
    return b"".join((code, *arguments))


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return op(pickle.BINUNICODE, struct.pack("<I", len(raw)), raw)


GLOBALS = [
    "os system", "posix system", "builtins eval", "builtins exec", "builtins getattr", "subprocess Popen", "nt system",
    "torch.hub load", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch FloatStorage",
    "torch._tensor _rebuild_from_type_v2", "torch.jit.unsupported_tensor_ops execWrapper", "collections OrderedDict",
    "torch.serialization load", "torch load", "pathlib Path", "builtins __import__",
    "torch._utils _rebuild_sparse_tensor",
    "torch.nn.parameter Parameter", "torch device", "torch Size", "a\u2028b", "x" * 100_000,
]  # fmt: skip

FRAGMENTS = st.one_of(
    st.sampled_from(GLOBALS).map(lambda g: op(pickle.GLOBAL, g.replace(" ", "\n").encode(), b"\n")),
    st.sampled_from(["touch was-run", "key_in.bias", "storage", "cpu", "0", "\ud800", "x" * 100_000]).map(text),
    st.sampled_from([0, 1, 12, 2**31 - 1, -1, -(2**31)]).map(lambda n: op(pickle.BININT, struct.pack("<i", n))),
    st.sampled_from([2**62, 2**80, -(2**62)]).map(
        lambda n: op(pickle.LONG1, b"\x10", n.to_bytes(16, "little", signed=True))
    ),
    st.integers(0, 40).map(lambda n: op(pickle.BINPUT, bytes([n]))),
    st.integers(0, 40).map(lambda n: op(pickle.BINGET, bytes([n]))),
    st.sampled_from([
        pickle.MARK, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_TUPLE, pickle.EMPTY_DICT,
        pickle.EMPTY_LIST, pickle.EMPTY_SET, pickle.REDUCE, pickle.BUILD, pickle.BINPERSID, pickle.SETITEM,
        pickle.SETITEMS, pickle.APPEND, pickle.APPENDS, pickle.NONE, pickle.NEWTRUE, pickle.STOP, pickle.NEWOBJ,
        pickle.STACK_GLOBAL, pickle.POP, pickle.DUP, pickle.MEMOIZE, pickle.INST + b"os\nsystem\n", pickle.OBJ,
        pickle.BINFLOAT + bytes(8), pickle.EXT1 + b"\1", pickle.PERSID + b"x\n", pickle.FRAME + b"\xff" * 8,
    ]),
)  # fmt: skip


class Touch:
    """What runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch was-run",)


def doubled(times: int) -> bytes:
    """A key of nested tuples that is as many tuples deep and two to that power wide, in a few bytes each."""
    step = op(pickle.BINPUT, b"\xfe", pickle.BINGET, b"\xfe", pickle.TUPLE2)
    return op(
        pickle.PROTO, b"\2", pickle.EMPTY_DICT, pickle.EMPTY_TUPLE, step * times, pickle.NONE, pickle.SETITEM, b"."
    )


def nested(opener: bytes, times: int) -> bytes:
    return op(pickle.PROTO, b"\2", pickle.EMPTY_DICT, pickle.NONE, opener * times, pickle.NONE, pickle.SETITEM, b".")


def typename(times: int) -> bytes:
    """A storage whose type's name, which an error would print, is a doubled tuple."""
    inner = doubled(times).removeprefix(op(pickle.PROTO, b"\2", pickle.EMPTY_DICT))[: -len(pickle.NONE) - 2]
    return op(pickle.PROTO, b"\2", inner, pickle.TUPLE1, pickle.BINPERSID, b".")


PICKLES: dict[str, bytes] = {
    "doubled key": doubled(80),
    "doubled name": typename(80),
    "deep key": nested(pickle.TUPLE1, 900_000),
    "deep pair": nested(pickle.NONE + pickle.TUPLE2, 400_000),
    "marks": op(pickle.PROTO, b"\2", pickle.MARK * 900_000, b"."),
    "lists": op(pickle.PROTO, b"\2", pickle.EMPTY_LIST * 900_000, pickle.APPEND * 899_999, b"."),
    "dict": op(pickle.PROTO, b"\2", pickle.EMPTY_DICT, pickle.NONE, pickle.EMPTY_LIST, pickle.SETITEM, b"."),
    "unhashable": op(pickle.PROTO, b"\2", pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.NONE, pickle.SETITEM, b"."),
    "reduce": pickle.dumps(Touch(), protocol=2),
    "reduce 0": pickle.dumps(Touch(), protocol=0),
    "reduce 4": pickle.dumps(Touch(), protocol=4),
    "inside": pickle.dumps({"key_in.bias": Touch()}, protocol=2),
}


def with_pickle(path: Path, change: Callable[[bytes], bytes]) -> None:
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name, content in entries.items():
            new.writestr(name, change(content) if name.endswith("data.pkl") else content)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir()), "something in the file was run"


@pytest.mark.parametrize("name", PICKLES)
def test_pickles(name: str, folders: dict[str, Path], models: tuple[LM, LM], elsewhere: None) -> None:
    def changes(copy: Path) -> None:
        with_pickle(copy / "final" / "projector_0.pt", lambda script: PICKLES[name])

    assert read_fuser(folders["published"], models, changes) is None


@examples(60)
@given(program=st.lists(FRAGMENTS, min_size=1, max_size=25), place=st.integers(0, 2000), keep=st.booleans())
def test_pickle_programs(
    program: list[bytes], place: int, keep: bool, folders: dict[str, Path], models: tuple[LM, LM], elsewhere: None
) -> None:
    """Made-up pickles, and made-up pieces between the instructions of a good one."""

    def changed(script: bytes) -> bytes:
        if not keep:
            return op(pickle.PROTO, b"\2", *program, pickle.STOP)
        starts = [position for _, _, position in published.pickletools.genops(script)]
        start = starts[1 + place % (len(starts) - 1)]
        return script[:start] + b"".join(program) + script[start:]

    read_fuser(folders["published"], models, lambda copy: with_pickle(copy / "final" / "projector_0.pt", changed))


@examples(30)
@given(data=st.data())
def test_archives(data: st.DataObject, folders: dict[str, Path], models: tuple[LM, LM], elsewhere: None) -> None:
    """Entries of the archive renamed to lead elsewhere, twice there, missing, added, packed, and of other lengths."""
    strange = ["../x", "/x", "data.pkl", "archive/data.pkl", "projector_0/data.pkl", "a\nb", "x/" * 1000, "was-run"]

    def changes(copy: Path) -> None:
        path = copy / "final" / "projector_0.pt"
        with zipfile.ZipFile(path) as old:
            entries = [(name, old.read(name)) for name in old.namelist()]
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(entries) - 1))
            name, content = entries[at]
            how = data.draw(st.sampled_from(["rename", "drop", "add", "cut", "grow", "swap"]))
            if how == "drop" and len(entries) > 1:
                del entries[at]
            elif how == "swap":
                entries[at], entries[0] = (name, entries[0][1]), (entries[0][0], content)
            elif how in ("rename", "add"):
                entries[at : at + (how == "rename")] = [(data.draw(st.sampled_from(strange)), content)]
            else:
                entries[at] = (name, content[: len(content) // 2] if how == "cut" else content + bytes(100))
        packed = data.draw(st.sampled_from([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]))
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w", packed) as new:
            warnings.simplefilter("ignore")
            for name, content in entries:
                new.writestr(name, content)

    read_fuser(folders["published"], models, changes)


# ---- claims ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "claim",
    [
        {"hidden_dim": 1 << 20, "intermediate_dim": 1 << 20}, {"hidden_dim": 1 << 40}, {"hidden_dim": 1 << 62},
        {"intermediate_dim": 10**30}, {"num_layers": 10**9}, {"receiver": {"num_kv_heads": 1 << 62}},
        {"sharer": {"head_dim": 1 << 40}}, {"receiver": {"num_layers": 10**9}, "layer_map": "terminal"},
        {"receiver": {"num_layers": 10**9}, "sharer": {"num_layers": 10**9}, "layer_map": "k_nearest"},
        {"receiver": {"num_layers": 9999}, "sharer": {"num_layers": 9999}, "layer_map": "k_nearest"},
        {"receiver": {"num_layers": 10**9}, "layer_map": "last_aligned"}, {"layer_map": [[1 << 62, 1 << 62]]},
        {"layer_map": [[t, 0] for t in range(20_000)], "receiver": {"num_layers": 20_000}},
    ],
    ids=lambda claim: str(claim)[:80],
)  # fmt: skip
def test_claims(variant: str, claim: dict[str, Any], folders: dict[str, Path], models: tuple[LM, LM]) -> None:
    """Sizes beyond any machine, in the configuration: they cost nothing."""

    def changes(copy: Path) -> None:
        saved = json.loads((copy / "config.json").read_text())
        own = {"variant": variant} | ({"gating": False, "weighting": False} if variant == "ridge" else {})
        for key, value in {**own, **claim}.items():
            saved["fuser"][key] = {**saved["fuser"][key], **value} if isinstance(value, dict) else value
        (copy / "config.json").write_text(json.dumps(saved))

    assert read_fuser(folders["ours"], models, changes) is None


@pytest.mark.parametrize("mapping", ["k_nearest", "last_aligned"])
def test_claimed_depths_as_published(mapping: str, folders: dict[str, Path], models: tuple[LM, LM]) -> None:
    """Many layers that share one projector: fine where it is small, gigabytes where it is not."""
    count = 500

    def changes(copy: Path) -> None:
        layers = {str(t): [[t, 0]] for t in range(count)}
        (copy / "final" / published.NAME).write_text(json.dumps({"0": {"1": layers}}))
        recipe = json.loads((copy / "config.json").read_text())
        recipe["model"]["mapping"] = mapping
        del recipe["cache2cache"]
        (copy / "config.json").write_text(json.dumps(recipe))

    assert read_fuser(folders["published"], models, changes) is not None
    count = 10_000
    assert read_fuser(folders["published wide"], models, changes) is None


# ---- caches that travel ----------------------------------------------------------------------------------------------

ROWS = [[9, 10, 11, 12, 13], [20], [30 + i for i in range(9)]]


@pytest.fixture(scope="module")
def caches(models: tuple[LM, LM]) -> dict[str, bytes]:
    pair = C2C.from_models(*models, FuserConfig(hidden_dim=4, intermediate_dim=3, gate_init=1.0))
    return {
        "plain": transfer.to_bytes(prefill_prompts(models[0], ROWS), models[0]),
        "int8": transfer.to_bytes(prefill_prompts(models[0], ROWS), models[0], "int8"),
        "fused": transfer.to_bytes(pair.prefill(ROWS), models[0]),
    }


CACHES = pytest.mark.parametrize("kind", ["plain", "int8", "fused"])


def read_cache(data: bytes, lm: LM) -> Prefilled | None:
    """Bytes and file alike give a cache that the model can go on from, or a `C2CError`."""
    cache = outcome(lambda: transfer.from_bytes(data, lm))
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "cache"
        path.write_bytes(data)
        again = outcome(lambda: transfer.load(path, lm))
    assert (cache is None) == (again is None)
    if cache is not None:
        assert bool(cache.kv.keys.isfinite().all()) and bool(cache.kv.values.isfinite().all())
        outcome(lambda: decode.generate(lm, cache, max_new_tokens=2, do_sample=False))
    return cache


def sealed(text: str, tensors: dict[str, Tensor]) -> bytes:
    """A file with a checksum that is right: who writes it can compute one."""
    try:
        said = transfer._Header.model_validate_json(text).model_dump_json()
    except ValueError:
        said = text
    metadata = {"cache2cache": text, "sha256": transfer._checksum(said, tensors)}
    return serialize(tensors, metadata={k: v.encode("utf-8", "replace").decode() for k, v in metadata.items()})


def parts_of(data: bytes) -> tuple[str, dict[str, Tensor]]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size])["__metadata__"]["cache2cache"], parse(data)


@CACHES
def test_good_caches(kind: str, caches: dict[str, bytes], models: tuple[LM, LM]) -> None:
    assert read_cache(caches[kind], models[0]) is not None
    assert read_cache(sealed(*parts_of(caches[kind])), models[0]) is not None


@CACHES
@examples(40)
@given(data=st.data())
def test_cache_metadata(kind: str, caches: dict[str, bytes], models: tuple[LM, LM], data: st.DataObject) -> None:
    said, tensors = parts_of(caches[kind])
    read_cache(sealed(data.draw(edited_json(said)), tensors), models[0])


@CACHES
@examples(30)
@given(data=st.data())
def test_cache_header(kind: str, caches: dict[str, bytes], models: tuple[LM, LM], data: st.DataObject) -> None:
    whole = caches[kind]
    size = int.from_bytes(whole[:8], "little")
    header = data.draw(edited_json(whole[8 : 8 + size].decode())).encode()
    read_cache(len(header).to_bytes(8, "little") + header + whole[8 + size :], models[0])


@CACHES
@examples(30)
@given(data=st.data())
def test_cache_tensors(kind: str, caches: dict[str, bytes], models: tuple[LM, LM], data: st.DataObject) -> None:
    """Also with everything that the metadata says of them made to fit."""
    said, tensors = parts_of(caches[kind])
    new = data.draw(other_tensors(tensors))
    header = json.loads(said)
    if "ids" in new and new["ids"].dtype == torch.int64 and new["ids"].dim() == 1:
        rows, ids = [], new["ids"].tolist()
        for length in header["lengths"]:
            rows.append(ids[:length])
            ids = ids[length:]
        header["tokens"] = transfer.tokens_hash(rows)
    read_cache(sealed(json.dumps(header), new), models[0])


@CACHES
@examples(30)
@given(data=st.data())
def test_cache_bytes(kind: str, caches: dict[str, bytes], models: tuple[LM, LM], data: st.DataObject) -> None:
    """Nothing but the white space of the header may change unnoticed."""
    whole = caches[kind]
    new = data.draw(damaged(whole))
    cache = read_cache(new, models[0])
    if cache is not None:
        good = transfer.from_bytes(whole, models[0])
        assert torch.equal(cache.kv.keys, good.kv.keys) and torch.equal(cache.input_ids, good.input_ids)


def test_a_small_file_that_unpacks_to_much(models: tuple[LM, LM]) -> None:
    """One long prompt and many of one token, which padding makes as long: a thousandfold of the file."""
    lm = models[0]
    count, length = 200_000, 2000
    long = prefill_prompts(lm, [[7] * length])
    header, tensors = parts_of(transfer.to_bytes(long, lm))
    ids = [[7] * length] + [[7]] * count
    said = json.loads(header) | {"lengths": [length] + [1] * count, "tokens": transfer.tokens_hash(ids)}
    tensors |= {
        "ids": torch.full((length + count,), 7),
        "positions": torch.cat([torch.arange(length), torch.zeros(count).long()]),
    }
    assert read_cache(sealed(json.dumps(said, separators=(",", ":")), tensors), lm) is None


@pytest.mark.parametrize("what", SPECIAL)
def test_no_cache_files(what: str, caches: dict[str, bytes], models: tuple[LM, LM], tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.write_bytes(caches["plain"])
    special(path, what)
    assert outcome(lambda: transfer.load(path, models[0])) is None
