"""Reading and writing Hugging Face caches as stacked tensors of shape (L, B, H, T, D).

L layers, B rows of the batch, H key-value heads, T positions, D head size. Keys are as the attention layer stores
them: after the key norm and the rotary embedding. Rows are padded on the left.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate, count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from .errors import C2CError
from .models.load import LM

# The keyword by which models and `generate` take a cache, and the name under which they return it: transformers 5.24
# renamed `past_key_values` to `cache` and warns at every use of the old name. `generate` calls this method with it.
_KEYWORDS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _KEYWORDS else "past_key_values"


OnLayer = Callable[[int, "KV"], None]

_ROOM = 128  # positions that a growing layer gets beyond those it needs
_LONG = 768  # positions from which rows of unlike length are not read together on a CPU
# What a pass costs besides its positions, in positions. What all rows begin with is read in a pass of its own where it
# spares as many: on a GPU a pass takes its time however few tokens it has.
_WORTH, _WORTH_GPU = 64, 8192


class GrowingLayer(DynamicLayer):
    """A plain layer that begins with known keys and values (B, H, T, D), and appends in place, in memory with room.

    transformers' own is copied whole for every token. Keys and values that anything else puts in their place (beams
    that swap rows, cropping) are copied at the next token, and what was given is never written to.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._memory: dict[str, tuple[Tensor, Tensor]] = {}  # what of it is filled, and all of it

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() or not self.is_initialized:  # writing in place is nothing for autograd
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None and self.values is not None
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, known: Tensor, new: Tensor) -> Tensor:
        known = known.to(new.device)  # of a layer on another device (device_map), once
        filled, memory = self._memory.get(name, (None, known))
        start, end = known.shape[-2], known.shape[-2] + new.shape[-2]
        if filled is not known or end > memory.shape[-2]:
            memory = known.new_empty((*known.shape[:2], end + _ROOM, known.shape[-1]))
            memory[:, :, :start] = known
        memory[:, :, start:end] = new
        self._memory[name] = made, _ = memory[:, :, :end], memory
        return made


