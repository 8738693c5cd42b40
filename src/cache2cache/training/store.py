"""Sharer prefills on disk: the dearest part of training, done once.

A folder with `store.json` (which sharer, which precision) and shards `shard-*.safetensors`. A shard holds the caches of
some prompts behind one another as `kv` (tokens, 2, L, H, D), keys and values, and in its metadata the sharer and the
index: per prompt the hash of its token ids, first token and length. With int8 there are also `low` and `scale`
(prompts, 2, L, H, D), float32, for every channel of every prompt: number = low + scale * (code + 128).

A shard appears whole or not at all, so a fill that was stopped in any way goes on where it was. Several processes may
fill one store: which prompts share a shard depends on the prompts alone, and whoever computes a shard holds a lock of
the system's (one byte of `store.json`, on network file systems too). The system gives it back when its holder ends in
whatever way, so nothing can be left locked and nothing has to time out; whoever comes next looks for the shard first.
Where locks do not reach, work may be done twice, but never wrongly.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import C2CError
from ..files import save_tensors
from ..kv import KV, pad_left, prefill, read_start
from ..models.load import LM
from ..packing import dequantize, quantize
from ..pair import identity

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT_VERSION = 1
PROMPTS_PER_SHARD = 64  # at most,
TOKENS_PER_SHARD = 16384  # or fewer long ones: a shard is in memory while it is made
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
AHEAD = 2
PRECISIONS = ("bfloat16", "int8")
T = TypeVar("T")


class Asked(NamedTuple):
    """The arguments of `Store.read`."""

    rows: Sequence[Sequence[int]]
    lengths: Sequence[int] | None = None
    dtype: torch.dtype | None = None
    layers: tuple[int, int] | None = None


def key_of(ids: Sequence[int]) -> str:
    """The name of a prompt in a store: a hash of its token ids."""
    return hashlib.sha256(np.asarray(ids, dtype="<u4").tobytes()).hexdigest()[:32]


class Store:
    """The prefills of one sharer.

    Args:
        folder: of an existing store, or with `precision` perhaps of a new one, which the first `fill` puts there.
        sharer: the model. A store made with another one is refused.
        precision: "bfloat16" or "int8"; a store that holds the other one is refused.
    """

    def __init__(self, folder: str | Path, sharer: LM, precision: str | None = None) -> None:
        if precision not in (None, *PRECISIONS):
            raise C2CError(f"unknown precision {precision!r}; expected {' or '.join(PRECISIONS)}")
        self.folder = Path(folder)
        self.config = self._settings(sharer, precision)
        self.index: dict[str, tuple[Path, int, int, int]] = {}
        self._seen: set[Path] = set()
        self._open: dict[Path, Any] = {}
        self._coming: tuple[Asked, Future[KV]] | None = None
        self._look()

    def _settings(self, sharer: LM, precision: str | None) -> dict[str, Any]:
        """What `store.json` says, or will say of a new store; refused where it is not of this sharer and precision."""
        if precision is not None and not os.path.lexists(self.folder / "store.json"):
            return {
                "format_version": FORMAT_VERSION,
                "sharer": identity(sharer).model_dump(),
                "precision": precision,
                "computed_in": _name(sharer.dtype),
                "tokenizer": sharer.tokenizer_fingerprint,
            }
        config = read_settings(self.folder)
        made_for = config["sharer"]
        if made_for["fingerprint"] != sharer.fingerprint:
            raise C2CError(
                f"the store {self.folder} was made with {made_for['name']} (weights {made_for['fingerprint'][:12]}), "
                f"the sharer is {sharer.name} (weights {sharer.fingerprint[:12]}); make a store for this sharer, in a "
                "folder of its own, with c2c precompute"
            )
        # Prompts are found by their token ids: with another tokenizer hardly any would be.
        before, now = config.get("tokenizer"), sharer.tokenizer_fingerprint
        if before and now and before != now:
            raise C2CError(
                f"the store {self.folder} was made with another tokenizer of {made_for['name']} ({before[:12]}, now "
                f"{now[:12]}), so its prompts would not be found; load the sharer with that one, or use another folder"
            )
        if precision not in (None, config["precision"]):
            raise C2CError(
                f"the store {self.folder} holds {config['precision']}, {precision} was asked for; use another folder"
            )
        return config

    def _look(self) -> None:
        """Add the shards that are new in the folder."""
        for path in sorted(set(self.folder.glob("shard-*.safetensors")) - self._seen):
            self._read_index(path)

    def _read_index(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as shard:
                kv, about = shard.get_slice("kv"), json.loads(shard.metadata()["index"])
                if isinstance(about, list):  # of earlier versions
                    about = {"prompts": about}
                entries = about["prompts"]
                written = (
                    about.get("sharer", self.config["sharer"]["fingerprint"]),
                    kv.get_shape()[1:],
                    kv.get_dtype(),
                )
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise C2CError(
                f"{path} is damaged ({type(error).__name__}); remove it and run c2c precompute again"
            ) from error
        precise = {"bfloat16": "BF16", "int8": "I8"}[self.config["precision"]]
        if written != (self.config["sharer"]["fingerprint"], list(self._width), precise):
            raise C2CError(
                f"{path} holds caches of another sharer or precision than {self.folder}; every sharer has a store of "
                "its own: move the file back into its own folder"
            )
        for number, (key, start, length) in enumerate(entries):
            self.index[key] = (path, number, start, length)
        self._seen.add(path)

    def __contains__(self, ids: Sequence[int]) -> bool:
        return key_of(ids) in self.index

    def read(
        self,
        rows: Sequence[Sequence[int]],
        lengths: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        layers: tuple[int, int] | None = None,
    ) -> KV:
        """The caches of prompts, padded on the left: (L, B, H, T, D).

        Args:
            rows: token ids of each prompt.
            lengths: read only that many tokens of each, from its start; None: all.
            dtype: of the result; None: bfloat16 as it is kept, float32 from int8.
            layers: read only those from the first to before the second, the others hold anything; None: all.

        Raises:
            C2CError: a prompt that is not in the store.
        """
        asked = Asked(rows, lengths, dtype, layers)
        if self._coming and self._coming[0] == asked:
            return self._coming[1].result()
        return self._read(asked, self._empty(asked))

    def _empty(self, asked: Asked) -> Tensor:
        """(2, L, B, H, T, D), where a read goes."""
        lengths = map(len, asked.rows) if asked.lengths is None else asked.lengths
        _, num_layers, heads, dim = self._width
        dtype = torch.float32 if self.config["precision"] == "int8" else torch.bfloat16
        size = (2, num_layers, len(asked.rows), heads, max(lengths, default=0), dim)
        return torch.empty(size, dtype=asked.dtype or dtype)

    def _read(self, asked: Asked, both: Tensor) -> KV:
        rows, lengths, _, layers = asked
        int8 = self.config["precision"] == "int8"
        lengths = [len(row) for row in rows] if lengths is None else lengths
        longest = both.shape[4]
        low_layer, end_layer = layers or (0, both.shape[1])
        for row, (ids, length) in enumerate(zip(rows, lengths, strict=True)):
            wanted = both[:, low_layer:end_layer, row]  # (2, L', H, T, D)
            wanted[..., : longest - length, :] = 0
            if not length:
                continue
            try:
                path, number, start, _ = self.index[key_of(ids)]
            except KeyError:
                raise C2CError(
                    f"a prompt of {len(ids)} tokens is not in the store {self.folder}; run c2c precompute with the "
                    "same recipe"
                ) from None
            shard = self._shard(path)
            piece = shard.get_slice("kv")[start : start + length][:, :, low_layer:end_layer]  # (tokens, 2, L', H, D)
            if int8:
                low, scale = (
                    shard.get_slice(n)[number : number + 1][0, :, low_layer:end_layer] for n in ("low", "scale")
                )
                piece = dequantize(piece, low, scale)
            wanted[..., longest - length :, :] = piece.permute(1, 2, 3, 0, 4)
        return KV(both[0], both[1])

    def ahead(self, items: Iterable[T], ask: Callable[[T], Asked]) -> Iterator[T]:
        """The items, while a thread already reads what the next ones will ask for.

        `read`, called with what `ask` gives for the item at hand, then returns what was read, or raises what reading
        raised. At most AHEAD items are read before their turn, so memory is that many caches and the one at hand.
        """
        waiting: deque[tuple[T, Asked, Future[KV]]] = deque()
        pool = ThreadPoolExecutor(1, "read-ahead")
        # Reading needs one core. With a team of its own that thread would leave OpenMP more threads than cores, on
        # which all of them sleep at each barrier instead of waiting a moment for it.
        threads = torch.get_num_threads()
        pool.submit(_take_one_thread).result()
        torch.set_num_threads(threads)  # what threads that are started later would have

        def turns() -> Iterator[T]:
            item, asked, future = waiting.popleft()
            self._coming = asked, future
            del future  # so that the cache is gone when the next item is at hand
            yield item
            self._coming = None

        try:
            for item in items:
                asked = ask(item)
                # Allocated here: memory that another thread allocates is not kept for the next read (see heap.py).
                waiting.append((item, asked, pool.submit(self._read, asked, self._empty(asked))))
                if len(waiting) > AHEAD:
                    yield from turns()
            while waiting:
                yield from turns()
        finally:
            self._coming = None
            pool.shutdown(cancel_futures=True)

    def _shard(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]

    # ---- filling ------------------------------------------------------------------------------------------------

    @property
    def _width(self) -> tuple[int, int, int, int]:
        """(2, L, H, D) of a token."""
        shape = self.config["sharer"]
        return 2, shape["num_layers"], shape["num_kv_heads"], shape["head_dim"]

    @property
    def bytes_per_token(self) -> int:
        return math.prod(self._width) * (2 if self.config["precision"] == "bfloat16" else 1)

    def missing(self, prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """The prompts that have still to be computed, each once, longest first."""
        todo = {key_of(ids): ids for ids in prompts if len(ids)}
        return sorted((ids for key, ids in todo.items() if key not in self.index), key=len, reverse=True)

    def estimate(self, prompts: Sequence[Sequence[int]]) -> int:
        """Bytes that filling in these prompts will take on disk."""
        todo = self.missing(prompts)
        extra = 8 * self.bytes_per_token * len(todo) if self.config["precision"] == "int8" else 0  # low and scale
        return sum(map(len, todo)) * self.bytes_per_token + extra

    @property
    def _place(self) -> Path:
        """The store's folder, or the first above it that exists."""
        return next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())

    @property
    def disk(self) -> int:
        """The number of the device that the store is or will be on."""
        return self._place.stat().st_dev

    def free(self) -> int:
        """Bytes free on the disk of the store, which need not exist yet."""
        return shutil.disk_usage(self._place).free

    def fill(
        self,
        sharer: LM,
        prompts: Sequence[Sequence[int]],
        *,
        batch_tokens: int = 512,
        max_bytes: int = 20 * 10**9,
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        """Compute and write the missing prompts, all of which are there in the end.

        Other processes may do the same at the same time: each shard is computed by one of them, and the last ones wait
        for what others still compute, or take it over where these end without it.

        Args:
            sharer: the model the store was made for.
            prompts: token ids; those already there are skipped.
            batch_tokens: at most that many tokens go through the model at once.
            max_bytes: refuse to start when more than that would be written.
            progress: called with the number of tokens of each batch that was computed, here or elsewhere.

        Raises:
            C2CError: too little room, before or while writing; a sharer that computes in another type than before.
        """
        check_room([(self, prompts)], max_bytes)
        with self._room():
            self._begin(sharer)
            order = [group for group in self._groups(prompts) if self.missing(group)]
            if not order:
                return
            if self.config["computed_in"] != (here := _name(sharer.dtype)):
                before = self.config["computed_in"]
                raise C2CError(
                    f"the store {self.folder} was computed in {before}, {sharer.name} now computes in {here}; go on in "
                    f"{before} (c2c precompute --dtype, c2c evaluate --sharer-dtype), or use another folder"
                )
            with (self.folder / "store.json").open("rb+") as lock:
                for wait in (False, True):
                    order = [g for g in order if not self._fill_group(lock, wait, sharer, g, batch_tokens, progress)]

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise C2CError(
                f"no room is left to write the store {self.folder} ({error.strerror}); its {len(self.index)} prompts "
                "are kept: make room and run c2c precompute again, it goes on from there"
            ) from error

    def _begin(self, sharer: LM) -> None:
        """The folder and its `store.json`, which the first of several processes writes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "store.json"
        if not path.exists():
            partial = self.folder / f".store.json.{secrets.token_hex(4)}"
            try:
                partial.write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
                try:
                    os.link(partial, path)  # unlike a rename it leaves alone what another one has put there
                except FileExistsError:
                    pass
                except OSError:  # a file system without links
                    os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        self.config = self._settings(sharer, self.config["precision"])  # another process may have been first
        for stale in (p for kind in (".shard-*.safetensors.*", ".store.json.*") for p in self.folder.glob(kind)):
            with suppress(FileNotFoundError):  # left by a process that was killed, or another's, done with by now
                if time.time() - stale.stat().st_mtime > 3600:
                    stale.unlink()

    def _groups(self, prompts: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
        """The prompts that share a shard, longest first; the same in every process and after every stop."""
        unique = {key_of(ids): ids for ids in prompts if len(ids)}
        order = [ids for _, ids in sorted(unique.items(), key=lambda item: (-len(item[1]), item[0]))]
        groups: list[list[Sequence[int]]] = []
        tokens = 0
        for ids in order:
            if not groups or len(groups[-1]) == PROMPTS_PER_SHARD or tokens + len(ids) > TOKENS_PER_SHARD:
                groups.append([])
                tokens = 0
            groups[-1].append(ids)
            tokens += len(ids)
        return groups

    def _fill_group(
        self,
        lock: IO[bytes],
        wait: bool,
        sharer: LM,
        group: list[Sequence[int]],
        batch_tokens: int,
        progress: Callable[[int], None],
    ) -> bool:
        """Compute what is missing of a group. False: another process is at it."""
        before = sum(map(len, self.missing(group)))
        with _locked(lock, key_of([i for ids in group for i in ids]), wait) as got:
            if not got:
                return False
            self._look()
            todo = self.missing(group)
            if elsewhere := before - sum(map(len, todo)):
                progress(elsewhere)
            if todo:
                self._write_shard(sharer, todo, batch_tokens, progress)
        return True

    def _write_shard(
        self, sharer: LM, prompts: list[Sequence[int]], batch_tokens: int, progress: Callable[[int], None]
    ) -> None:
        width, int8 = self._width, self.config["precision"] == "int8"
        tensors = {"kv": torch.empty(sum(map(len, prompts)), *width, dtype=torch.int8 if int8 else torch.bfloat16)}
        if int8:
            tensors |= {name: torch.empty(len(prompts), *width) for name in ("low", "scale")}
        read = read_start(sharer, prompts)
        entries, start, begin = [], 0, 0
        while begin < len(prompts):
            size = max(1, batch_tokens // len(prompts[begin]))  # the first is the longest
            batch = prompts[begin : begin + size]
            ids, mask = pad_left(batch, sharer.pad_token_id, sharer.device)
            kv = prefill(sharer, ids, mask, past=[read] * len(batch))
            for row, tokens in enumerate(batch):
                both = torch.stack([kv.keys[:, row, :, -len(tokens) :], kv.values[:, row, :, -len(tokens) :]])
                piece = both.permute(3, 0, 1, 2, 4)
                place = slice(start, start + len(tokens))
                if int8:
                    codes = quantize(piece.to("cpu", torch.float32))
                    tensors["kv"][place], tensors["low"][begin + row], tensors["scale"][begin + row] = codes
                else:
                    tensors["kv"][place] = piece
                entries.append((key_of(tokens), start, len(tokens)))
                start += len(tokens)
            progress(sum(map(len, batch)))
            begin += size
        path = self.folder / f"shard-{key_of([t for p in prompts for t in p])}.safetensors"
        partial = self.folder / f".{path.name}.{secrets.token_hex(4)}"
        try:
            # One value: safetensors writes several in any order, and equal shards are to be equal files.
            about = {"sharer": self.config["sharer"]["fingerprint"], "prompts": entries}
            save_tensors(tensors, partial, {"index": json.dumps(about)})
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        self._read_index(path)


def read_settings(folder: Path) -> dict[str, Any]:
    """What the `store.json` of a store says.

    Raises:
        C2CError: a folder that is no store, or one of another version.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise C2CError(
            f"{folder} is no prefill store ({type(error).__name__}); make one with c2c precompute"
        ) from error
    if config.get("format_version") != FORMAT_VERSION:
        raise C2CError(
            f"{folder} has store format {config.get('format_version')}, this version reads {FORMAT_VERSION}; make it "
            "again with c2c precompute"
        )
    return config


def check_room(fills: Sequence[tuple[Store, Sequence[Sequence[int]]]], max_bytes: int) -> None:
    """Refuse to fill in prompts, of one store or several, where that would take more than `max_bytes` together, or
    more than a disk has."""
    needs = [(store, store.estimate(prompts)) for store, prompts in fills]
    halved = any(size for store, size in needs if store.config["precision"] != "int8")  # as int8
    what = "the store" if len(fills) == 1 else f"the {len(fills)} stores"
    if (need := sum(size for _, size in needs)) > max_bytes:
        raise C2CError(
            f"{what} would need {need / 1e9:.1f} GB, the limit is {max_bytes / 1e9:.1f} GB; use fewer "
            f"prompts{', int8,' if halved else ''} or a higher limit (--max-gb)"
        )
    for disk in {store.disk for store, _ in needs}:
        there = [(store, size) for store, size in needs if store.disk == disk]
        need, free = sum(size for _, size in there), there[0][0].free()
        if need and need > free - 10**9:
            raise C2CError(
                f"{', '.join(str(store.folder) for store, _ in there)} need {need / 1e9:.1f} GB and 1 GB of slack, "
                f"{free / 1e9:.1f} GB are free there; make room{' or use int8' if halved else ''}"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _take_one_thread() -> None:
    """Let torch use one thread for what this thread computes."""
    torch.get_num_threads()  # a thread's first look takes the number last set anywhere, which shall not come later
    torch.set_num_threads(1)


@contextmanager
def _locked(file: IO[bytes], key: str, wait: bool) -> Iterator[bool]:
    """Hold the lock that goes with a key; yields False, without waiting, where another process holds it.

    It is a lock on one byte far behind the file's end, which needs no byte to be there.
    """
    place = int(key[:15], 16)
    got = True
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            got = False
        else:
            warnings.warn(
                f"{file.name} can't be locked ({error.strerror}); fill this store by one process at a time, several "
                "would compute the same",
                stacklevel=2,
            )
    try:
        yield got
    finally:
        if got and fcntl is not None:
            with suppress(OSError):
                fcntl.lockf(file, fcntl.LOCK_UN, 1, place)
