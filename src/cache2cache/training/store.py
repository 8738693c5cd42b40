"""Sharer prefills on disk: the dearest part of training, done once.

A folder with `store.json` (which sharer, which precision) and shards `shard-*.safetensors`. A shard holds the caches of
some prompts behind one another as `kv` (tokens, 2, L, H, D), keys and values, and in its metadata the index: per
prompt the hash of its token ids, first token and length. With int8 there are also `low` and `scale` (prompts, 2, L, H,
D), float32, for every channel of every prompt: number = low + scale * (code + 128).

A shard appears whole or not at all, so a fill that was stopped in any way goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import C2CError
from ..kv import KV, pad_left, prefill
from ..models.load import LM
from ..packing import dequantize, quantize
from ..pair import identity

FORMAT_VERSION = 1
PROMPTS_PER_SHARD = 64
Precision = Literal["bfloat16", "int8"]


def key_of(ids: Sequence[int]) -> str:
    """The name of a prompt in a store: a hash of its token ids."""
    return hashlib.sha256(b"".join(int(i).to_bytes(4, "little") for i in ids)).hexdigest()[:32]


class Store:
    """The prefills of one sharer.

    Args:
        folder: of an existing store, or with `precision` perhaps of a new one, which the first `fill` puts there.
        sharer: the model. A store made with another one is refused.
        precision: "bfloat16" or "int8"; a store that holds the other one is refused.
    """

    def __init__(self, folder: str | Path, sharer: LM, precision: Precision | None = None) -> None:
        self.folder = Path(folder)
        try:
            self.config = json.loads((self.folder / "store.json").read_text())
        except (OSError, ValueError) as error:
            if precision is None or not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise C2CError(
                    f"{folder} is no prefill store ({type(error).__name__}); make one with c2c precompute"
                ) from error
            self.config = {
                "format_version": FORMAT_VERSION,
                "sharer": identity(sharer).model_dump(),
                "precision": precision,
                "computed_in": str(sharer.dtype).removeprefix("torch."),
            }
        if self.config.get("format_version") != FORMAT_VERSION:
            raise C2CError(
                f"{folder} has store format {self.config.get('format_version')}, this version reads "
                f"{FORMAT_VERSION}; make it again with c2c precompute"
            )
        made_for = self.config["sharer"]
        if made_for["fingerprint"] != sharer.fingerprint:
            raise C2CError(
                f"the store {folder} was made with {made_for['name']} (weights {made_for['fingerprint'][:12]}), the "
                f"sharer is {sharer.name} "
                f"(weights {sharer.fingerprint[:12]}); make a store for this sharer with c2c precompute"
            )
        if precision not in (None, self.config["precision"]):
            raise C2CError(
                f"the store {folder} holds {self.config['precision']}, {precision} was asked for; use another folder"
            )
        self.index: dict[str, tuple[Path, int, int, int]] = {}
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            self._read_index(path)
        self._open: dict[Path, Any] = {}

    def _read_index(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as shard:
                entries = json.loads(shard.metadata()["index"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise C2CError(
                f"{path} is damaged ({type(error).__name__}); remove it and run c2c precompute again"
            ) from error
        for number, (key, start, length) in enumerate(entries):
            self.index[key] = (path, number, start, length)

    def __contains__(self, ids: Sequence[int]) -> bool:
        return key_of(ids) in self.index

    def read(
        self, rows: Sequence[Sequence[int]], lengths: Sequence[int] | None = None, dtype: torch.dtype = torch.float32
    ) -> KV:
        """The caches of prompts, padded on the left: (L, B, H, T, D).

        Args:
            rows: token ids of each prompt.
            lengths: read only that many tokens of each, from its start; None: all.
            dtype: of the result.

        Raises:
            C2CError: a prompt that is not in the store.
        """
        shape = self.config["sharer"]
        lengths = [len(row) for row in rows] if lengths is None else lengths
        longest = max(lengths, default=0)
        both = torch.zeros(
            2, shape["num_layers"], len(rows), shape["num_kv_heads"], longest, shape["head_dim"], dtype=dtype
        )
        for row, (ids, length) in enumerate(zip(rows, lengths, strict=True)):
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
            # (tokens, 2, L, H, D) to (2, L, H, tokens, D)
            piece = shard.get_slice("kv")[start : start + length]
            if self.config["precision"] == "int8":
                low, scale = (shard.get_slice(n)[number : number + 1][0] for n in ("low", "scale"))
                piece = dequantize(piece, low, scale)
            both[:, :, row, :, longest - length :] = piece.permute(1, 2, 3, 0, 4)
        return KV(both[0], both[1])

    def _shard(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]

    # ---- filling ------------------------------------------------------------------------------------------------

    @property
    def bytes_per_token(self) -> int:
        shape = self.config["sharer"]
        return (
            2
            * shape["num_layers"]
            * shape["num_kv_heads"]
            * shape["head_dim"]
            * (2 if self.config["precision"] == "bfloat16" else 1)
        )

    def missing(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The prompts that have still to be computed, each once, longest first."""
        todo = {key_of(ids): list(ids) for ids in prompts if len(ids)}
        return sorted((ids for key, ids in todo.items() if key not in self.index), key=len, reverse=True)

    def estimate(self, prompts: Sequence[Sequence[int]]) -> int:
        """Bytes that filling in these prompts will take on disk."""
        todo = self.missing(prompts)
        extra = 8 * self.bytes_per_token * len(todo) if self.config["precision"] == "int8" else 0  # low and scale
        return sum(map(len, todo)) * self.bytes_per_token + extra

    def fill(
        self,
        sharer: LM,
        prompts: Sequence[Sequence[int]],
        *,
        batch_tokens: int = 512,
        max_bytes: int = 20 * 10**9,
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        """Compute and write the missing prompts.

        Args:
            sharer: the model the store was made for.
            prompts: token ids; those already there are skipped.
            batch_tokens: at most that many tokens go through the model at once.
            max_bytes: refuse to start when more than that would be written.
            progress: called with the number of tokens of each batch that was computed.
        """
        need = self.estimate(prompts)
        if need > max_bytes:
            raise C2CError(
                f"the store would need {need / 1e9:.1f} GB, the limit is {max_bytes / 1e9:.1f} GB; use fewer "
                "prompts, int8, or a higher limit"
            )
        free = shutil.disk_usage(next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())).free
        if need > free - 10**9:
            raise C2CError(
                f"the store needs {need / 1e9:.1f} GB and 1 GB of slack, {self.folder} has {free / 1e9:.1f} GB free; "
                "make room or use int8"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "store.json").exists():
            partial = self.folder / f".store.json.{os.getpid()}"
            partial.write_text(json.dumps(self.config, indent=2) + "\n")
            os.replace(partial, self.folder / "store.json")
        todo = self.missing(prompts)
        for stale in self.folder.glob(".shard-*"):  # left by a process that was killed
            if time.time() - stale.stat().st_mtime > 3600:
                stale.unlink(missing_ok=True)
        for begin in range(0, len(todo), PROMPTS_PER_SHARD):
            self._write_shard(sharer, todo[begin : begin + PROMPTS_PER_SHARD], batch_tokens, progress)

    def _write_shard(
        self, sharer: LM, prompts: list[list[int]], batch_tokens: int, progress: Callable[[int], None]
    ) -> None:
        pieces: list[Tensor] = []
        kept_as = torch.bfloat16 if self.config["precision"] == "bfloat16" else torch.float32
        begin = 0
        while begin < len(prompts):
            size = max(1, batch_tokens // len(prompts[begin]))  # the first is the longest
            batch = prompts[begin : begin + size]
            ids, mask = pad_left(batch, sharer.pad_token_id, sharer.device)
            kv = prefill(sharer, ids, mask)
            for row, tokens in enumerate(batch):
                both = torch.stack([kv.keys[:, row, :, -len(tokens) :], kv.values[:, row, :, -len(tokens) :]])
                pieces.append(both.permute(3, 0, 1, 2, 4).to("cpu", kept_as))
            progress(sum(map(len, batch)))
            begin += size
        entries, start = [], 0
        for tokens in prompts:
            entries.append((key_of(tokens), start, len(tokens)))
            start += len(tokens)
        if self.config["precision"] == "int8":
            coded = [quantize(piece) for piece in pieces]
            tensors = {
                "kv": torch.cat([c for c, _, _ in coded]),
                "low": torch.stack([x for _, x, _ in coded]),
                "scale": torch.stack([x for _, _, x in coded]),
            }
        else:
            tensors = {"kv": torch.cat(pieces)}
        path = self.folder / f"shard-{key_of([t for p in prompts for t in p])}.safetensors"
        partial = self.folder / f".{path.name}.{os.getpid()}"
        try:
            save_file(tensors, partial, metadata={"index": json.dumps(entries)})
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        self._read_index(path)