@dataclass(frozen=True)
class KV:
    """Keys and values of all layers, each (L, B, H, T, D)."""

    keys: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        if self.keys.dim() != 5 or self.keys.shape[:4] != self.values.shape[:4]:
            raise C2CError(
                f"keys {tuple(self.keys.shape)} and values {tuple(self.values.shape)} are no stacked cache; "
                "expected both as (layers, batch, heads, positions, head size)"
            )

    @property
    def batch_size(self) -> int:
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        """Positions T, padding included."""
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def rows(self, index: Tensor | slice) -> KV:
        """The given rows of the batch; with a slice no copy is made."""
        return KV(self.keys[:, index], self.values[:, index])

    def tail(self, row: int, length: int) -> KV:
        """The last `length` positions of one row, (L, 1, H, length, D), a view: a row without its padding."""
        start = self.length - length
        return KV(self.keys[:, row : row + 1, :, start:], self.values[:, row : row + 1, :, start:])

    def map(self, change: Callable[[Tensor], Tensor]) -> KV:
        """Both tensors changed."""
        return KV(change(self.keys), change(self.values))

    def to(self, *args: Any, **kwargs: Any) -> KV:
        """As `Tensor.to`, for both tensors."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def clone(self) -> KV:
        """As `Tensor.clone`, for both tensors."""
        return self.map(Tensor.clone)

    def to_cache(self) -> DynamicCache:
        """A `DynamicCache` whose layers are views of these tensors.

        All layers are plain ones: a sliding layer then keeps every position and the mask does the sliding, which is
        what lets a fused prompt be longer than the window. The first token appended copies them, so this object never
        changes; those behind it are written in place.
        """
        cache = DynamicCache()
        cache.layers.extend(map(GrowingLayer, self.keys, self.values))
        return cache

    def to_static_cache(self, length: int) -> StaticCache:
        """A `StaticCache` with room for `length` positions that begins with a copy of these.

        Every decoding step then has the same shapes, which is what a compiled step wants. As in `to_cache` all layers
        are plain ones, sliding layers too.
        """
        if length < self.length:
            raise C2CError(f"a static cache of {length} positions can't hold {self.length}; give it more")
        # Without layer types all layers are of full attention.
        config = PretrainedConfig(num_hidden_layers=len(self.keys))  # type: ignore[call-arg]
        cache = StaticCache(config, max_cache_len=length)
        for index, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(keys, values, index)
        return cache

    @classmethod
    def from_cache(cls, cache: Cache) -> KV:
        """Stack a cache that any model filled.

        Raises:
            C2CError: layers that don't hold one key and one value per position (linear attention, quantised,
                static and offloaded caches), a sliding layer that has already dropped positions, unequal shapes.
        """
        keys, values = [], []
        for index, layer in enumerate(cache.layers):
            plain = type(layer) in (DynamicLayer, GrowingLayer, DynamicSlidingWindowLayer)
            if not (plain and isinstance(layer, DynamicLayer) and layer.is_initialized):
                raise C2CError(
                    f"layer {index} of the cache is a {type(layer).__name__}; only filled DynamicCache layers of "
                    "full or "
                    "sliding attention hold one key and one value per position; prefill into a DynamicCache()"
                )
            assert layer.keys is not None and layer.values is not None
            if layer.keys.shape[-2] != layer.get_seq_length():
                raise C2CError(
                    f"layer {index} of the cache kept {layer.keys.shape[-2]} of {layer.get_seq_length()} positions "
                    "(its "
                    "sliding window dropped the rest); prefill into a DynamicCache() made without a config"
                )
            keys.append(layer.keys)
            values.append(layer.values)
        shapes = sorted({tuple(k.shape) for k in keys})
        if len(shapes) != 1:
            raise C2CError(f"the layers of the cache have unequal shapes {shapes}; expected one shape for all layers")
        return cls(torch.stack(keys), torch.stack(values))


class _AllRead(Exception):
    """The last layer has its keys and values: what is left of the pass only leads to logits, which nobody wants."""


class _Slot(DynamicLayer):
    """One layer of a `_StackedCache`: writes in place and returns views, so that nothing is copied or stacked later."""

    def __init__(self, owner: _StackedCache, index: int, filled: int) -> None:
        super().__init__()
        self.owner, self.index, self.filled = owner, index, filled

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.owner.tensors(key_states, value_states)
        end = self.filled + key_states.shape[-2]
        keys[self.index, :, :, self.filled : end] = key_states
        values[self.index, :, :, self.filled : end] = value_states
        self.filled = end
        if end == self.owner.length and self.owner.on_layer is not None:
            self.owner.on_layer(self.index, self.owner.layer(self.index))
        if self.owner.stops and self.index == len(self.owner.layers) - 1:
            raise _AllRead
        device = key_states.device  # of a layer elsewhere (device_map), which reads them there
        return keys[self.index, :, :, :end].to(device), values[self.index, :, :, :end].to(device)

    def get_seq_length(self) -> int:
        return self.filled


class _StackedCache(Cache):
    """A cache over one (L, B, H, T, D) tensor for keys and one for values, made at the first update.

    Or one that is full already, up to position `start`. With `stops` it ends each pass by `_AllRead`.
    """

    def __init__(
        self,
        num_layers: int,
        length: int,
        known: KV | None = None,
        start: int = 0,
        on_layer: OnLayer | None = None,
        stops: bool = False,
    ) -> None:
        super().__init__(layers=[_Slot(self, index, start) for index in range(num_layers)])
        self.length = length
        self.on_layer = on_layer
        self.stops = stops
        self.keys: Tensor | None = None if known is None else known.keys
        self.values: Tensor | None = None if known is None else known.values

    def tensors(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            for name, states in (("keys", key_states), ("values", value_states)):
                batch, heads, _, dim = states.shape
                setattr(self, name, states.new_empty((len(self.layers), batch, heads, self.length, dim)))
            assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def layer(self, index: int) -> KV:
        """One layer as a cache of its own, (1, B, H, T, D), a view."""
        assert self.keys is not None and self.values is not None
        return KV(self.keys[index : index + 1], self.values[index : index + 1])


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) padded on the left and their attention mask (B, T), both int64."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    return ids.to(device), mask.to(device)


def positions_of(attention_mask: Tensor) -> Tensor:
    """Position ids (B, T) under left padding: 0 for padding and for the first real token."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


@dataclass(frozen=True)
class Read:
    """What a model has read of one prompt: the tokens, and their clean (unfused) cache (L, 1, H, T, D), unpadded.

    `positions` are their position ids where they don't simply count up.
    """

    ids: Sequence[int]
    kv: KV
    positions: Sequence[int] | None = None

    def shared(self, ids: Sequence[int], positions: Sequence[int] | None = None) -> int:
        """How many tokens at the start of `ids` this is the cache of, at the same position ids."""
        known = min(len(self.ids), self.kv.length)
        mine = zip(self.ids[:known], self.positions or count(), strict=False)
        theirs = zip(ids, positions or count(), strict=False)
        pairs = zip(mine, theirs, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(known, len(ids)))


