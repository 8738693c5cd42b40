"""Token maps `first` and `longest`: what the published program (thu-nics/C2C) lets the sharer read.

The facts, from its aligner, its data adapters, its evaluator and its model wrapper:

1. Both models render the chat. Message contents split each text into template and message sections, and a token belongs
   to a message if its span overlaps the content. Of two template sections the shorter is padded on the right. Padding
   is masked, but position ids count it, for both models, so a message starts at the same position in both.
2. In a message the sharer does not read its own tokens. It reads one token per receiver token: that token is decoded
   alone and encoded alone by the sharer. One piece: it. Several: the first, or the one whose own text is longest (the
   first on a tie, and a piece of a character counts as the one U+FFFD that it decodes to). None: the unknown token, or
   id 0 without one. A special token goes by role (padding, end, beginning, unknown; end-of-sequence stands in for
   missing padding, and where an id has several roles the last named wins), else by its string, else as none.
3. All tokens of message contents are fused, whatever they map to. Template tokens, the generation prompt and the start
   of the answer are not.

So a message is mapped position by position, and masked padding can be left out when the positions are kept: what is
returned is unpadded, with the position of every token. With several sharers every template section counts as long as
the longest of all models, so that the receiver has one row of positions; the published program aligns one sharer only.

What differs from the published program:

- It finds a content by searching the text, and stops with an error when only one template keeps the content unchanged.
  Here its place is known exactly (`chat.Segment`), and what both templates kept of it is aligned.
- Control tokens spelled out in a message are plain text here.
- Padding behind the last receiver token (a generation prompt shorter than the sharer's) is left out. The published
  program predicts the first new token from that padding, and the answer starts so many positions later.
- Its sections are read one after the other, each on top of the fused sections before it, so template tokens behind a
  message see the fused message. Here all prompt states come from the clean cache.
- A model without a chat template gets this library's plain one; pass `chat_template` for another.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

from cache2cache.alignment.chat import PREFIX, Rendered, Segment
from cache2cache.errors import C2CError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Strategy = Literal["first", "longest"]


@dataclass(frozen=True)
class Aligned:
    """What the published program lets two models read, without its padding.

    Attributes:
        receiver_positions: (T,) position id of each receiver token.
        sharer, sharer_positions: (T',) the sharer's ids and their position ids.
        index: (T,) the sharer token of each receiver token, -1 where nothing is fused.
        coverage: share of the receiver's characters that lie in fused tokens.
    """

    receiver_positions: list[int]
    sharer: list[int]
    sharer_positions: list[int]
    index: list[int]
    coverage: float


def align(
    receiver: Rendered,
    sharers: Sequence[Rendered],
    tokenizers: tuple[PreTrainedTokenizerBase, Sequence[PreTrainedTokenizerBase]],
    strategies: Sequence[Strategy],
) -> list[Aligned]:
    """Align a rendered prompt with each sharer (see the module).

    Args:
        receiver, sharers: the prompt as each model renders it.
        tokenizers: the receiver's and the sharers'.
        strategies: per sharer, `first` or `longest`.
    """
    ours, others = tokenizers
    keys = _shared_keys([receiver, *sharers])
    cuts = [_cut(rendered, keys) for rendered in (receiver, *sharers)]
    lengths = [  # of each template section: before, between and behind the messages
        max(b - a for a, b in section) for section in zip(*([t for t, _ in cut] for cut in cuts), strict=True)
    ]
    templates, messages = zip(*cuts[0], strict=True)
    positions: list[int] = []
    starts = [0]  # of each template section
    for template, message, length in zip(templates, messages, lengths, strict=True):
        positions += range(starts[-1], starts[-1] + template[1] - template[0])
        begin = starts[-1] + length
        positions += range(begin, begin + message[1] - message[0])
        starts.append(begin + message[1] - message[0])
    covered = {
        c
        for key, (a, b) in zip([*keys, None], messages, strict=True)
        if key not in (PREFIX, None)
        for start, end in receiver.offsets[a:b]
        for c in range(start, end)
    }
    results = []
    for rendered, cut, tokenizer, strategy in zip(sharers, cuts[1:], others, strategies, strict=True):
        ids: list[int] = []
        theirs: list[int] = []
        index = [-1] * len(receiver.ids)
        for key, ((a, b), _), (start, end), at, length in zip(
            [*keys, None], cut, messages, starts, lengths, strict=False
        ):
            ids += rendered.ids[a:b]
            theirs += range(at, at + b - a)
            if key != PREFIX:
                index[start:end] = range(len(ids), len(ids) + end - start)
            ids += map_tokens(ours, tokenizer, receiver.ids[start:end], strategy)
            theirs += range(at + length, at + length + end - start)
        results.append(Aligned(positions, ids, theirs, index, len(covered) / max(1, len(receiver.text))))
    return results


def map_tokens(
    receiver: PreTrainedTokenizerBase, sharer: PreTrainedTokenizerBase, ids: Sequence[int], strategy: Strategy
) -> list[int]:
    """The sharer token of each receiver token. Each token is looked up once per pair of tokenizers."""
    if strategy not in ("first", "longest"):
        raise C2CError(f"unknown token map {strategy!r}; expected span, first or longest")
    table = _table(receiver, sharer, strategy)
    if missing := sorted(set(ids) - table.keys()):
        table.update(zip(missing, _look_up(receiver, sharer, missing, strategy), strict=True))
    return [table[i] for i in ids]


# One table per pair of tokenizers and strategy, no longer than the receiver's vocabulary, gone with either tokenizer.
# Entries are only ever added, and two threads that add the same one agree, so only the making of a table is locked.
_TABLES: WeakKeyDictionary[object, WeakKeyDictionary[object, dict[str, dict[int, int]]]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def _table(receiver: object, sharer: object, strategy: str) -> dict[int, int]:
    with _LOCK:
        return _TABLES.setdefault(receiver, WeakKeyDictionary()).setdefault(sharer, {}).setdefault(strategy, {})


def _look_up(
    receiver: PreTrainedTokenizerBase, sharer: PreTrainedTokenizerBase, ids: list[int], strategy: Strategy
) -> list[int]:
    unknown = sharer.unk_token_id or 0
    special = set(receiver.all_special_ids)
    texts = [_text(receiver, i) for i in ids]
    pieces = sharer(texts, add_special_tokens=False, padding=False, truncation=False, verbose=False)["input_ids"]
    result = []
    for i, text, found in zip(ids, texts, pieces, strict=True):
        if i in special:
            result.append(_special(receiver, sharer, i, text, unknown))
        elif not found:
            result.append(unknown)
        elif strategy == "first" or len(found) == 1:
            result.append(found[0])
        else:
            result.append(max(found, key=lambda piece: len(_text(sharer, piece))))  # the first on a tie
    return result


def _special(
    receiver: PreTrainedTokenizerBase, sharer: PreTrainedTokenizerBase, token: int, text: str, unknown: int
) -> int:
    def roles(tokenizer: PreTrainedTokenizerBase) -> list[int | None]:
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return [pad, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id]

    by_role = dict(zip(roles(receiver), roles(sharer), strict=True)).get(token)
    if by_role is not None:
        return by_role
    by_string = sharer.convert_tokens_to_ids(text)
    return by_string if isinstance(by_string, int) and by_string != sharer.unk_token_id else unknown


def _text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _shared_keys(prompts: Sequence[Rendered]) -> list[int | str]:
    """Messages that every model's text holds, as far as their order is the same in all."""
    orders = [{segment.key: place for place, segment in enumerate(prompt.segments)} for prompt in prompts]
    keys: list[int | str] = []
    for segment in prompts[0].segments:
        key = segment.key
        if all(key in order and (not keys or order[keys[-1]] < order[key]) for order in orders):
            keys.append(key)
    return keys


def _cut(rendered: Rendered, keys: Sequence[int | str]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Token ranges: per message the template section before it and the message; at the end what is behind, and nothing.

    A message begins with the first token that ends behind the content's start and ends before the first that starts at
    the content's end or later.
    """
    segments: dict[int | str, Segment] = {segment.key: segment for segment in rendered.segments}
    cuts, reached, spans = [], 0, rendered.offsets
    for key in keys:
        start = reached
        while start < len(spans) and spans[start][1] <= segments[key].start:
            start += 1
        end = start
        while end < len(spans) and spans[end][0] < segments[key].end:
            end += 1
        cuts.append(((reached, start), (start, end)))
        reached = end
    return [*cuts, ((reached, len(spans)), (len(spans), len(spans)))]
