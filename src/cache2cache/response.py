"""Response fusion: the answer's tokens are fused too, one by one while decoding (the published `include_response`).

    pair.chat(messages, fuse_response=True, max_new_tokens=64)

For every token of the answer, and for the last prompt token before it:

1. The receiver reads it on top of its own clean (unfused) cache: clean keys and values.
2. Each sharer reads the chat up to there in its own tokens, as far as it hasn't yet; `span` says which of its tokens
   goes with the receiver's. Where the end of the text is now cut into other tokens, it is read again from there.
3. The fuser joins the two for that one position.
4. The receiver reads the token on top of its fused cache, with these keys and values in place of what it computes, so
   that the token sees itself fused, and predicts the next.

So an answer position is what a prompt position is: clean states of both models, fused. Positions without a sharer
token stay clean. Once fused a position never changes, whatever comes later. With closed gates this is the receiver.
The price is a second pass of the receiver (without LM head) and one of each sharer per token.

A token in which a character is not complete has no text yet, so it has no sharer token and stays clean; the token that
completes the character goes with the sharer's. Special tokens, such as the padding of ended rows, have no text either.

The facts of the published program (thu-nics/C2C; it has two wrappers of its models, the later one for fusers of hidden
states):

- Its last section, the last prompt token and the response, is passed through the receiver unfused and through sharer 1;
  the two are fused position by position. Then the receiver runs over the section again, and its attention uses the
  fused keys and values in that same pass, in all layers. So the last prompt token is fused, and tokens see themselves
  fused. The attention of Qwen3 is patched for it; here the cache does it, for any architecture.
- The first wrapper's unfused pass, in training, is on top of the fused prompt; the later one's on top of the clean
  prompt. Here it is on the clean one, which agrees with how a later turn of the chat reads the answer.
- In the first wrapper the caches that a decoding step needs are forgotten at the start of every pass, so generating
  with the option stops with an error. The later one keeps them. The published recipe that evaluates such a fuser
  switches the option off.
- The sharer reads the receiver's token ids, with or without an aligner, so only models of one vocabulary make sense.
  Here it reads the text in its own tokens. The published token maps `first` and `longest` are refused.
- One sharer there; here several, parallel or sequential.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from .alignment.chat import Rendered, common_prefix
from .alignment.tokens import span_map
from .errors import C2CError
from .kv import CACHE, KV, GrowingLayer, Prefilled, Read, ToRead, pad_left, positions_from, prefill

if TYPE_CHECKING:
    from .pair import C2C, FusedCache, Turn


def fused_sharers(pair: C2C, fuse_response: bool | None = None) -> list[int]:
    """The sharers whose tokens are fused into the answer. None: those whose fuser was trained for it."""
    if fuse_response is not None:
        return list(range(len(pair.fusers))) if fuse_response else []
    configs = [fuser.config for fuser in pair.fusers]
    return [j for j, config in enumerate(configs) if config.fuse_response and not config.moves_tokens]


def answered_from(pair: C2C, fused: FusedCache, fuse_response: bool | None = None) -> Prefilled:
    """What an answer is decoded on top of: a fused cache, or with the answer's tokens fused too where that is asked for
    (which takes a cache made with `keep`)."""
    sharers = fused_sharers(pair, fuse_response)
    return Answering.of(pair, fused, sharers) if sharers else fused


@dataclass(frozen=True, kw_only=True)
class Answering(Prefilled):
    """A fused cache from which the answer is decoded with its tokens fused.

    Attributes:
        pair, turns: the models, and per row what they have read.
        sharers: which of them take part in the answer; in a row, those that take part in its prompt.
    """

    pair: C2C
    turns: Sequence[Turn]
    sharers: Sequence[int]

    @classmethod
    def of(cls, pair: C2C, fused: FusedCache, sharers: Sequence[int]) -> Answering:
        """The same prompts as `fused`.

        Raises:
            C2CError: a fused cache made without `keep`, a published token map, or token ids that the sharer can't read.
        """
        if not fused.turns:
            raise C2CError(
                "fusing the answer needs what the models have read of the prompt, which this fused cache doesn't hold; "
                "prefill with keep=True, or give fuse_response=False"
            )
        for j in sharers:
            sharer, config = pair.sharers[j], pair.fusers[j].config
            if config.moves_tokens:
                raise C2CError(
                    f"the token map {config.token_map} says which tokens of a prompt go together, not which of an "
                    "answer; give fuse_response=False, or a fuser with the token map span"
                )
            as_ids = config.token_map == "same" or any(t.prompt.text is None for t in fused.turns)
            if as_ids and sharer.vocab_size != pair.receiver.vocab_size:
                raise C2CError(
                    f"{sharer.name} ({sharer.vocab_size} tokens) would read the answer's ids of {pair.receiver.name} "
                    f"({pair.receiver.vocab_size} tokens); give text or messages, and a fuser with the token map span"
                )
        same = (fused.input_ids, fused.attention_mask, fused.kv, fused.position_ids)
        return cls(*same, behind=fused.behind, pair=pair, turns=fused.turns, sharers=sharers)

    def inputs(self, copies: int = 1, static_length: int | None = None) -> dict[str, Any]:
        """As `Prefilled.inputs`, with a stopping criterion that stops nothing: it reads and fuses each new token."""
        if static_length is not None:
            raise C2CError(
                "an answer whose tokens are fused needs a cache that grows; leave cache_implementation out, or give "
                "fuse_response=False"
            )
        inputs = super().inputs(copies)
        answer = _Answer(self, copies)
        for index, layer in enumerate(inputs[CACHE].layers):
            inputs[CACHE].layers[index] = _Layer(layer.keys, layer.values, answer, index)
        return {**inputs, "stopping_criteria": StoppingCriteriaList([answer])}


class _Layer(GrowingLayer):
    """Takes for the position that comes the keys and values of the answer, not those that the model computes there."""

    def __init__(self, keys: Tensor, values: Tensor, answer: _Answer, index: int) -> None:
        super().__init__(keys, values)
        self.answer, self.index = answer, index

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = self.answer.position
        return super().update(new.keys[self.index].to(key_states), new.values[self.index].to(value_states))


@dataclass
class _Row:
    """One answer: what the models have read of its chat, and its text as far as its characters are complete."""

    turn: Turn
    receiver: Read
    sharers: list[Read | None]
    text: str = ""


class _Answer(StoppingCriteria):
    """The answers of a batch while they are decoded.

    `position` holds the keys and values (L, B, H, 1, D) of the position that the receiver reads next.
    """

    def __init__(self, prompt: Answering, copies: int) -> None:
        self.pair, self.sharers = prompt.pair, prompt.sharers
        self.prompt_length = prompt.input_ids.shape[1]
        turns = [turn for turn in prompt.turns for _ in range(copies)]
        self.rows = [_Row(turn, turn.receiver, list(turn.sharers)) for turn in turns]
        self.position = self._read([[] for _ in turns])

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if len(input_ids) != len(self.rows):
            raise C2CError(
                "beam search swaps answers between rows, which fusing the answer can't follow; leave num_beams out, or "
                "give fuse_response=False"
            )
        self.position = self._read(input_ids[:, self.prompt_length :].tolist())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @torch.no_grad()
    def _read(self, answers: list[list[int]]) -> KV:
        """Read the last token of each row, given the answers so far, and fuse it: (L, B, H, 1, D)."""
        pair = self.pair
        prompts = [row.turn.prompt for row in self.rows]
        ids = [[*prompt.receiver, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        places = [_continued(prompt.positions, len(i)) for prompt, i in zip(prompts, ids, strict=True)]
        padded, mask = pad_left(ids, pair.receiver.pad_token_id, pair.receiver.device)
        seen = [row.receiver for row in self.rows]
        cache = prefill(pair.receiver, padded, mask, positions=positions_from(places, mask), past=seen)
        for b, row in enumerate(self.rows):
            row.receiver = Read(ids[b], cache.tail(b, len(ids[b])), places[b])
        clean = _last(cache)
        parallel = self.rows[0].turn.parallel
        wanted = [self._partners(row, answer) for row, answer in zip(self.rows, answers, strict=True)]
        kv: KV | None = None
        for j in self.sharers:
            fuser = pair.fusers[j]
            members = [b for b, partners in enumerate(wanted) if j in partners]
            if fuser.sharer_depth == 0 or not members:
                continue
            theirs = [wanted[b][j] for b in members]
            at = [_continued(prompts[b].positions_of(j), len(wanted[b][j])) for b in members]
            read = [self.rows[b].sharers[j] for b in members]
            lengths = [len(row) for row in theirs]
            cache = pair._read(j, ToRead(members, lengths, theirs, at, fuser.sharer_depth, read))
            for place, b in enumerate(members):
                self.rows[b].sharers[j] = Read(theirs[place], cache.tail(place, len(theirs[place])), at[place])
            where = [
                (b, 0, place, 0, _position(places[b], ids[b]), _position(at[place], theirs[place]))
                for place, b in enumerate(members)
            ]
            device = clean.keys.device
            source = clean if parallel or kv is None else kv
            kv = fuser(source, _last(cache).to(device), torch.tensor(where, device=device).T, kv)
        return kv or clean

    def _partners(self, row: _Row, answer: list[int]) -> dict[int, list[int]]:
        """Per sharer: its tokens of the chat up to the one that goes with the row's last token, where there is one."""
        prompt = row.turn.prompt
        sharers = [j for j in self.sharers if max(prompt.maps[j]) >= 0]
        if not answer:  # the last prompt token
            return {j: list(prompt.sharers[j][: prompt.maps[j][-1] + 1]) for j in sharers if prompt.maps[j][-1] >= 0}
        as_ids = [j for j in sharers if prompt.text is None or self.pair.fusers[j].config.token_map == "same"]
        same = {j: [*prompt.sharers[j], *answer] for j in as_ids}
        if prompt.text is None or not (sharers := [j for j in sharers if j not in same]):
            return same
        text = _complete(self.pair.receiver.text(answer, behind=True))
        new = len(text) - common_prefix(row.text, text)
        if not new:  # nothing, or less: byte fallback shows a whole run of bytes as pieces until the last is complete
            return same
        row.text = text
        asked, begun = prompt.text
        lms = (self.pair.receiver, *(self.pair.sharers[j] for j in sharers))
        mine, *theirs = (self.pair.rendered(lm, asked, begun + text) for lm in lms)
        end = len(mine.text)
        token = Rendered(mine.text, answer[-1:], [(end - new, end)], mine.segments)
        found = {j: (other.ids, int(span_map(token, other).index)) for j, other in zip(sharers, theirs, strict=True)}
        return same | {j: ids[: s + 1] for j, (ids, s) in found.items() if s >= 0}


def _last(kv: KV) -> KV:
    """The last position, (L, B, H, 1, D)."""
    return KV(kv.keys[..., -1:, :], kv.values[..., -1:, :])


def _continued(positions: Sequence[int] | None, length: int) -> list[int] | None:
    """Position ids of so many tokens, of which some are known."""
    if positions is None:
        return None
    return [*positions, *range(positions[-1] + 1, positions[-1] + 1 + length - len(positions))][:length]


def _position(positions: Sequence[int] | None, ids: Sequence[int]) -> int:
    """The position id of the last of these tokens."""
    return len(ids) - 1 if positions is None else positions[-1]


def _complete(text: str) -> str:
    """The text without the pieces of a character at its end, which decode to U+FFFD."""
    return text.rstrip("\ufffd")