def common_start(rows: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all rows begin with."""
    first, last = min(map(list, rows)), max(map(list, rows))  # as in a dictionary, where the others lie between
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def read_start(lm: LM, rows: Sequence[Sequence[int]], worth: int = 1, **options: Any) -> Read | None:
    """What all rows begin with, the system message mostly, read once; None where that saves fewer than `worth` tokens.

    As `past` of each row it goes into their prefill. `options` are for its own: num_layers, chunk_tokens.
    """
    start = common_start(rows)
    if len(start) * (len(rows) - 1) < worth:
        return None
    return Read(start, prefill(lm, *pad_left([start], lm.pad_token_id, lm.device), **options))


@dataclass(frozen=True)
class ToRead:
    """What one sharer has to read of a batch.

    Attributes:
        members: which prompts.
        lengths: per prompt of the batch, how many tokens.
        rows, positions, past: per member.
        depth: the lowest that many layers.
    """

    members: Sequence[int]
    lengths: Sequence[int]
    rows: Sequence[Sequence[int]]
    positions: Sequence[Sequence[int] | None]
    depth: int
    past: Sequence[Read | None]


def positions_from(rows: Sequence[Sequence[int] | None], attention_mask: Tensor) -> Tensor | None:
    """Position ids (B, T) of rows that say their own (at least as many as the mask has ones); None: no row does."""
    if all(row is None for row in rows):
        return None
    positions = positions_of(attention_mask)
    for b, (row, n) in enumerate(zip(rows, attention_mask.sum(-1).tolist(), strict=True)):
        if row is not None and n:
            positions[b, -n:] = torch.as_tensor(list(row[:n]), device=positions.device)
    return positions


@torch.no_grad()
def prefill(
    lm: LM,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    num_layers: int | None = None,
    past: Sequence[Read | None] | None = None,
    positions: Tensor | None = None,
    chunk_tokens: int = 8192,
    on_layer: OnLayer | None = None,
) -> KV:
    """Read a prompt through the backbone (no LM head) and return its cache.

    Args:
        lm: the model.
        input_ids, attention_mask: (B, T), padded on the left.
        num_layers: compute only the lowest that many layers (a fuser may not need the upper ones).
        past: per row, what this model has read before; tokens that a row begins with like that are copied, not
            computed. Where nothing was, what all rows begin with is read once, if that is worth a pass of its own;
            with () never.
        chunk_tokens: at most that many tokens (B times positions) go through the model at once, so that activations
            stay bounded whatever the prompt's length.
        positions: (B, T) position ids; None: they count up.
        on_layer: called with each layer's index and its cache (1, B, H, T, D) as soon as that is whole, in order.

    Returns:
        The cache (num_layers, B, H, T, D). Padding positions hold numbers without meaning.
    """
    batch, length = input_ids.shape
    if length > lm.context_length:
        raise C2CError(
            f"the prompt has {length} tokens for {lm.name}, whose context is {lm.context_length}; shorten the prompt"
        )
    layers = num_layers or lm.num_layers
    if length == 0:  # a prompt of one token, which is left to be read on top of the cache
        empty = torch.empty(layers, batch, lm.num_kv_heads, 0, lm.head_dim, dtype=lm.dtype, device=lm.device)
        return _hand_over(KV(empty, empty), on_layer)
    decoder = lm.decoder if layers == lm.num_layers else lowest_layers(lm.decoder, layers)
    lengths, shared = attention_mask.sum(1).tolist(), [0] * batch
    worth = _WORTH if lm.device.type == "cpu" else _WORTH_GPU
    unread = past is None or (len(past) > 0 and not any(past))
    if unread and positions is None and (batch - 1) * length >= worth:
        rows = [row[length - n :] for row, n in zip(input_ids.tolist(), lengths, strict=True)]
        past = [read_start(lm, rows, worth, num_layers=layers, chunk_tokens=chunk_tokens)] * batch
    positions = positions_of(attention_mask) if positions is None else positions
    if past is not None and any(past):
        shared = _shared(past, input_ids, lengths, positions, layers)
    padded, hooked = not bool(attention_mask.all()), _hooked(decoder)
    if padded and lm.device.type == "cpu" and on_layer is None and not hooked:
        groups = like_lengths([n - same for n, same in zip(lengths, shared, strict=True)])
        if len(groups) > 1:
            return _in_groups(groups, lm, input_ids, attention_mask, positions, past, layers, chunk_tokens)
    known, start = None, 0
    if past is not None and any(shared):
        start = min(length - n + same for n, same in zip(lengths, shared, strict=True))
        known = _filled(past, lengths, length, start, layers) if start else None
    if known is not None and start == length:
        return _hand_over(known, on_layer)
    cache = _StackedCache(layers, length, known, start, on_layer, stops=not hooked)
    step = max(1, chunk_tokens // batch)
    for begin in range(start, length, step):
        end = min(begin + step, length)
        with suppress(_AllRead):
            decoder(
                input_ids=input_ids[:, begin:end],
                # Without padding the mask is left out: attention then takes its causal path.
                attention_mask=attention_mask[:, :end] if padded else None,
                position_ids=positions[:, begin:end],
                use_cache=True,
                **{CACHE: cache},
            )
    assert cache.keys is not None and cache.values is not None
    return KV(cache.keys, cache.values)


def like_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Rows of like length together, so that all passes have the fewest positions, padding and `_WORTH` a pass counted.

    Rows from `_LONG` on are only with those of the same length: with padding attention takes a mask, and computes what
    that hides too, half of all, and most of a long prompt.
    """
    rows: dict[int, list[int]] = {}
    for row, n in enumerate(lengths):
        rows.setdefault(n, []).append(row)
    steps = sorted(rows, reverse=True)
    before = [0, *accumulate(len(rows[n]) for n in steps)]
    best = [(0, 0)]  # for the longest 0, 1, 2 … lengths: the positions, and where the last pass begins
    for end in range(1, len(steps) + 1):
        firsts = [j for j in range(end) if j == end - 1 or steps[j] < _LONG]
        best.append(min((best[j][0] + _WORTH + (before[end] - before[j]) * steps[j], j) for j in firsts))
    groups, end = [], len(steps)
    while end:
        first = best[end][1]
        groups.append([row for n in steps[first:end] for row in rows[n]])
        end = first
    return groups[::-1]


def _in_groups(
    groups: Sequence[Sequence[int]],
    lm: LM,
    input_ids: Tensor,
    attention_mask: Tensor,
    positions: Tensor,
    past: Sequence[Read | None] | None,
    layers: int,
    chunk_tokens: int,
) -> KV:
    """As `prefill`, each group of rows with no more padding than it needs itself."""
    batch, length = input_ids.shape
    made: KV | None = None
    for group in groups:
        rows = torch.tensor(group)
        first = length - int(attention_mask[rows].sum(1).max())
        known = [past[row] for row in group] if past else []
        part = prefill(
            lm, input_ids[rows, first:], attention_mask[rows, first:], num_layers=layers,
            past=known if any(known) else (),  # or it would look anew for what they begin with
            positions=positions[rows, first:], chunk_tokens=chunk_tokens,
        )  # fmt: skip
        if made is None:
            made = part.map(lambda t: t.new_zeros((layers, batch, t.shape[2], length, t.shape[4])))
        made.keys[:, rows, :, first:] = part.keys
        made.values[:, rows, :, first:] = part.values
    assert made is not None
    return made


def _hooked(decoder: nn.Module) -> bool:
    """Whether something waits for the end of the pass that the last layer would cut short: FSDP and offloading give
    weights back there."""
    layers = decoder.layers
    assert isinstance(layers, nn.ModuleList)
    return any(module._forward_hooks or hasattr(module, "_hf_hook") for module in (decoder, *layers[-1].modules()))


def _hand_over(kv: KV, on_layer: OnLayer | None) -> KV:
    """The cache, after telling of every layer of it."""
    for index in range(len(kv.keys) if on_layer is not None else 0):
        assert on_layer is not None
        on_layer(index, KV(kv.keys[index : index + 1], kv.values[index : index + 1]))
    return kv


def _shared(
    past: Sequence[Read | None], input_ids: Tensor, lengths: Sequence[int], positions: Tensor, layers: int
) -> list[int]:
    """How many tokens of each row are known already."""
    rows = zip(past, input_ids.tolist(), positions.tolist(), lengths, strict=True)
    return [
        read.shared(ids[len(ids) - n :], places[len(ids) - n :])
        if read is not None and len(read.kv.keys) >= layers
        else 0
        for read, ids, places, n in rows
    ]


def _filled(past: Sequence[Read | None], lengths: Sequence[int], length: int, start: int, layers: int) -> KV:
    """A cache for the batch that is filled up to a position, up to which all rows are known."""
    pads = [length - n for n in lengths]
    some = next(read.kv for read in past if read is not None)

    def filled(kind: str) -> Tensor:
        template: Tensor = getattr(some, kind)
        out = template.new_empty((layers, len(pads), template.shape[2], length, template.shape[4]))
        for row, (read, pad) in enumerate(zip(past, pads, strict=True)):
            out[:, row, :, : min(pad, start)] = 0  # padding is masked, but numbers that are none would come through
            if read is not None and pad < start:
                out[:, row, :, pad:start] = getattr(read.kv, kind)[:layers, 0, :, : start - pad]
        return out

    return KV(filled("keys"), filled("values"))


def lowest_layers(decoder: nn.Module, count: int) -> nn.Module:
    """The decoder with its lowest `count` layers, sharing all weights; the given decoder stays as it is."""
    shallow = copy.copy(decoder)
    for bound in ("forward", "_hf_hook"):  # of accelerate, to the decoder with all layers
        shallow.__dict__.pop(bound, None)
    shallow._modules = dict(decoder._modules)
    shallow.layers = nn.ModuleList(list(decoder.layers)[:count])  # type: ignore[arg-type]
    shallow.norm = nn.Identity()  # its output is never read
    return shallow


@dataclass(frozen=True)
class Prefilled:
    """A batch of prompts of which all tokens but the last are in the cache.

    Attributes:
        input_ids, attention_mask: (B, T), padded on the left.
        kv: the cache of the first T - 1 positions.
        position_ids: (B, T) where they don't simply count up.
        behind: per row, whether the answer goes on in a text: the start of an answer, or a prompt that is no chat;
            empty: all begin one.
    """

    input_ids: Tensor
    attention_mask: Tensor
    kv: KV
    position_ids: Tensor | None = None
    behind: Sequence[bool] = field(default=(), kw_only=True)

    def inputs(self, copies: int = 1, static_length: int | None = None) -> dict[str, Any]:
        """Keyword arguments for the model's `generate`, with a cache of their own each time.

        Args:
            copies: of each prompt's cache; `generate` multiplies the ids for beams or several returned sequences by
                itself, but not a cache that it is given.
            static_length: positions, prompt and answer, of a static cache; None: one that grows.
        """
        kv = self.kv
        if copies > 1:
            kv = kv.rows(torch.arange(kv.batch_size, device=kv.keys.device).repeat_interleave(copies))
        cache = kv.to_cache() if static_length is None else kv.to_static_cache(static_length)
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, CACHE: cache}
        return inputs if self.position_ids is None else {**inputs, "position_ids": self.position_ids}

    def grown(self, sequences: Tensor, cache: Cache, rows: Tensor) -> Prefilled:
        """What `generate` made of these prompts as prompts to go on with: the given rows of it.

        Args:
            sequences: (B, T + new), what it returned.
            cache: of all of that but the last token.
            rows: (n,) int64.
        """
        new = sequences.shape[1] - self.input_ids.shape[1]
        mask, places = self.attention_mask[rows], None
        mask = torch.cat([mask, mask.new_ones(len(rows), new)], dim=1)
        if self.position_ids is not None:
            known = self.position_ids[rows]
            places = torch.cat([known, known[:, -1:] + torch.arange(1, new + 1, device=known.device)], dim=1)
        return Prefilled(sequences[rows], mask, KV.from_cache(cache).rows(rows), places)


def prefilled(lm: LM, rows: Sequence[Sequence[int]], kv: KV) -> Prefilled:
    """Prompts whose cache is known, padded on the left: that of all their tokens, or of all but the last."""
    ids, mask = pad_left(rows, lm.pad_token_id, lm.device)
    before = ids.shape[1] - 1
    return Prefilled(ids, mask, KV(kv.keys[:, :, :, :before], kv.values[:, :, :, :before]).to(lm.device, lm.dtype))


def prefill_prompts(
    lm: LM,
    rows: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int] | None] | None = None,
    *,
    past: Sequence[Read | None] | None = None,
    chunk_tokens: int = 8192,
) -> Prefilled:
    """Prefill prompts given as token ids; the last token of each is left to `generate` or `score`."""
    ids, mask = pad_left(rows, lm.pad_token_id, lm.device)
    places = positions_from(positions, mask) if positions else None
    places_read = None if places is None else places[:, :-1]
    kv = prefill(lm, ids[:, :-1], mask[:, :-1], positions=places_read, past=past, chunk_tokens=chunk_tokens)
    return Prefilled(ids, mask, kv, places)
