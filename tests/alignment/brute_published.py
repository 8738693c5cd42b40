"""The published token alignment, padding and all, as slow and plain as its rules read. Kept apart from the code."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

Section = tuple[bool, int, int]  # whether it is a message, and its tokens [start, end)


def one_token(receiver: PreTrainedTokenizerBase, sharer: PreTrainedTokenizerBase, token: int, strategy: str) -> int:
    text = receiver.decode([token], clean_up_tokenization_spaces=False)
    unknown = 0 if sharer.unk_token_id is None else sharer.unk_token_id
    if token in receiver.all_special_ids:
        for role in ("unk_token_id", "bos_token_id", "eos_token_id", "pad_token_id"):  # the last named wins
            mine, other = getattr(receiver, role), getattr(sharer, role)
            if role == "pad_token_id":
                mine = receiver.eos_token_id if mine is None else mine
                other = sharer.eos_token_id if other is None else other
            if mine == token:
                if other is not None:
                    return other
                break
        vocabulary = sharer.get_vocab()
        return vocabulary.get(text, unknown)
    pieces = sharer.encode(text, add_special_tokens=False)
    if not pieces:
        return unknown
    if strategy == "first":
        return pieces[0]
    best = pieces[0]
    for piece in pieces[1:]:
        length = len(sharer.decode([piece], clean_up_tokenization_spaces=False))
        if length > len(sharer.decode([best], clean_up_tokenization_spaces=False)):
            best = piece
    return best


def sections(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], prefix: str, kwargs: dict[str, Any]
) -> tuple[list[int], list[Section]]:
    """Contents are searched for from the left: followed by "<" or the text's end, or else wherever they are next."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs) + prefix
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    cuts: list[Section] = []
    at = done = 0
    for content in [m["content"] for m in messages] + ([prefix] if prefix else []):
        found = [i for i in range(at, len(text)) if text.startswith(content, i)]
        good = [i for i in found if text[i + len(content) : i + len(content) + 1] in ("<", "")]
        at = (good or found)[0]
        inside = [i for i, (a, b) in enumerate(spans) if b > at and a < at + len(content)]
        if inside[0] > done:
            cuts.append((False, done, inside[0]))
        done = inside[-1] + 1
        cuts.append((True, inside[0], done))
        at += len(content)
    if done < len(ids):
        cuts.append((False, done, len(ids)))
    return ids, cuts


def padded(
    receiver: PreTrainedTokenizerBase,
    sharer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    strategy: str,
    prefix: str = "",
    **kwargs: Any,
) -> tuple[list[int | None], list[int | None], list[bool]]:
    """Both rows of equal length (None: padding) and which positions are fused."""
    ours, mine = sections(receiver, messages, prefix, kwargs)
    theirs, other = sections(sharer, messages, prefix, kwargs)
    assert [s[0] for s in mine] == [s[0] for s in other]
    left: list[int | None] = []
    right: list[int | None] = []
    fused: list[bool] = []
    for n, ((message, a, b), (_, c, d)) in enumerate(zip(mine, other, strict=True)):
        x: list[int | None] = list(ours[a:b])
        if message:
            y: list[int | None] = [one_token(receiver, sharer, token, strategy) for token in ours[a:b]]
        else:
            y = list(theirs[c:d])
            length = max(len(x), len(y))
            x, y = x + [None] * (length - len(x)), y + [None] * (length - len(y))
        left, right = left + x, right + y
        fused += [message and not (prefix and n == len(mine) - 1)] * len(x)  # the last section is never fused
    return left, right, fused
