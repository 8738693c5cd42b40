"""The pair: a receiver, its sharers, and the fusers between them. Prompt in, fused cache out."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import decode, response
from .alignment.chat import NO_THINKING, Rendered, render
from .alignment.positions import Positions, content_tokens, fusable
from .alignment.published import Aligned, Strategy, align
from .alignment.tokens import span_map
from .config import FuserConfig, ModelIdentity, ModelSpec, is_address
from .decode import Chunk, Score
from .errors import C2CError
from .fuser import C2CFuser, Fusers, checkpoint, make_fuser
from .kv import KV, Prefilled, Read, ToRead, pad_left, positions_from, prefill, prefill_prompts
from .models.load import LM, load_lm
from .remote import Incoming, RemoteSharer, Transfer
from .rotary import Rotary

Mode = Literal["parallel", "sequential"]
Messages = Sequence[Mapping[str, str]]
ModelSource = str | Path | ModelSpec | PreTrainedModel | LM


@dataclass(frozen=True, slots=True)
class PromptIds:
    """One prompt as token ids, one list per model, where the models' tokens differ. No tokenizer is needed.

    Attributes:
        receiver: (T,) ids.
        sharers: per sharer (T',) ids.
        maps: per sharer (T,), the sharer position that goes with each receiver position, -1 for none.
        coverage: per sharer, the share of the receiver's characters that the mapped sharer tokens cover.
        content: (T,), which receiver tokens belong to the content of a message; empty where that isn't known.
        positions: (T,) position ids of the receiver's tokens where they don't simply count up (published token maps).
        sharer_positions: the same per sharer; empty or None: they count up.
        text: the prompt and the start of the answer that this was encoded from; None where ids were given.
    """

    receiver: Sequence[int]
    sharers: Sequence[Sequence[int]]
    maps: Sequence[Sequence[int]]
    coverage: Sequence[float] = ()
    content: Sequence[bool] = ()
    positions: Sequence[int] | None = None
    sharer_positions: Sequence[Sequence[int] | None] = ()
    text: tuple[str | Messages, str] | None = None

    def positions_of(self, j: int) -> Sequence[int] | None:
        """(T',) position ids of sharer j's tokens; None: they count up."""
        return self.sharer_positions[j] if self.sharer_positions else None


Prompt = str | Messages | PromptIds | Tensor | Sequence[int]


@dataclass(frozen=True)
class Turn:
    """What a later turn of a chat need not compute again: one prompt's clean caches and what became of them.

    Attributes:
        prompt: with -1 in its maps wherever nothing was fused.
        receiver, fused: the receiver's cache of all tokens but the last, before and after.
        sharers: per sharer, as far as it was read; None where it wasn't.
        parallel: whether the sharers' changes were summed.
    """

    prompt: PromptIds
    receiver: Read
    fused: KV
    sharers: list[Read | None]
    parallel: bool


@dataclass(frozen=True)
class FusedCache(Prefilled):
    """A batch of prompts, prefilled and fused: `receiver.generate(**fused.inputs(), ...)` answers from it.

    Attributes:
        fused_positions: per row, how many positions of the prompt were fused.
        coverage: per row and sharer, see `PromptIds`.
        bytes_passed: bytes of sharer keys and values that the fusers read: what would cross a wire.
        confidence: per row, how sure the receiver alone is of its next token; empty where `skip` wasn't given.
        skipped: per row, whether that was enough to answer without the sharers.
        turns: per row, what a later turn can start from; empty unless it was asked for (`keep`).
        transfers: what it took to get the caches of sharers that are served elsewhere, one per sharer that was asked.
    """

    fused_positions: list[int] = field(default_factory=list)
    coverage: list[Sequence[float]] = field(default_factory=list)
    bytes_passed: int = 0
    turns: list[Turn] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)


class C2C:
    """A receiver that answers from its own cache fused with those of its sharers (paper section 3).

    All models stay frozen. Nothing is kept between calls, so threads may share one pair.

    Attributes:
        receiver, sharers: the models.
        fusers: one per sharer.
        mode: with several sharers, `parallel` (every fuser reads the receiver's clean cache, the changes are summed) or
            `sequential` (each reads what the one before it left).
        chat_template_kwargs: for every chat template; by default thinking is off where a template knows of it. `today`
            is the date for templates that write the current one, such as "2024-07-26", which training and evaluation
            take so that they read the same on another day.
    """

    def __init__(
        self,
        receiver: LM,
        sharers: Sequence[LM],
        fusers: Sequence[C2CFuser],
        *,
        mode: Mode = "parallel",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if len(sharers) != len(fusers) or not sharers:
            raise C2CError(
                f"{len(sharers)} sharers and {len(fusers)} fusers were given; every sharer needs a fuser of its own"
            )
        if isinstance(receiver, RemoteSharer):
            raise C2CError(f"the receiver can't be at {receiver.url}; it answers, so it has to be loaded here")
        for sharer, fuser in zip(sharers, fusers, strict=True):
            check_fit(fuser, receiver, sharer)
        self.receiver = receiver
        self.sharers = list(sharers)
        self.fusers = Fusers(fuser.to(receiver.device).eval() for fuser in fusers)
        for sharer, fuser in zip(sharers, fusers, strict=True):
            if fuser.config.key_space == "unrotated":
                if isinstance(sharer, RemoteSharer):
                    raise C2CError(
                        f"the fuser for {sharer.name} fuses unrotated keys, which takes the sharer's own rotary "
                        f"embedding; load that sharer here instead of {sharer.url}"
                    )
                rotary = (Rotary.of(receiver), Rotary.of(sharer))
                if fuser.rotary is not None and not all(map(Rotary.turns_as, fuser.rotary, rotary)):
                    raise C2CError(
                        "a fuser of unrotated keys is another pair's, whose models turn keys in another way, and would "
                        "fuse otherwise there; give a copy of it (copy.deepcopy)"
                    )
                fuser.rotary = rotary
            if fuser.config.token_map == "same" and (share := foreign(receiver, sharer)) > FOREIGN:
                raise C2CError(
                    f"with the token map same {sharer.name} reads the receiver's token ids, of which "
                    f"{100 * share:.0f}% are other tokens, or none, for it; take the token map span"
                )
        self.mode = _checked(mode)
        self._is_parallel(mode)
        self.chat_template_kwargs = {**NO_THINKING, **(chat_template_kwargs or {})}

    @classmethod
    def from_models(
        cls,
        receiver: ModelSource,
        sharers: ModelSource | Sequence[ModelSource],
        config: FuserConfig | Sequence[FuserConfig] | None = None,
        **kwargs: Any,
    ) -> C2C:
        """A new pair with untrained fusers. `config` is one for all sharers or one each; `kwargs` as for the class."""
        _check_options("from_models", kwargs)
        config = FuserConfig() if config is None else config
        for_all = isinstance(config, FuserConfig)
        configs = [config] if isinstance(config, FuserConfig) else list(config)
        if wrong := [c for c in configs if not isinstance(c, FuserConfig)]:
            raise C2CError(f"a fuser's configuration is a FuserConfig, not {type(wrong[0]).__name__}; make one of it")
        main = load_lm(receiver)
        others = [_lm(source) for source in _as_list(sharers)]
        configs = configs * len(others) if for_all else configs
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
        subfolder: str | Sequence[str] | None = None,
        dtype: str | None = None,
        device: str | None = None,
        **kwargs: Any,
    ) -> C2C:
        """A trained pair.

        Args:
            fuser: a folder, a hub id, or None for the fuser that comes with this library; a list for several sharers.
            receiver, sharers: instead of the models that the fuser was trained for: ids, folders, GGUF files,
                `ModelSpec`s or loaded models; for a sharer also the address of a `c2c sharer serve`, or a
                `RemoteSharer`.
            revision: of the fuser on the hub.
            subfolder: where in the folder or repository the fuser is; a list for several sharers.
            dtype, device: of models that are loaded here ("auto" and the first GPU, if there is one, by default).
            kwargs: as for the class.
        """
        _check_options("from_pretrained", kwargs)
        folders = checkpoint.resolve_all(
            [fuser] if fuser is None or isinstance(fuser, (str, Path)) else list(fuser),
            [subfolder] if subfolder is None or isinstance(subfolder, str) else list(subfolder),
            revision,
        )
        fusers = [checkpoint.load(folder) for folder in folders]
        configs = [f.config for f in fusers]
        overrides = {k: v for k, v in (("dtype", dtype), ("device", device)) if v is not None}

        models: list[tuple[ModelSpec, LM]] = []  # one that is named twice is loaded once

        def load(given: ModelSource | None, trained_for: ModelIdentity | None) -> LM:
            assert trained_for is not None  # make_fuser has checked
            if given is None:
                given = trained_for.spec
            if not isinstance(given, (str, Path, ModelSpec)) or is_address(given):
                return _lm(given)  # loaded, or served, or refused
            spec = given if isinstance(given, ModelSpec) else ModelSpec(source=str(given))
            if (same := next((lm for known, lm in models if known == spec), None)) is None:
                models.append((spec, same := load_lm(spec, None, **overrides)))
            return same

        others = [None] * len(fusers) if sharers is None else _as_list(sharers)
        if len(others) != len(fusers):
            raise C2CError(f"{len(others)} sharers for {len(fusers)} fusers; every sharer needs a fuser of its own")
        return cls(
            load(receiver, configs[0].receiver),
            [load(given, c.sharer) for given, c in zip(others, configs, strict=True)],
            fusers,
            **kwargs,
        )

    def save_pretrained(self, folder: str | Path, *, dtype: str | torch.dtype | None = None) -> None:
        """Write the fuser (with several sharers: the fusers, into folders 0, 1, … of `folder`), with the list of what
        it was trained on. `dtype` is that of the weights on disk, theirs without it.

        Raises:
            C2CError: the folder holds one fuser where several would be written, or the other way round.
        """
        several = len(self.fusers) > 1
        if isinstance(dtype, str):
            named = getattr(torch, dtype, None)
            if not isinstance(named, torch.dtype):
                raise C2CError(f"unknown dtype {dtype!r}; expected bfloat16, float16 or float32")
            dtype = named
        if any(Path(folder).glob("config.json" if several else "[0-9]*/config.json")):
            found, other = ("one fuser", "several") if several else ("several fusers", "one")
            raise C2CError(
                f"{folder} holds {found}, and would hold {other} besides; choose another folder, or remove it"
            )
        if several and (more := sorted(Path(folder).glob("[0-9]*/config.json"))[len(self.fusers) :]):
            raise C2CError(
                f"{folder} holds {len(self.fusers) + len(more)} fusers, {len(self.fusers)} of which would be new ones; "
                "choose another folder, or remove it"
            )
        for index, fuser in enumerate(self.fusers):
            checkpoint.save(fuser, Path(folder) / str(index) if several else folder, dtype=dtype)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload the fuser, or the fusers, with a model card; returns the address."""
        from .fuser.hub import push

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            several = [Path(folder) / str(index) for index in range(len(self.fusers))]
            return push(several if len(several) > 1 else [Path(folder)], repo_id, private=private)

    # ---- prompt in, fused cache out -----------------------------------------------------------------------------

    def encode(self, prompt: Prompt, *, prefix: str = "") -> PromptIds:
        """What each model reads of one prompt, and which sharer token goes with each receiver token.

        Args:
            prompt: chat messages, plain text, token ids (T,) that all models read alike (refused where a sharer reads
                other text in them), or `PromptIds`.
            prefix: the start of the answer, put behind the prompt.
        """
        if isinstance(prompt, PromptIds) or not isinstance(prompt, (str, Sequence)) or _is_ids(prompt):
            if prefix:
                raise C2CError("prefix needs text or messages; append its token ids to the prompt instead")
            return prompt if isinstance(prompt, PromptIds) else self._same_ids(prompt)
        mine = self.rendered(self.receiver, prompt, prefix)
        maps = [fuser.config.token_map for fuser in self.fusers]
        theirs = {j: self.rendered(self.sharers[j], prompt, prefix) for j, m in enumerate(maps) if m != "same"}
        aligned: dict[int, Strategy] = {j: m for j, m in enumerate(maps) if m == "first" or m == "longest"}
        published = self._published(mine, theirs, aligned)
        moved = next((a.receiver_positions for a in published.values()), None)
        read: list[tuple[Sequence[int], Sequence[int], float, Sequence[int] | None]] = []
        for j, name in enumerate(maps):
            if name == "same":
                self._check_readable(j, mine.ids)
                read.append((mine.ids, range(len(mine.ids)), 1.0, moved))
            elif name == "span":
                found = span_map(mine, theirs[j])
                read.append((theirs[j].ids, found.index.tolist(), found.coverage, None))
            else:
                a = published[j]
                read.append((a.sharer, a.index, a.coverage, a.sharer_positions))
        ids, index, coverage, positions = zip(*read, strict=True)
        return PromptIds(
            mine.ids,
            ids,
            index,
            coverage,
            content_tokens(mine),
            moved,
            positions if published else (),
            # A copy: the caller may go on with the same list.
            (prompt if isinstance(prompt, str) else [dict(message) for message in prompt], prefix),  # type: ignore[arg-type]
        )

    def rendered(self, lm: LM, prompt: Any, prefix: str = "") -> Rendered:
        """What one of the models reads of a text or of messages by itself, without alignment, see `alignment.chat`."""
        if isinstance(lm, RemoteSharer):
            return lm.render(prompt, prefix=prefix, chat_template_kwargs=self.chat_template_kwargs)
        return render(lm.need_tokenizer(), prompt, prefix=prefix, chat_template_kwargs=self.chat_template_kwargs)

    def _published(
        self, mine: Rendered, theirs: Mapping[int, Rendered], strategies: Mapping[int, Strategy]
    ) -> dict[int, Aligned]:
        """Per sharer whose fuser has the token map first or longest: what it reads."""
        if not strategies:
            return {}
        tokenizers = (self.receiver.need_tokenizer(), [self.sharers[j].need_tokenizer() for j in strategies])
        found = align(mine, [theirs[j] for j in strategies], tokenizers, list(strategies.values()))
        return dict(zip(strategies, found, strict=True))

    def _check_readable(self, j: int, ids: Sequence[int]) -> None:
        """Refuse tokens of the receiver's that sharer j, which is to read the same ones, doesn't have."""
        sharer = self.sharers[j]
        if max(ids) >= sharer.vocab_size:
            raise C2CError(
                f"by the fuser's token map same {sharer.name} reads the receiver's token ids, but it has only "
                f"{sharer.vocab_size:,} of them and the prompt holds {max(ids):,}; the token map is for models of one "
                "vocabulary"
            )

    @cached_property
    def _foreign(self) -> list[float]:
        """Per sharer `foreign`."""
        return [foreign(self.receiver, sharer) for sharer in self.sharers]

    def _same_ids(self, ids: Any) -> PromptIds:
        row = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if not row or not all(isinstance(i, Integral) for i in row):
            raise C2CError(
                f"token ids must be one flat, non-empty list or tensor of integers, not {type(ids).__name__}"
            )
        row = list(map(int, row))
        for sharer, fuser, share in zip(self.sharers, self.fusers, self._foreign, strict=True):
            if fuser.config.token_map != "same" and share > FOREIGN:
                raise C2CError(
                    f"token ids are read alike by all models, and {sharer.name} has another tokenizer than "
                    f"{self.receiver.name}; give the prompt as text or messages"
                )
        alike = [row] * len(self.sharers)
        return PromptIds(row, alike, [range(len(row))] * len(self.sharers), [1.0] * len(self.sharers))

    def prefill(self, prompts: Prompt | Sequence[Prompt] | Tensor, *, prefix: str = "", **options: Any) -> FusedCache:
        """Prefill every model and fuse: the seam from which everything starts.

        Args:
            prompts: one prompt (see `encode`) or a list of them; a tensor (B, T) of ids is a batch without padding.
            prefix: the start of the answer.
            options: `sharer_mask`, `positions`, `mode`, `skip`, `past`, `keep`, as for `fuse`.
        """
        return self.fuse([self.encode(prompt, prefix=prefix) for prompt in as_batch(prompts)], **options)

    def fuse(
        self,
        batch: Sequence[PromptIds],
        *,
        sharer_mask: int | Sequence[int] | None = None,
        positions: Positions | Sequence[Positions] = "all",
        mode: Mode | None = None,
        skip: float | None = None,
        past: FusedCache | Sequence[Turn | None] | None = None,
        keep: bool = False,
        clean: Prefilled | None = None,
        sharers: Sequence[tuple[KV, Sequence[int]] | None] | None = None,
    ) -> FusedCache:
        """As `prefill`, from encoded prompts.

        Args:
            batch: the prompts.
            sharer_mask: which sharers take part: bit j of it is sharer j, counted from 0, so 0b101 is the first and the
                third, 0 the receiver alone; one for all prompts or one each; None: all. A sharer that isn't selected
                computes nothing.
            positions: which positions may be fused, one for all prompts or one each: "all" (but the last, always),
                "content" (of the messages; no template tokens), "front:0.5" or "back:0.5" (that share of the positions,
                from the front or the back), or (T,) bools.
            mode: instead of the pair's own.
            skip: a prompt whose likeliest next token has at least this probability for the receiver alone
                (`decode.confidence`) is left to it, as with a `sharer_mask` of 0; None: no prompt is.
            past: an earlier fused cache made with `keep`, row by row the same chats some turns ago (or its `turns`, one
                or None per prompt): what the prompts begin with alike is neither read nor fused again.
            keep: also keep the clean caches, for a later turn's `past`.
            clean: the receiver's own prefill of the batch, where it is known already; it stays as it is.
            sharers: per sharer, where it is known already (from a store, from another machine), its cache of the batch,
                (L, B, H, T', D) padded on the left, and how many tokens of each prompt it holds; None: computed here.
        """
        skip = decode.threshold(skip)
        batch = self.selected(batch, sharer_mask, positions)
        before = _turns(past, len(batch))
        parallel = self._is_parallel(_checked(mode or self.mode))
        shared = clean is not None or keep or (parallel and len(self.fusers) > 1)
        given = list(sharers or [None] * len(self.sharers))
        with ExitStack() as stack:
            # What comes from another machine travels while the receiver reads here; unless that says who isn't asked.
            reads, arriving = self._ask(batch, before, given, stack) if skip is None else ([], {})
            clean = clean or prefill_prompts(
                self.receiver,
                [p.receiver for p in batch],
                [p.positions for p in batch],
                past=[turn.receiver if turn else None for turn in before],
            )
            batch, sure, skipped = self._skipped(batch, clean, skip)
            if skip is not None:
                reads, arriving = self._ask(batch, before, given, stack)
            # What an earlier turn fused in the same way is taken from there. The first change needs a copy if anyone
            # else reads the clean cache.
            todo, kv = _taken(batch, before, clean.kv, parallel)
            kv = kv or (None if shared else clean.kv)
            passed, kept = 0, [_unread(prompt, turn) for prompt, turn in zip(batch, before, strict=True)]
            for j, fuser in enumerate(self.fusers):
                members: Sequence[int]
                read, incoming = reads[j], arriving.get(j)
                if (known := given[j]) is not None:
                    (cache, lengths), members = known, list(range(len(batch)))
                elif read is not None:
                    cache = incoming.kv if incoming else self._read(j, read)
                    lengths, members = read.lengths, read.members
                else:
                    continue
                where, used = where_to_fuse(todo, j, clean.kv.length, cache.length, lengths, members)
                source = clean.kv if parallel or kv is None else kv
                # A cache on its way is on the receiver's device already, so this is no copy of what isn't there yet.
                theirs, where = cache.to(source.keys.device), where.to(source.keys.device)
                for layers in [None] if incoming is None else incoming.pieces():
                    with torch.no_grad():
                        kv = fuser(source, theirs, where, kv, layers)
                passed += used * fuser.sharer_reads * cache.keys[0, 0, :, 0].nbytes
                if keep and read is not None:
                    for place, row in enumerate(members):
                        kept[row][j] = Read(read.rows[place], cache.tail(place, lengths[row]), read.positions[place])
            transfers = [each.transfer() for each in arriving.values()]
        kv = kv or clean.kv
        turns = []
        for row, (prompt, of_sharers) in enumerate(zip(batch, kept if keep else [], strict=False)):
            n = len(prompt.receiver) - 1
            own = Read(prompt.receiver[:-1], clean.kv.tail(row, n), prompt.positions)
            turns.append(Turn(prompt, own, kv.tail(row, n), of_sharers, parallel))
        fused = [sum(max(column) >= 0 for column in zip(*(m[:-1] for m in p.maps), strict=True)) for p in batch]
        coverage = [p.coverage for p in batch]
        ids, mask, places = clean.input_ids, clean.attention_mask, clean.position_ids
        return FusedCache(
            ids, mask, kv, places, fused, coverage, passed, turns, transfers, sure, skipped,
            behind=[p.text is not None and (isinstance(p.text[0], str) or bool(p.text[1])) for p in batch],
        )  # fmt: skip

    def _ask(
        self,
        batch: Sequence[PromptIds],
        before: Sequence[Turn | None],
        given: Sequence[object],
        stack: ExitStack,
    ) -> tuple[list[ToRead | None], dict[int, Incoming]]:
        """What each sharer whose cache isn't given has to read, and the caches on their way from other machines."""
        reads = [self._to_read(j, batch, before) if known is None else None for j, known in enumerate(given)]
        arriving: dict[int, Incoming] = {}
        for j, (sharer, read) in enumerate(zip(self.sharers, reads, strict=True)):
            if isinstance(sharer, RemoteSharer) and read is not None:
                arriving[j] = sharer.prefill(read.rows, read.positions, read.depth, read.past, self.receiver.device)
                stack.callback(arriving[j].close)
        return reads, arriving

    def _to_read(self, j: int, batch: Sequence[PromptIds], before: Sequence[Turn | None]) -> ToRead | None:
        """What sharer j has to read of a batch; None: nothing."""
        fuser = self.fusers[j]
        lengths = sharer_lengths(batch, j)
        members = [row for row, length in enumerate(lengths) if length]
        if fuser.sharer_depth == 0 or not members:
            return None
        return ToRead(
            members,
            lengths,
            [batch[row].sharers[j][: lengths[row]] for row in members],
            [batch[row].positions_of(j) for row in members],
            fuser.sharer_depth,
            [turn.sharers[j] if (turn := before[row]) else None for row in members],
        )

    def _read(self, j: int, asked: ToRead) -> KV:
        """Sharer j's cache, padded on the left."""
        sharer = self.sharers[j]
        if isinstance(sharer, RemoteSharer):
            incoming = sharer.prefill(asked.rows, asked.positions, asked.depth, asked.past, self.receiver.device)
            incoming.wait(asked.depth)
            return incoming.kv
        ids, mask = pad_left(asked.rows, sharer.pad_token_id, sharer.device)
        places = positions_from(asked.positions, mask)
        return prefill(sharer, ids, mask, num_layers=asked.depth, positions=places, past=asked.past)

    def selected(
        self,
        batch: Sequence[PromptIds],
        sharer_mask: int | Sequence[int] | None = None,
        positions: Positions | Sequence[Positions] = "all",
    ) -> list[PromptIds]:
        """The prompts as `fuse` reads them, with -1 in the maps wherever nothing is to be fused.

        Raises:
            C2CError: what `fuse` refuses of prompts, mask and positions.
        """
        self._check(batch)
        batch = self._select(batch, sharer_mask, positions)
        self._check_room(batch)
        return batch

    def _select(
        self, batch: Sequence[PromptIds], sharer_mask: int | Sequence[int] | None, positions: Any
    ) -> list[PromptIds]:
        """The prompts with -1 in their maps wherever nothing is to be fused: the last token's entry stays."""
        if sharer_mask is None and isinstance(positions, str) and positions == "all":
            return list(batch)
        every = (1 << len(self.sharers)) - 1
        given: Any = every if sharer_mask is None else sharer_mask
        masks: list[Any] = [given] * len(batch) if isinstance(given, Integral) else list(given)
        if len(masks) != len(batch) or any(not isinstance(m, Integral) or not 0 <= int(m) <= every for m in masks):
            raise C2CError(
                f"sharer mask {sharer_mask} doesn't fit {len(batch)} prompts and {len(self.sharers)} sharers; expected "
                f"one number from 0 to {every}, or one per prompt"
            )
        chosen = []
        for prompt, mask, allowed in zip(batch, masks, fusable(batch, positions), strict=True):
            maps = [
                [s if ok and int(mask) >> j & 1 else -1 for s, ok in zip(index, allowed, strict=True)]
                for j, index in enumerate(prompt.maps)
            ]
            chosen.append(replace(prompt, maps=maps))
        return chosen

    def _is_parallel(self, mode: Mode) -> bool:
        """Whether a mode sums the fusers' changes; raises a C2CError for fusers that it doesn't go with."""
        replaces = not all(f.config.residual for f in self.fusers)
        if mode == "parallel" and len(self.fusers) > 1 and replaces:
            raise C2CError(
                "several fusers' changes are summed, and one with residual: false replaces, so that only the last "
                "would count; give one fuser, or mode sequential"
            )
        return mode == "parallel"

    def _check_room(self, batch: Sequence[PromptIds]) -> None:
        """Of each sharer for what it reads, which is nothing where it isn't selected."""
        for j, sharer in enumerate(self.sharers):
            decode.check_room(sharer, max(sharer_lengths(batch, j)), 0)

    def _skipped(
        self, batch: Sequence[PromptIds], clean: Prefilled, skip: float | None
    ) -> tuple[Sequence[PromptIds], list[float], list[bool]]:
        """The prompts without a sharer where the receiver is confident enough; its confidences, and where."""
        if skip is None:
            return batch, [], [False] * len(batch)
        sure = decode.confidence(self.receiver, clean)
        skipped = [c >= skip for c in sure]
        every = (1 << len(self.sharers)) - 1
        return self._select(batch, [0 if s else every for s in skipped], "all"), sure, skipped

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
            for ids, index in zip(prompt.sharers, prompt.maps, strict=True):
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
        """The receiver's stock `generate` on the fused cache.

        Args:
            prompts: see `prefill`, or a fused cache.
            prefix: the start of the answer.
            kwargs: options of `fuse` (`sharer_mask`, `positions`, `mode`, `skip`, `past`); `fuse_response`, whether the
                answer's tokens are fused too (`cache2cache.response`; None: as the fuser was trained; a fused cache
                must then be made with `keep`); the rest goes to `generate`.

        Returns:
            Token ids (B, T + new) with the prompt, padded on the left, or whatever the options make `generate` return.
        """
        fused = self._answering(prompts, prefix, kwargs)
        return decode.generate(self.receiver, fused, **kwargs)

    def stream(self, prompt: Prompt | FusedCache, *, prefix: str = "", **kwargs: Any) -> Generator[Chunk, None, None]:
        """As `generate`, one prompt, token by token."""
        fused = self._answering(prompt, prefix, kwargs)
        return decode.stream(self.receiver, fused, **kwargs)

    def chat(
        self, messages: str | Messages | Sequence[str | Messages], *, prefix: str = "", **kwargs: Any
    ) -> str | list[Any]:
        """Answer a chat, or each chat of a list, as text; a text alone is a user's. `kwargs` as for `generate`, with
        `num_return_sequences` a list of answers for each chat."""
        if isinstance(messages, FusedCache):
            raise C2CError("chat takes messages; a fused cache is answered by generate or stream")
        given = as_batch(messages)
        batch = [[{"role": "user", "content": chat}] if isinstance(chat, str) else chat for chat in given]
        fused = self._answering(batch, prefix, kwargs)
        made = decode.generate(self.receiver, fused, **kwargs)
        sequences = getattr(made, "sequences", made)
        answers = sequences[:, fused.input_ids.shape[1] :].tolist()
        texts: list[Any] = [self.receiver.text(ids, any(fused.behind)) for ids in answers]
        if (each := len(texts) // len(batch)) > 1:
            texts = [texts[begin : begin + each] for begin in range(0, len(texts), each)]
        return texts[0] if given is not messages else texts

    def score(
        self,
        prompts: Prompt | Sequence[Prompt] | FusedCache,
        continuations: Sequence[Any],
        *,
        prefix: str = "",
        **options: Any,
    ) -> list[list[Score]] | list[Score]:
        """Log-likelihoods of continuations on the fused cache.

        Args:
            prompts: one prompt or several.
            continuations: per prompt a list of texts or of lists of token ids (for one prompt: that list itself).
            prefix: the start of the answer, before the continuation.
            options: as for `fuse`.

        Returns:
            Per prompt one `Score` per continuation (for one prompt: that list itself).
        """
        if isinstance(prompts, FusedCache):
            single = False
        else:
            batch = as_batch(prompts)
            single = batch is not prompts and not (isinstance(prompts, Tensor) and prompts.dim() > 1)
        groups = [continuations] if single else continuations
        if any(isinstance(group, str) for group in groups):
            raise C2CError(
                "continuations are a list of texts or of lists of token ids, for several prompts one each, not a text; "
                "put it into a list"
            )
        ids = [[self.receiver.continuation_ids(c) for c in group] for group in groups]
        fused = self._fused(prompts, prefix, options)
        if options:
            raise C2CError(f"unknown option {next(iter(options))!r}; score takes {', '.join(OPTIONS)}")
        scores = decode.score(self.receiver, fused, ids)
        return scores[0] if single else scores

    def _answering(self, prompts: Any, prefix: str, kwargs: dict[str, Any]) -> Prefilled:
        """As `_fused`, to be decoded with the answer's tokens fused where that is asked for."""
        asked = kwargs.pop("fuse_response", None)
        fused = self._fused(prompts, prefix, kwargs, keep=bool(response.fused_sharers(self, asked)))
        return response.answered_from(self, fused, asked)

    def _fused(self, prompts: Any, prefix: str, kwargs: dict[str, Any], *, keep: bool = False) -> FusedCache:
        """The fused cache of prompts; takes the options of `fuse` out of `kwargs`."""
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        if isinstance(prompts, FusedCache):
            if given := ["prefix"] * bool(prefix) + list(options):
                raise C2CError(f"{given[0]} was given with a fused cache; give it to prefill instead")
            return prompts
        return self.prefill(prompts, prefix=prefix, keep=keep, **options)


OPTIONS = ("sharer_mask", "positions", "mode", "skip", "past")


def _checked(mode: Mode) -> Mode:
    if mode not in ("parallel", "sequential"):
        raise C2CError(f"unknown fusion mode {mode!r}; expected parallel or sequential")
    return mode


def _turns(past: FusedCache | Sequence[Turn | None] | None, rows: int) -> Sequence[Turn | None]:
    if past is None:
        return [None] * rows
    turns = past.turns if isinstance(past, FusedCache) else past
    if len(turns) != rows:
        what = "was made without keep=True" if not turns else f"holds {len(turns)} chats"
        raise C2CError(f"the past {what}, {rows} prompts were given; expected the same chats, prefilled with keep=True")
    return turns


def _taken(
    batch: Sequence[PromptIds], before: Sequence[Turn | None], clean: KV, parallel: bool
) -> tuple[list[PromptIds], KV | None]:
    """What is left to fuse, and a copy of the clean cache with what earlier turns have fused (None if nothing).

    A position's fused value depends on its own clean keys and values and on those of the sharer positions that go with
    it, so it can be taken over where both prompts agree up to all of these.
    """
    todo, kv = list(batch), None
    for row, (prompt, turn) in enumerate(zip(batch, before, strict=True)):
        if turn is None or turn.parallel != parallel:
            continue
        reads = []
        for j, (old, new, read) in enumerate(zip(turn.prompt.maps, prompt.maps, turn.sharers, strict=True)):
            places = prompt.positions_of(j)
            reads.append((old, new, read.shared(prompt.sharers[j], places) if read else 0))
        agreed = turn.receiver.shared(prompt.receiver[:-1], prompt.positions)
        same = [
            t
            for t in range(agreed)
            if all(old[t] == new[t] < known or new[t] == old[t] == -1 for old, new, known in reads)
        ]
        if not same:
            continue
        kv = kv or clean.clone()
        start = clean.length - (len(prompt.receiver) - 1)
        for mine, theirs in ((kv.keys, turn.fused.keys), (kv.values, turn.fused.values)):
            mine[:, row, :, [start + t for t in same]] = theirs[:, 0, :, same]
        taken = set(same)
        maps = [[-1 if t in taken else s for t, s in enumerate(index)] for index in prompt.maps]
        todo[row] = replace(prompt, maps=maps)
    return todo, kv


def _unread(prompt: PromptIds, turn: Turn | None) -> list[Read | None]:
    """Per sharer what an earlier turn read, where this one reads nothing: kept for the turn that needs it again."""
    known = turn.sharers if turn else [None] * len(prompt.maps)
    return [None if max(index[:-1], default=-1) >= 0 else read for index, read in zip(prompt.maps, known, strict=True)]


def sharer_lengths(batch: Sequence[PromptIds], j: int) -> list[int]:
    """Per prompt, how many tokens of sharer j are read: up to the last that goes with a fused position."""
    return [max(p.maps[j][:-1], default=-1) + 1 for p in batch]


def _at(positions: Sequence[int] | None, tokens: Tensor) -> Tensor:
    """Position ids of tokens: what `positions` says, or their own number."""
    return tokens if positions is None else torch.as_tensor(list(positions))[tokens]


def where_to_fuse(
    batch: Sequence[PromptIds],
    j: int,
    receiver_length: int,
    sharer_length: int,
    lengths: Sequence[int],
    members: Sequence[int] | None = None,
) -> tuple[Tensor, int]:
    """The positions to fuse as (6, N): row and position in the receiver's cache, row and position in the sharer's, and
    the position ids of both tokens.

    Args:
        batch, j: the prompts and which sharer.
        receiver_length: positions of the receiver's left-padded cache (all tokens but the last of the longest prompt).
        sharer_length: positions of the sharer's.
        lengths: per prompt, how many of its sharer tokens that cache holds.
        members: which prompts are the rows of the sharer's cache; None: all.

    Returns:
        The positions, and how many different sharer positions they read.
    """
    where, read = [], 0
    for sharer_row, row in enumerate(range(len(batch)) if members is None else members):
        index = torch.as_tensor(list(batch[row].maps[j][:-1]), dtype=torch.long)
        t = (index >= 0).nonzero().flatten()
        s = index[t]
        read += len(s.unique())
        mine, theirs = receiver_length - len(index), sharer_length - lengths[row]
        ids = [_at(batch[row].positions, t), _at(batch[row].positions_of(j), s)]
        rows = [torch.full_like(t, row), t + mine, torch.full_like(t, sharer_row), s + theirs]
        where.append(torch.stack([*rows, *ids]))
    return torch.cat(where, dim=1), read


def _lm(source: ModelSource) -> LM:
    """A model, or a sharer that is served elsewhere."""
    return RemoteSharer(str(source)) if is_address(source) else load_lm(source)


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


def check_fit(fuser: C2CFuser, receiver: LM, sharer: LM) -> None:
    """Refuse models whose caches the fuser doesn't take; warn of other weights than those it was trained for."""
    _check_fit("receiver", fuser.config.receiver, receiver, int(fuser.receiver_layers.max()))
    _check_fit("sharer", fuser.config.sharer, sharer, int(fuser.sharer_layers.max()))


def _check_fit(role: str, trained_for: ModelIdentity | None, lm: LM, top: int) -> None:
    """`top` is the highest layer that the fuser names."""
    assert trained_for is not None  # make_fuser has checked
    given = (lm.num_layers, lm.num_kv_heads, lm.head_dim)
    asked = (trained_for.num_layers or lm.num_layers, trained_for.num_kv_heads, trained_for.head_dim)
    if asked != given or top >= lm.num_layers:
        depth = f"{trained_for.num_layers}" if trained_for.num_layers else f"at least {top + 1}"
        raise C2CError(
            f"the fuser is for {role} {trained_for.name} ({depth} layers, {asked[1]} KV heads of {asked[2]}), but "
            f"{lm.name} has "
            f"{given[0]} layers, {given[1]} KV heads of {given[2]}; use the {role} it was trained for, or train a "
            "fuser for this pair"
        )
    if trained_for.fingerprint and trained_for.fingerprint != lm.fingerprint:
        warnings.warn(
            f"the fuser was trained for {role} {trained_for.name} with weights {trained_for.fingerprint[:12]}, but "
            f"{lm.name} has weights "
            f"{lm.fingerprint[:12]}; answers may be worse",
            stacklevel=5,
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


def foreign(receiver: LM, sharer: LM) -> float:
    """The share of the receiver's tokens that are other ids, or none, for a sharer. 0 where one of them has no
    tokenizer; 1 for a served sharer with another tokenizer, whose tokens aren't known here."""
    ours, theirs = receiver.tokenizer_fingerprint, sharer.tokenizer_fingerprint
    if ours == theirs or ours is None or theirs is None:
        return 0.0
    if isinstance(sharer, RemoteSharer):
        return 1.0
    return other_ids(receiver, sharer) / len(receiver.need_tokenizer().get_vocab())


def other_ids(receiver: LM, sharer: LM) -> int:
    """How many of the receiver's tokens are other ids, or none, for a sharer."""
    ours, theirs = (lm.need_tokenizer().get_vocab() for lm in (receiver, sharer))
    return sum(theirs.get(token) != number for token, number in ours.items())


FOREIGN = 0.01  # more, and one model's token ids are no prompt for the other; Qwen3 has a few that Qwen2.5 lacks


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], int)


def _as_list(sources: Any) -> list[Any]:
    return list(sources) if isinstance(sources, (list, tuple)) else [sources]


def _check_options(method: str, given: Mapping[str, Any]) -> None:
    """Refuse, before anything is loaded, options that a pair doesn't have."""
    known = ("mode", "chat_template_kwargs")
    for name in given.keys() - known:
        hint = {
            "sharer": "did you mean sharers?",
            "torch_dtype": "did you mean dtype?",
            "device_map": "give each model as ModelSpec(source=…, device_map=…)",
            "quantization_config": "give a model as ModelSpec(source=…, quantization=…)",
        }.get(name, f"beside its arguments it takes {' and '.join(known)}")
        raise C2CError(f"{method} has no option {name!r}; {hint}")
