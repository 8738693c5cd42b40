"""Keys and values without padding, in the number format they travel in.

Packed, a cache is one tensor (L, 2, N, H, D): keys and values of N positions, the rows of the batch one behind the
other. Padding positions hold numbers without meaning, so they neither travel nor spoil a scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .errors import C2CError
from .kv import KV

Numbers = Literal["float32", "float16", "bfloat16", "int8"]
FORMATS: tuple[Numbers, ...] = get_args(Numbers)


@dataclass(frozen=True)
class Coded:
    """A packed cache in a number format.

    Attributes:
        kv: (L, 2, N, H, D).
        low, scale: (L, 2, B, H, D) float32, for int8 only: number = low + scale * (code + 128).
        error: the relative error that the format makes, see `relative_error`.
    """

    kv: Tensor
    low: Tensor | None = None
    scale: Tensor | None = None
    error: float = 0.0

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.kv, self.low, self.scale) if tensor is not None]


def format_of(dtype: torch.dtype) -> Numbers:
    """The number format that holds this type as it is."""
    for name in FORMATS:
        if dtype == getattr(torch, name) and name != "int8":
            return name
    raise C2CError(f"caches of {dtype} can't travel; expected float32, float16 or bfloat16")


def check_format(numbers: str) -> Numbers:
    for name in FORMATS:
        if numbers == name:
            return name
    raise C2CError(f"unknown number format {numbers!r}; expected one of {', '.join(FORMATS)}")


def quantize(x: Tensor, dim: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8, and low and scale float32 without `dim`: 256 even steps between each channel's least and greatest.

    A channel is everything that differs only in `dim`.
    """
    low, high = x.amin(dim), x.amax(dim)
    scale = ((high - low) / 255).clamp(min=1e-12)
    codes = ((x - low.unsqueeze(dim)) / scale.unsqueeze(dim)).round().sub(128).clamp(-128, 127).to(torch.int8)
    return codes, low, scale


def dequantize(codes: Tensor, low: Tensor, scale: Tensor, dim: int = 0) -> Tensor:
    """The inverse of `quantize`, off by at most half a step of each channel."""
    out = codes.to(torch.float32, copy=True)  # and then in place: memory is what this waits for
    return out.add_(128).mul_(scale.unsqueeze(dim)).add_(low.unsqueeze(dim))


def pack(kv: KV, counts: Sequence[int]) -> Tensor:
    """The last counts[b] positions of each row b: (L, 2, N, H, D), N being their sum."""
    rows = [
        torch.stack([x[:, row, :, kv.length - n :] for x in (kv.keys, kv.values)], dim=1)
        for row, n in enumerate(counts)
    ]
    return torch.cat(rows, dim=3).transpose(2, 3).contiguous()


def unpack(packed: Tensor, counts: Sequence[int]) -> KV:
    """The inverse of `pack`: (L, B, H, T, D), padded on the left with zeros to the longest row."""
    layers, _, _, heads, dim = packed.shape
    length = max(counts, default=0)
    both = packed.new_zeros(2, layers, len(counts), heads, length, dim)
    for row, (n, part) in enumerate(zip(counts, _rows(packed, counts), strict=True)):
        both[:, :, row, :, length - n :] = part.permute(1, 0, 3, 2, 4)
    return KV(both[0], both[1])


def encode(packed: Tensor, counts: Sequence[int], numbers: Numbers) -> Coded:
    """A packed cache in the given format, with the error that it makes.

    Raises:
        C2CError: numbers that are not finite, or not in that format.
    """
    if numbers == "int8":
        coded = [
            quantize(part, dim=2)
            if part.shape[2]
            else (part.to(torch.int8), part.new_zeros(low_shape), part.new_zeros(low_shape))
            for part in _rows(packed.float(), counts)
            for low_shape in [(*part.shape[:2], *part.shape[3:])]
        ]
        out = Coded(
            torch.cat([codes for codes, _, _ in coded], dim=2),
            torch.stack([low for _, low, _ in coded], dim=2),
            torch.stack([scale for _, _, scale in coded], dim=2),
        )
    else:
        out = Coded(packed.to(getattr(torch, numbers)))
        if out.kv.dtype == packed.dtype and bool(packed.isfinite().all()):
            return out
    error = relative_error(_decode(out, counts), packed, counts)
    if not math.isfinite(error):
        raise C2CError(f"the cache holds numbers that {numbers} can't hold, or that are not finite; try float32")
    return Coded(out.kv, out.low, out.scale, error)


def decode(coded: Coded, counts: Sequence[int]) -> Tensor:
    """The packed cache: float32 from int8, else as it is.

    Raises:
        C2CError: numbers that are not finite.
    """
    out = _decode(coded, counts)
    if not bool(out.isfinite().all()):
        raise C2CError("the cache holds numbers that are not finite; make it again")
    return out


def _decode(coded: Coded, counts: Sequence[int]) -> Tensor:
    if coded.low is None or coded.scale is None:
        return coded.kv
    channels = zip(_rows(coded.kv, counts), coded.low.unbind(2), coded.scale.unbind(2), strict=True)
    return torch.cat([dequantize(codes, low, scale, dim=2) for codes, low, scale in channels], dim=2)


def relative_error(decoded: Tensor, exact: Tensor, counts: Sequence[int]) -> float:
    """How far a packed cache is off: |decoded - exact| / |exact - its channels' means|, of the worst layer and kind.

    Channels are taken apart by prompt. Without their means, which carry nothing from position to position, since those
    of keys are large and would make any error look small.
    """
    exact = exact.float()
    off = (decoded.float() - exact).square().sum((2, 3, 4))
    rows = [part for part in _rows(exact, counts) if part.shape[2]]
    spread = sum(((part - part.mean(2, keepdim=True)).square().sum((2, 3, 4)) for part in rows), torch.zeros(()))
    ratio = (off / spread.to(off.device).clamp(min=1e-30)).sqrt()
    return float(torch.where(off == 0, 0.0, ratio).max()) if off.numel() else 0.0


def _rows(packed: Tensor, counts: Sequence[int]) -> Iterator[Tensor]:
    """The positions of each row (L, 2, n, H, D), views."""
    return iter(packed.split(list(counts), dim=2))
