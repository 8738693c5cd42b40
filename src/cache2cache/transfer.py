"""Caches that travel: a prefilled batch, fused or not, to and from bytes or a file.

    save(pair.prefill(messages), "prompt.safetensors", pair.receiver, numbers="int8")
    cache = load("prompt.safetensors", pair.receiver)    # another day, another process, another machine
    pair.generate(cache, max_new_tokens=64)

The file is safetensors: `ids` (all prompts, one behind the other), `kv` (L, 2, N, H, D) as in `packing`, with int8 also
`low` and `scale`. Its metadata says which weights, tokenizer, chat template and tokens the cache belongs to, and holds
a checksum over everything. Reading trusts none of it: sizes are checked before anything is taken from them.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as serialize
from torch import Tensor

from .errors import C2CError
from .kv import Prefilled, pad_left, positions_of
from .models.load import LM
from .models.owner import Hash, Owner
from .packing import Coded, Numbers, check_format, decode, encode, format_of, pack, unpack
from .pair import FusedCache

FORMAT_VERSION = 1
MAX_HEADER = 4 << 20  # bytes; a batch of some ten thousand prompts

_Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class _Header(BaseModel):
    """The metadata of a file, as one JSON string."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format_version: int  # asked before the rest, see _read_header
    kind: Literal["prefill", "fused"]
    model: Owner
    numbers: Numbers
    error: float = Field(ge=0, allow_inf_nan=False, description="see packing.relative_error")
    tokens: Hash
    lengths: list[Annotated[int, Field(gt=0, lt=1 << 40)]] = Field(min_length=1, description="tokens of each prompt")
    fused_positions: list[_Count] = []
    coverage: list[list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]] = []
    bytes_passed: _Count = 0

    def shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What the tensors must be."""
        layers, heads, dim = self.model.num_layers, self.model.num_kv_heads, self.model.head_dim
        total, rows = sum(self.lengths), len(self.lengths)
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "ids": (torch.int64, (total,)),
            "positions": (torch.int64, (total,)),
            "kv": (getattr(torch, self.numbers), (layers, 2, total - rows, heads, dim)),
        }
        if self.numbers == "int8":
            shapes |= dict.fromkeys(("low", "scale"), (torch.float32, (layers, 2, rows, heads, dim)))
        return shapes


def to_bytes(cache: Prefilled, lm: LM, numbers: str | None = None) -> bytes:
    """A cache as bytes.

    Args:
        cache: of all tokens but the last of each prompt, fused or not.
        lm: the model that it belongs to: the receiver of a fused one.
        numbers: float32, float16, bfloat16 or int8 (256 steps per channel and prompt; the error that it makes is
            measured and written into the file); None: the cache's own type.
    """
    kv = cache.kv
    batch, length = cache.input_ids.shape
    shape = (lm.num_layers, batch, lm.num_kv_heads, length - 1, lm.head_dim)
    if tuple(kv.keys.shape) != shape:
        raise C2CError(
            f"the cache is {tuple(kv.keys.shape)}; expected {shape}, which is {lm.name}'s for {batch} prompts of up to "
            f"{length} tokens; give the model that made it"
        )
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(cache.input_ids, cache.attention_mask, strict=True)]
    counts = [len(row) - 1 for row in rows]
    wanted = format_of(kv.keys.dtype) if numbers is None else check_format(numbers)
    coded = encode(pack(kv, counts), counts, wanted)
    header = _Header(
        format_version=FORMAT_VERSION,
        kind="fused" if isinstance(cache, FusedCache) else "prefill",
        model=Owner.of(lm),
        numbers=wanted,
        error=coded.error,
        tokens=tokens_hash(rows),
        lengths=[len(row) for row in rows],
    )
    if isinstance(cache, FusedCache):
        header.fused_positions = list(cache.fused_positions)
        header.coverage = [list(map(float, row)) for row in cache.coverage]
        header.bytes_passed = cache.bytes_passed
    text = header.model_dump_json()
    if len(text) > MAX_HEADER // 2:  # escaped once more in the file
        raise C2CError(f"{batch} prompts are too many for one file; write them in several")
    positions = positions_of(cache.attention_mask) if cache.position_ids is None else cache.position_ids
    tensors = {"ids": cache.input_ids, "positions": positions}
    tensors = {name: tensor[cache.attention_mask.bool()].cpu() for name, tensor in tensors.items()}
    tensors |= {n: t.cpu().contiguous() for n, t in zip(("kv", "low", "scale"), coded.tensors, strict=False)}
    return serialize(tensors, metadata={"cache2cache": text, "sha256": _checksum(text, tensors)})


def from_bytes(data: bytes, lm: LM, prompts: Sequence[Sequence[int]] | None = None) -> Prefilled:
    """The inverse of `to_bytes`, on the model's device and in its type: a `FusedCache` if that is what was written.

    Args:
        data: what `to_bytes` returned.
        lm: the model that is to go on from the cache.
        prompts: token ids that the cache must be of; None: any.

    Raises:
        C2CError: anything else than such bytes, whole and unchanged; another model, which says what differs.
    """
    size = _header_size(data[:8], len(data))
    header, checksum = _read_header(data[8 : 8 + size], len(data) - 8 - size, lm)
    try:
        tensors = parse(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _damaged(" ".join(str(error).split())[:200]) from error
    if {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} != header.shapes():
        raise _damaged("its tensors are not those that its metadata names")
    if _checksum(header.model_dump_json(), tensors) != checksum:
        raise _damaged("its checksum doesn't fit what it holds")
    ids = tensors["ids"].tolist()
    rows = [ids[start:end] for start, end in pairwise(accumulate(header.lengths, initial=0))]
    if prompts is not None and tokens_hash(prompts) != header.tokens:
        raise C2CError(
            f"the cache is of other tokens ({header.tokens[:12]} against {tokens_hash(prompts)[:12]}); prefill these "
            "prompts, or load the cache that was made from them"
        )
    if tokens_hash(rows) != header.tokens or min(ids) < 0 or max(ids) >= lm.vocab_size:
        raise _damaged("its token ids are not those that its metadata names")
    counts = [length - 1 for length in header.lengths]
    coded = Coded(tensors["kv"], tensors.get("low"), tensors.get("scale"), header.error)
    kv = unpack(decode(coded, counts), counts).to(lm.device, lm.dtype)
    input_ids, mask = pad_left(rows, lm.pad_token_id, lm.device)
    positions = positions_of(mask)
    positions[mask.bool()] = tensors["positions"].to(lm.device)
    places = None if torch.equal(positions, positions_of(mask)) else positions
    if header.kind == "prefill":
        return Prefilled(input_ids, mask, kv, places)
    coverage: list[Sequence[float]] = [tuple(row) for row in header.coverage]
    return FusedCache(input_ids, mask, kv, places, header.fused_positions, coverage, header.bytes_passed)


def save(cache: Prefilled, path: str | Path, lm: LM, numbers: str | None = None) -> None:
    """Write a cache to a file, which appears whole or not at all. Arguments as for `to_bytes`."""
    path = Path(path)
    data = to_bytes(cache, lm, numbers)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise C2CError(
            f"{path} could not be written ({error.strerror or error}; it takes {len(data) / 1e6:.1f} MB); make room or "
            "choose another place"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | Path, lm: LM, prompts: Sequence[Sequence[int]] | None = None) -> Prefilled:
    """Read what `save` wrote. Arguments and errors as for `from_bytes`; what the header rules out is not read."""
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            start = file.read(8)
            size = _header_size(start, length)
            raw = file.read(size)
            _read_header(raw, length - 8 - size, lm)
            data = start + raw + file.read(length - 8 - size)
        return from_bytes(data, lm, prompts)
    except OSError as error:
        raise C2CError(f"{path} can't be read ({error.strerror or error}); give a file written by save") from error
    except C2CError as error:
        raise C2CError(f"{path}: {error}") from error


def tokens_hash(rows: Sequence[Sequence[int]]) -> str:
    """SHA-256, in hex, of prompts as token ids."""
    return hashlib.sha256(json.dumps([list(map(int, row)) for row in rows]).encode()).hexdigest()


# ---- reading without trust -------------------------------------------------------------------------------------------


def _damaged(why: str) -> C2CError:
    return C2CError(f"no whole cache: {why}; write it again")


def _header_size(start: bytes, length: int) -> int:
    if len(start) < 8:
        raise _damaged(f"it has {length} bytes")
    size = int.from_bytes(start, "little")
    if size > MAX_HEADER:
        raise _damaged(f"its header claims {size} bytes, more than {MAX_HEADER}")
    if size > length - 8:
        raise _damaged(f"its header claims {size} bytes of {length}")
    return size


def _read_header(raw: bytes, body: int, lm: LM) -> tuple[_Header, str]:
    """The metadata and the checksum, after a look at whether the model fits and the sizes are possible."""
    try:
        entries = json.loads(raw)
        metadata = entries["__metadata__"]
        text, checksum = metadata["cache2cache"], metadata["sha256"]
        # A later version may say other things, so this is asked first.
        if (version := json.loads(text)["format_version"]) != FORMAT_VERSION:
            raise C2CError(f"the cache has format {str(version)[:20]}, this version reads {FORMAT_VERSION}")
        header = _Header.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(f"{'.'.join(map(str, first['loc'])) or 'metadata'}: {first['msg']}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(f"its header is not that of a cache ({type(error).__name__})") from error
    if found := header.model.differences(Owner.of(lm)):
        raise C2CError(
            f"the cache was made with {header.model.name}, which differs from {lm.name} in {', '.join(found)}; load it "
            "with the model that it was made with"
        )
    if max(header.lengths) > lm.context_length:
        raise C2CError(
            f"the cache is of {max(header.lengths)} tokens, the context of {lm.name} is {lm.context_length}; use a "
            "model with a longer one"
        )
    rows = len(header.lengths)
    fused = header.kind == "fused"
    if len(header.fused_positions) != rows * fused or len(header.coverage) != rows * fused:
        raise _damaged("its metadata is not of as many prompts as it names")
    expected = sum(_nbytes(dtype, shape) for dtype, shape in header.shapes().values())
    if body != expected:
        raise _damaged(f"it holds {body} bytes of numbers, its metadata asks for {expected}")
    return header, checksum


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    size = dtype.itemsize
    for n in shape:
        size *= n
    return size


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        if tensors[name].numel():
            digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
