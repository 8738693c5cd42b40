"""Which positions of a prompt are fused: a choice on top of the token map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cache2cache.alignment.chat import Rendered
from cache2cache.errors import C2CError, short

if TYPE_CHECKING:
    from cache2cache.pair import PromptIds

Positions = str | Sequence[bool] | Tensor


def content_tokens(rendered: Rendered) -> list[bool]:
    """(T,): whether a token holds characters of a message's content (or of the answer's start)."""
    inside, segments = [], iter(sorted(rendered.segments, key=lambda segment: segment.start))
    segment = next(segments, None)
    for start, end in rendered.offsets:
        while segment is not None and segment.end <= start:
            segment = next(segments, None)
        inside.append(segment is not None and start < end and segment.start < end)
    return inside


def fusable(batch: Sequence[PromptIds], positions: Positions | Sequence[Positions]) -> list[list[bool]]:
    """Per prompt (T,): which positions may be fused. The last one never is, whatever stands there.

    Args:
        batch: the prompts.
        positions: for all prompts or one each: "all", "content", "front:SHARE", "back:SHARE", or (T,) bools.
    """
    several = isinstance(positions, (Sequence, Tensor)) and not isinstance(positions, str)
    one_each = several and len(positions) > 0 and _is_choice(positions[0])
    choices: Sequence[Any] = positions if one_each else [positions] * len(batch)  # type: ignore[assignment]
    if len(choices) != len(batch):
        raise C2CError(
            f"{len(choices)} choices of positions were given for {len(batch)} prompts; give one, or one each"
        )
    return [_choice(prompt, choice) for prompt, choice in zip(batch, choices, strict=True)]


def _is_choice(item: Any) -> bool:
    """Whether an item of a list is a choice of its own, and not one bool of a single choice."""
    return item.dim() > 0 if isinstance(item, Tensor) else isinstance(item, (str, Sequence))


def _choice(prompt: PromptIds, choice: Positions) -> list[bool]:
    length = len(prompt.receiver)
    if not isinstance(choice, str):
        given = choice.tolist() if hasattr(choice, "tolist") else choice
        if not isinstance(given, Sequence) or any(x not in (0, 1) for x in given):
            raise C2CError(f"positions are all, content, front:SHARE, back:SHARE or bools, not {short(str(choice))}")
        allowed = [bool(x) for x in given]
        if len(allowed) != length:
            raise C2CError(f"a choice of {len(allowed)} positions was given for a prompt of {length} receiver tokens")
        return allowed
    if choice == "all":
        return [True] * length
    if choice == "content":
        if len(prompt.content) != length:
            raise C2CError(
                'positions "content" need a prompt given as text or messages, or PromptIds with content; token ids '
                "don't tell what is template"
            )
        return list(prompt.content)
    side, _, share = choice.partition(":")
    try:
        count = round(float(share) * (length - 1))
    except (ValueError, OverflowError):
        count = -1
    if side not in ("front", "back") or not 0 <= count <= length - 1:
        raise C2CError(
            f"unknown choice of positions {choice!r}; expected all, content, front:SHARE or back:SHARE with a share "
            "from 0 to 1, or bools"
        )
    return [(t < count if side == "front" else t >= length - 1 - count) for t in range(length)]
