"""The pair: a receiver, its sharers, and the fusers between them. Prompt in, fused cache out."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import decode
from .alignment.chat import render
from .alignment.tokens import span_map
from .config import FuserConfig, ModelIdentity, ModelSpec
from .decode import Chunk, Score
from .errors import C2CError
from .fuser import C2CFuser, checkpoint, make_fuser
from .kv import KV, Prefilled, check_fusable, pad_left, prefill, prefill_prompts
from .models.load import LM, load_lm
from .rotary import Rotary

Messages = Sequence[Mapping[str, str]]
ModelSource = str | Path | ModelSpec | PreTrainedModel | LM


@dataclass(frozen=True)
class PromptIds:
    """One prompt as token ids, one list per model, where the models' tokens differ. No tokenizer is needed.

    Attributes:
        receiver: (T,) ids.
        sharers: per sharer (T',) ids.
        maps: per sharer (T,), the sharer position that goes with each receiver position, -1 for none.
        coverage: per sharer, the share of the receiver's characters that the mapped sharer tokens cover.
    """

    receiver: Sequence[int]
    sharers: Sequence[Sequence[int]]
    maps: Sequence[Sequence[int]]
    coverage: Sequence[float] = ()


Prompt = str | Messages | PromptIds | Tensor | Sequence[int]


@dataclass(frozen=True)
class FusedCache(Prefilled):
    """A batch of prompts, prefilled and fused: `receiver.generate(**fused.inputs(), ...)` answers from it.

    Attributes:
        fused_positions: per row, how many positions of the prompt were fused.
        coverage: per row and sharer, see `PromptIds`.
        bytes_passed: bytes of sharer keys and values that the fusers read: what would cross a wire.
    """

    fused_positions: list[int] = field(default_factory=list)
    coverage: list[Sequence[float]] = field(default_factory=list)
    bytes_passed: int = 0


class C2C:
    """A receiver that answers from its own cache fused with those of its sharers (paper section 3).

    All models stay frozen. Nothing is kept between calls, so threads may share one pair.

    Attributes:
        receiver, sharers: the models.
        fusers: one per sharer.
        mode: with several sharers, `parallel` (every fuser reads the receiver's clean cache, the changes are summed) or
            `sequential` (each reads what the one before it left).
        chat_template_kwargs: for every chat template; by default thinking is off where a template knows of it.
    """

    def __init__(
        self,
        receiver: LM,
        sharers: Sequence[LM],
        fusers: Sequence[C2CFuser],
        *,
        mode: Literal["parallel", "sequential"] = "parallel",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if len(sharers) != len(fusers) or not sharers:
            raise C2CError(
                f"{len(sharers)} sharers and {len(fusers)} fusers were given; every sharer needs a fuser of its own"
            )
        if mode not in ("parallel", "sequential"):
            raise C2CError(f"unknown fusion mode {mode!r}; expected parallel or sequential")
        for lm in (receiver, *sharers):
            check_fusable(lm.text_config, lm.name)
        for sharer, fuser in zip(sharers, fusers, strict=True):
            _check_fit("receiver", fuser.config.receiver, receiver)
            _check_fit("sharer", fuser.config.sharer, sharer)
        self.receiver = receiver
        self.sharers = list(sharers)
        self.fusers = nn.ModuleList(fuser.to(receiver.device) for fuser in fusers)
        for sharer, fuser in zip(sharers, fusers, strict=True):
            if fuser.config.key_space == "unrotated":
                fuser.rotary = (Rotary.of(receiver), Rotary.of(sharer))
        self.mode = mode
        self.chat_template_kwargs = {"enable_thinking": False, **(chat_template_kwargs or {})}

    @classmethod
    def from_models(
        cls,
        receiver: ModelSource,
        sharers: ModelSource | Sequence[ModelSource],
        config: FuserConfig | Sequence[FuserConfig] | None = None,
        **kwargs: Any,
    ) -> C2C:
        """A new pair with untrained fusers. `config` is one for all sharers or one each; `kwargs` as for the class."""
        main = load_lm(receiver)
        others = [load_lm(source) for source in _as_list(sharers)]
        configs = (
            [config or FuserConfig()] * len(others)
            if config is None or isinstance(config, FuserConfig)
            else list(config)
        )
        if len(configs) != len(others):
            raise C2CError(f"{len(configs)} fuser configurations for {len(others)} sharers; give one, or one each")
        fusers = [
            make_fuser(c.model_copy(update={"receiver": identity(main), "sharer": identity(other)})).eval()
            for c, other in zip(configs, others, strict=True)
        ]
        return cls(main, others, fusers, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        fuser: str | Path | Sequence[str | Path] | None = None,
        *,
        receiver: ModelSource | None = None,
        sharers: ModelSource | Sequence[ModelSource] | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        **kwargs: Any,
    ) -> C2C:
        """A trained pair.

        Args:
            fuser: a folder, a hub id, or None for the fuser that comes with this library; a list for several sharers.
            receiver, sharers: instead of the models that the fuser was trained for: ids, folders, GGUF files,
                `ModelSpec`s or loaded models.
            revision: of the fuser on the hub.
            dtype, device: of models that are loaded here ("auto" and the first GPU, if there is one, by default).
            kwargs: as for the class.
        """
        sources = [fuser] if fuser is None or isinstance(fuser, (str, Path)) else list(fuser)
        fusers = [checkpoint.load(source, revision=revision) for source in sources]
        configs = [f.config for f in fusers]
        overrides = {k: v for k, v in (("dtype", dtype), ("device", device)) if v is not None}

        def load(given: ModelSource | None, trained_for: ModelIdentity | None) -> LM:
            assert trained_for is not None  # make_fuser has checked
            if given is None:
                given = ModelSpec(source=trained_for.name, revision=trained_for.revision)
            loaded = isinstance(given, (PreTrainedModel, LM))
            return load_lm(given) if loaded else load_lm(given, None, **overrides)

        others = [None] * len(fusers) if sharers is None else _as_list(sharers)
        if len(others) != len(fusers):
            raise C2CError(f"{len(others)} sharers for {len(fusers)} fusers; every sharer needs a fuser of its own")
        return cls(
            load(receiver, configs[0].receiver),
            [load(given, c.sharer) for given, c in zip(others, configs, strict=True)],
            fusers,
            **kwargs,
        )

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the fuser (with several sharers: the fusers, into folders 0, 1, … of `folder`)."""
        for index, fuser in enumerate(self.fusers):
            assert isinstance(fuser, C2CFuser)
            checkpoint.save(fuser, folder if len(self.fusers) == 1 else Path(folder) / str(index), dtype=dtype)

    # ---- prompt in, fused cache out -----------------------------------------------------------------------------

    def encode(self, prompt: Prompt, *, prefix: str = "") -> PromptIds:
        """What each model reads of one prompt, and which sharer token goes with each receiver token.

        Args:
            prompt: chat messages, plain text, token ids (T,) that all models read alike, or `PromptIds`.
            prefix: the start of the answer, put behind the prompt.
        """
        if isinstance(prompt, PromptIds) or not isinstance(prompt, (str, Sequence)) or _is_ids(prompt):
            if prefix:
                raise C2CError("prefix needs text or messages; append its token ids to the prompt instead")
            return prompt if isinstance(prompt, PromptIds) else self._same_ids(prompt)
        mine, *theirs = (
            render(lm.need_tokenizer(), prompt, prefix=prefix, chat_template_kwargs=self.chat_template_kwargs)  # type: ignore[arg-type]
            for lm in (self.receiver, *self.sharers)
        )
        maps = [span_map(mine, other) for other in theirs]
        return PromptIds(
            mine.ids, [other.ids for other in theirs], [m.index.tolist() for m in maps], [m.coverage for m in maps]
        )

    def _same_ids(self, ids: Any) -> PromptIds:
        row = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if not row or not all(isinstance(i, int) for i in row):
            raise C2CError(
                f"token ids must be one flat, non-empty list or tensor of integers, not {type(ids).__name__}"
            )
        alike = [row] * len(self.sharers)
        return PromptIds(row, alike, [range(len(row))] * len(self.sharers), [1.0] * len(self.sharers))

    def prefill(self, prompts: Prompt | Sequence[Prompt] | Tensor, *, prefix: str = "") -> FusedCache:
        """Prefill every model and fuse: the seam from which everything starts.

        Args:
            prompts: one prompt (see `encode`) or a list of them; a tensor (B, T) of ids is a batch without padding.
            prefix: the start of the answer.
        """
        return self.fuse([self.encode(prompt, prefix=prefix) for prompt in as_batch(prompts)])

    def fuse(
        self,
        batch: Sequence[PromptIds],
        *,
        clean: Prefilled | None = None,
        sharers: Sequence[tuple[KV, Sequence[int]] | None] | None = None,
    ) -> FusedCache:
        """As `prefill`, from encoded prompts.

        Args:
            batch: the prompts.
            clean: the receiver's own prefill of the batch, where it is known already; it stays as it is.
            sharers: per sharer, where it is known already (from a store, from another machine), its cache of the batch,
                (L, B, H, T', D) padded on the left, and how many tokens of each prompt it holds; None: computed here.
        """
        self._check(batch)
        # The first change to the receiver's cache needs a copy if anyone else reads the clean one.
        shared = clean is not None or (self.mode == "parallel" and len(self.fusers) > 1)
        clean = clean or prefill_prompts(self.receiver, [p.receiver for p in batch])
        kv, passed = clean.kv, 0
        positions = [0] * len(batch)
        lengths: Sequence[int]
        for j, (sharer, fuser) in enumerate(zip(self.sharers, self.fusers, strict=True)):
            assert isinstance(fuser, C2CFuser)
            depth = fuser.sharer_depth
            known = sharers[j] if sharers is not None else None
            lengths = sharer_lengths(batch, j)
            if depth == 0 or max(lengths) == 0:
                continue
            if known is not None:
                cache, lengths = known
            else:
                # Sharer tokens behind the last one that the map names are not read at all.
                ids, mask = pad_left(
                    [p.sharers[j][:n] for p, n in zip(batch, lengths, strict=True)], sharer.pad_token_id, sharer.device
                )
                cache = prefill(sharer, ids, mask, num_layers=depth)
            where, read = where_to_fuse(batch, j, clean.kv.length, cache.length, lengths)
            source = clean.kv if self.mode == "parallel" else kv
            with torch.no_grad():
                out = None if shared and kv is clean.kv else kv
                kv = fuser(source, cache.to(source.keys.device), where.to(source.keys.device), out)
            passed += read * fuser.sharer_reads * cache.keys[0, 0, :, 0].nbytes
            positions = [max(a, sum(i >= 0 for i in p.maps[j][:-1])) for a, p in zip(positions, batch, strict=True)]
        return FusedCache(clean.input_ids, clean.attention_mask, kv, positions, [p.coverage for p in batch], passed)

    def _check(self, batch: Sequence[PromptIds]) -> None:
        if not batch:
            raise C2CError("no prompts were given; expected at least one")
        for prompt in batch:
            if not len(prompt.receiver):
                raise C2CError("the prompt has no tokens; give some text, a message or token ids")
            if not len(prompt.sharers) == len(prompt.maps) == len(self.sharers):
                raise C2CError(
                    f"a prompt comes with ids for {len(prompt.sharers)} and maps for {len(prompt.maps)} sharers; the "
                    f"pair has {len(self.sharers)}"
                )
            decode.check_room(self.receiver, len(prompt.receiver), 0)
            for sharer, ids, index in zip(self.sharers, prompt.sharers, prompt.maps, strict=True):
                decode.check_room(sharer, len(ids), 0)
                if len(index) != len(prompt.receiver) or max(index) >= len(ids) or min(index) < -1:
                    raise C2CError(
                        f"a token map of length {len(index)} with entries from {min(index)} to {max(index)} doesn't "
                        f"fit {len(prompt.receiver)} "
                        f"receiver tokens and {len(ids)} sharer tokens; expected one entry per receiver token, -1 or "
                        "a sharer position"
                    )
            for lm, ids in zip((self.receiver, *self.sharers), (prompt.receiver, *prompt.sharers), strict=True):
                if min(ids) < 0 or max(ids) >= lm.vocab_size:
                    raise C2CError(
                        f"token id {max(ids) if max(ids) >= lm.vocab_size else min(ids)} is outside the vocabulary "
                        f"of {lm.name} ({lm.vocab_size} tokens)"
                    )

    # ---- answers ------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Sequence[Prompt] | Tensor | FusedCache, *, prefix: str = "", **kwargs: Any
    ) -> Any:
        """The receiver's stock `generate` on the fused cache; `kwargs` are its own.

        Returns:
            Token ids (B, T + new) with the prompt, padded on the left, or whatever the options make `generate` return.
        """
        return decode.generate(self.receiver, self._fused(prompts, prefix), **kwargs)

    def stream(self, prompt: Prompt | FusedCache, *, prefix: str = "", **kwargs: Any) -> Generator[Chunk, None, None]:
        """As `generate`, one prompt, token by token."""
        return decode.stream(self.receiver, self._fused(prompt, prefix), **kwargs)

    def chat(self, messages: Messages | Sequence[Messages], *, prefix: str = "", **kwargs: Any) -> str | list[str]:
        """Answer a chat, or each chat of a list, as text. `kwargs` go to `generate`."""
        batch = as_batch(messages)
        fused = self._fused(batch, prefix)
        sequences = decode.generate(self.receiver, fused, **kwargs)
        texts = self.receiver.need_tokenizer().batch_decode(
            sequences[:, fused.input_ids.shape[1] :], skip_special_tokens=True
        )
        return texts[0] if batch is not messages else texts

    def score(
        self, prompts: Prompt | Sequence[Prompt] | FusedCache, continuations: Sequence[Any], *, prefix: str = ""
    ) -> list[list[Score]] | list[Score]:
        """Log-likelihoods of continuations on the fused cache.

        Args:
            prompts: one prompt or several.
            continuations: per prompt a list of texts or of lists of token ids (for one prompt: that list itself).
            prefix: the start of the answer, before the continuation.

        Returns:
            Per prompt one `Score` per continuation (for one prompt: that list itself).
        """
        if isinstance(prompts, FusedCache):
            single = False
        else:
            batch = as_batch(prompts)
            single = batch is not prompts
        groups = [continuations] if single else continuations
        ids = [[self.receiver.continuation_ids(c) for c in group] for group in groups]
        scores = decode.score(self.receiver, self._fused(prompts, prefix), ids)
        return scores[0] if single else scores

    def _fused(self, prompts: Any, prefix: str) -> FusedCache:
        if isinstance(prompts, FusedCache):
            if prefix:
                raise C2CError("prefix was given with a fused cache; give it to prefill instead")
            return prompts
        return self.prefill(prompts, prefix=prefix)


def sharer_lengths(batch: Sequence[PromptIds], j: int) -> list[int]:
    """Per prompt, how many tokens of sharer j are read: up to the last that goes with a fused position."""
    return [max(p.maps[j][:-1], default=-1) + 1 for p in batch]


def where_to_fuse(
    batch: Sequence[PromptIds], j: int, receiver_length: int, sharer_length: int, lengths: Sequence[int]
) -> tuple[Tensor, int]:
    """The positions to fuse as (5, N): row, receiver position and sharer position in left-padded caches, then the same
    two positions without the padding.

    Args:
        batch, j: the prompts and which sharer.
        receiver_length: positions of the receiver's cache (all tokens but the last of the longest prompt).
        sharer_length: positions of the sharer's cache.
        lengths: per prompt, how many of its sharer tokens that cache holds.

    Returns:
        The positions, and how many different sharer positions they read.
    """
    where, read = [], 0
    for row, (prompt, n) in enumerate(zip(batch, lengths, strict=True)):
        index = torch.as_tensor(list(prompt.maps[j][:-1]), dtype=torch.long)
        t = (index >= 0).nonzero().flatten()
        s = index[t]
        read += len(s.unique())
        shift = receiver_length - len(index)
        where.append(torch.stack([torch.full_like(t, row), t + shift, s + sharer_length - n, t, s]))
    return torch.cat(where, dim=1), read


def identity(lm: LM) -> ModelIdentity:
    """How a fuser remembers a model."""
    return ModelIdentity(
        name=lm.name,
        revision=lm.revision,
        fingerprint=lm.fingerprint,
        num_layers=lm.num_layers,
        num_kv_heads=lm.num_kv_heads,
        head_dim=lm.head_dim,
    )


def _check_fit(role: str, trained_for: ModelIdentity | None, lm: LM) -> None:
    assert trained_for is not None  # make_fuser has checked
    asked = (trained_for.num_layers, trained_for.num_kv_heads, trained_for.head_dim)
    given = (lm.num_layers, lm.num_kv_heads, lm.head_dim)
    if asked != given:
        raise C2CError(
            f"the fuser is for {role} {trained_for.name} ({asked[0]} layers, {asked[1]} KV heads of {asked[2]}), but "
            f"{lm.name} has "
            f"{given[0]} layers, {given[1]} KV heads of {given[2]}; use the {role} it was trained for, or train a "
            "fuser for this pair"
        )
    if trained_for.fingerprint and trained_for.fingerprint != lm.fingerprint:
        warnings.warn(
            f"the fuser was trained for {role} {trained_for.name} with weights {trained_for.fingerprint[:12]}, but "
            f"{lm.name} has weights "
            f"{lm.fingerprint[:12]}; answers may be worse",
            stacklevel=4,
        )


def as_batch(prompts: Any) -> Sequence[Any]:
    """A list of prompts: the argument itself, or a new list around it when it is one prompt."""
    if isinstance(prompts, Tensor):
        return [prompts] if prompts.dim() == 1 else list(prompts)
    if isinstance(prompts, (str, PromptIds)) or not isinstance(prompts, Sequence):
        return [prompts]
    if prompts and isinstance(prompts[0], (Mapping, int)):
        return [prompts]
    return prompts


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], int)


def _as_list(sources: Any) -> list[Any]:
    return list(sources) if isinstance(sources, (list, tuple)) else [sources]
