"""How one model reads a prompt: its chat template, its tokens, and where every message lies in the text.

Every model of a pair reads the same chat in its own words: its own template, its own natural tokenization. What lets
their tokens be matched afterwards (`alignment.tokens`) is kept beside the ids: the character span of every token and
the character range of every message.
"""

from __future__ import annotations

import re
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from cache2cache.errors import C2CError, short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For models that come without a chat template, such as base models. Every role stands on a line of its own, so that
# the start of an answer meets a line break and is cut into tokens as it would be later in the chat.
PLAIN_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
PREFIX = "prefix"
_LINE = "\n"  # what no tokenizer joins with letters or a space behind it
_SLICE, _CUT = 1 << 16, 64  # characters that are counted in tokens at a time, and tokens that a cut may add to that
_PRIVATE_USE = range(0xF0000, 0x10FFFE)  # characters that no template looks at


@dataclass(frozen=True)
class Segment:
    """Characters [start, end) of a rendered text that are the content of message `key` (or of the answer's start).

    `key` is the message's index in the prompt, or "prefix": the same content has the same key for every model.
    """

    start: int
    end: int
    key: int | str


@dataclass(frozen=True)
class Rendered:
    """A prompt as one model reads it.

    `offsets[i]` is the character span of token i in `text`. The spans of a normal text tile it; the byte pieces of one
    character share its span, and a special token that the tokenizer adds without text has an empty span.
    `segments` are the message contents in the order of the text; a content that the template left out has none.
    """

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    segments: list[Segment]


@dataclass(frozen=True)
class _Turn:
    """One message to be rendered: its role, and its content in parts, each with the key of where it came from."""

    role: str
    parts: tuple[tuple[int | None, str], ...]


NO_THINKING = {"enable_thinking": False}  # for chat templates, those that know of it
# What is trained on and measured reads the same tomorrow: templates that write the date write this one.
FROZEN = {**NO_THINKING, "today": "2024-07-26"}


def render(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Mapping[str, str]],
    *,
    prefix: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Rendered:
    """Render a prompt with the model's own template and tokenize it as the model's tokenizer naturally does.

    `prompt` is a list of {"role", "content"} messages, or plain text, which gets the tokenizer's own special tokens
    and no template. `prefix` is the start of the answer. `chat_template_kwargs` go to the template, but for `today`: a
    date such as "2024-07-26", for templates that write the current one (`strftime_now`). Control tokens spelled out in
    a message are read as plain text, with a warning. Raises C2CError for an empty or malformed prompt, a tokenizer
    without character offsets, and messages that the template refuses.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise C2CError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which can't tell where its tokens lie in the text; "
            "load the model's fast tokenizer (a tokenizer.json)"
        )
    if isinstance(prompt, str):
        if not prompt:
            raise C2CError("the prompt is empty; give some text or at least one message")
        text, segments, roles = prompt, [Segment(0, len(prompt), 0)], ["text"]
        control = _control_tokens(tokenizer, tokenizer.chat_template)
    else:
        turns = _turns(prompt)
        roles = [turn.role for turn in turns]
        template, text, segments = _render_chat(tokenizer, turns, dict(chat_template_kwargs or {}))
        control = _control_tokens(tokenizer, template)
        _warn_unlocated(text, segments, turns, control)
    if prefix:
        segments.append(Segment(len(text), len(text) + len(prefix), PREFIX))
    text += prefix
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise C2CError(
            f"the prompt is no valid text: behind {text[max(0, error.start - 20) : error.start]!r} stands a byte, or "
            "half a character, that isn't UTF-8; save or send it as UTF-8"
        ) from error
    ids, offsets = _encode(tokenizer, text, segments, roles, control, plain=isinstance(prompt, str))
    if not ids:
        raise C2CError(f"the prompt {text!r} gives no tokens; give some text or at least one message")
    return Rendered(text, ids, offsets, segments)


def answer_ids(tokenizer: PreTrainedTokenizerBase, text: str, prefix: str = "") -> list[int]:
    """An answer's tokens behind a prompt, or behind the start of an answer, just as they are in the whole text. Control
    tokens spelled out in it are read as text, with a warning."""
    turn = _turn_of(tokenizer)
    return _behind(tokenizer, turn.tail + prefix, "" if prefix else turn.lead, text)


def continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text behind any other, without the space that some tokenizers put before a text. Control tokens
    spelled out in it are read as text, with a warning."""
    return _behind(tokenizer, _LINE if begins_with_a_space(tokenizer) else "", "", text)


def _behind(tokenizer: PreTrainedTokenizerBase, asked: str, lead: str, text: str) -> list[int]:
    """The tokens of `lead` and an answer behind what was asked, or of the answer alone where a token joins them."""

    def encode(front: str, answer: str) -> list[int]:
        segments = [Segment(len(front), len(front + answer), PREFIX)] * bool(answer)
        return _encode(tokenizer, front + answer, segments, [], control, plain=False)[0]

    if not text:
        return []
    control = _control_tokens(tokenizer, tokenizer.chat_template)
    known, ids = encode(asked, "") if asked else [], encode(asked + lead, text)
    return ids[len(known) :] if ids[: len(known)] == known else encode("", text)


def begins_with_a_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a space before each text, as SentencePiece's do: none belongs behind another."""
    return _turn_of(tokenizer).begins_with_a_space


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends an assistant's turn: the control token that the chat template writes behind its content, or,
    without a template that does, the one that ends a text. None: there is neither."""
    return _turn_of(tokenizer).end


@dataclass(frozen=True)
class _AnswersTurn:
    """How a tokenizer and its chat template write an assistant's turn.

    Attributes:
        tail: the end of a prompt, from its last control token on.
        lead: what stands between a prompt and an answer.
        end: see `end_of_turn`.
    """

    tail: str
    lead: str
    end: int | None
    begins_with_a_space: bool


_turns_of: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, _AnswersTurn]] = WeakKeyDictionary()


def _turn_of(tokenizer: PreTrainedTokenizerBase) -> _AnswersTurn:
    state = len(tokenizer), tokenizer.eos_token_id, tokenizer.chat_template
    known = _turns_of.get(tokenizer)
    if known is None or known[0] != state:
        _turns_of[tokenizer] = known = state, _read_turn(tokenizer)
    return known[1]


def _read_turn(tokenizer: PreTrainedTokenizerBase) -> _AnswersTurn:
    def plain(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    space = plain(_LINE + "A") != plain(_LINE) + plain("A")
    turns = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes"}]
    template = tokenizer.chat_template or PLAIN_TEMPLATE
    settings: dict[str, Any] = {"tokenize": False, "chat_template": template, **NO_THINKING}
    try:
        asked = str(tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, **settings))
        whole = str(tokenizer.apply_chat_template(turns, **settings))
        read = tokenizer(asked, add_special_tokens=False, return_offsets_mapping=True)
    except Exception:  # whatever a template may raise, and tokenizers that are refused once text is to be read
        return _AnswersTurn("", "", tokenizer.eos_token_id, space)
    control = _control_tokens(tokenizer, template)
    spans = zip(read["input_ids"], read["offset_mapping"], strict=True)
    last = (start for i, (start, _) in spans if i in control.every)
    tail = asked[max(last, default=asked.rfind("Well?") + len("Well?")) :]
    lead = whole[len(asked) :].partition("Yes")[0] if whole.startswith(asked) else ""
    behind = plain(whole.rpartition("Yes")[2].lstrip()) if tokenizer.chat_template else []
    end = behind[0] if behind and behind[0] in control.every else tokenizer.eos_token_id
    return _AnswersTurn(tail, lead, end, space)


def least_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Mapping[str, str]],
    most: int,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> int:
    """So many tokens a prompt has at least, counted until there are more than `most`: far cheaper than `render`.

    The text is cut into slices. A cut changes how the word that it is in is read and nothing beyond, so of each slice a
    few tokens don't count. Raises C2CError as `render` does.
    """
    text = prompt
    if not isinstance(text, str):
        _, text, _ = _render_chat(tokenizer, _turns(prompt), dict(chat_template_kwargs or {}))
    count = 0
    for begin in range(0, len(text), _SLICE):
        ids = tokenizer(text[begin : begin + _SLICE], add_special_tokens=False, verbose=False)["input_ids"]
        count += max(0, len(ids) - _CUT)
        if count > most:
            break
    return count


def common_prefix(a: str, b: str) -> int:
    """How many characters `a` and `b` share at their start."""
    if a.startswith(b) or b.startswith(a):
        return min(len(a), len(b))
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def common_suffix(a: str, b: str) -> int:
    """How many characters `a` and `b` share at their end."""
    return common_prefix(a[::-1], b[::-1])


# The chat as text


def _turns(messages: Any) -> list[_Turn]:
    """Check the messages' shape, so that no template meets anything else."""
    if isinstance(messages, Mapping) or not isinstance(messages, Sequence):
        raise C2CError(f"a prompt is text or a list of messages, not {type(messages).__name__}")
    turns = []
    for i, message in enumerate(messages):
        name = f"message {i + 1}"
        if not isinstance(message, Mapping):
            raise C2CError(f'{name} is {type(message).__name__}; expected {{"role": …, "content": …}}')
        if set(message) != {"role", "content"}:
            given = ", ".join(map(str, message)) or "nothing"
            raise C2CError(f"{name} has {given}; expected exactly role and content")
        for field in ("role", "content"):
            if not isinstance(message[field], str):
                kind = type(message[field]).__name__
                raise C2CError(f"the {field} of {name} is {kind}; expected text")
        turns.append(_Turn(message["role"], ((i, message["content"]),)))
    if not any(content.strip() for turn in turns for _, content in turn.parts):
        raise C2CError("the prompt is empty; give some text or at least one message")
    return turns


def _render_chat(
    tokenizer: PreTrainedTokenizerBase, turns: list[_Turn], kwargs: dict[str, Any]
) -> tuple[str, str, list[Segment]]:
    """The template's source, the rendered chat and its segments."""
    from jinja2 import TemplateError

    if reserved := {"tokenize", "add_generation_prompt", "continue_final_message", "return_dict"} & set(kwargs):
        raise C2CError(f"chat_template_kwargs holds {', '.join(sorted(reserved))}, which is not free; leave it out")
    if not tokenizer.chat_template:
        kwargs.setdefault("chat_template", PLAIN_TEMPLATE)
    today = kwargs.pop("today", None)

    def apply(turns: Iterable[_Turn]) -> str:
        messages = [{"role": turn.role, "content": "".join(text for _, text in turn.parts)} for turn in turns]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs))

    try:
        template = tokenizer.get_chat_template(kwargs.get("chat_template"), kwargs.get("tools"))
        if today is not None:
            kwargs["chat_template"] = _dated(template, today)
        try:
            text = apply(turns)
        except TemplateError:
            if turns[0].role != "system":
                raise
            turns = _fold_system(turns)  # some templates know no system role
            text = apply(turns)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        roles = ", ".join(turn.role for turn in turns)
        reason = " ".join(str(error).split())
        raise C2CError(
            f"the model's chat template refused messages of the roles {roles}: {reason}; "
            "give messages as it expects them, or plain text"
        ) from error
    return template, text, _locate(text, turns, apply)


def _dated(template: str, today: Any) -> str:
    """A template for which the current date is `today`."""
    try:
        day = date.fromisoformat(today)
    except (TypeError, ValueError) as error:
        raise C2CError(f"chat_template_kwargs: today is {short(today)}; expected a date such as 2024-07-26") from error
    if "strftime_now" not in template:
        return template
    formats = {found[1] for found in re.findall(r"strftime_now\(\s*(['\"])(.*?)\1", template)}
    known = "".join(f"{form!r}: {day.strftime(form)!r}, " for form in sorted(formats))
    # A format that doesn't stand there as text gets the date as `today` has it. The line break is taken away again
    # behind a block, as transformers renders templates.
    return (
        f"{{%- macro strftime_now(format) -%}}{{{{ {{{known}}}.get(format, {day.isoformat()!r}) }}}}{{%- endmacro %}}\n"
        + template
    )


def _fold_system(turns: list[_Turn]) -> list[_Turn]:
    """Put the system message in front of the first user message, or make it one."""
    system, rest = turns[0], turns[1:]
    if rest and rest[0].role == "user":
        return [_Turn("user", (*system.parts, (None, "\n\n"), *rest[0].parts)), *rest[1:]]
    return [_Turn("user", system.parts), *rest]


def _locate(text: str, turns: list[_Turn], apply: Callable[[Iterable[_Turn]], str]) -> list[Segment]:
    """Where each content lies in the rendered text.

    Templates trim contents, drop parts of them, move them and add messages of their own, so searching for them could
    hit the wrong place. Instead the chat is rendered again with a marker inside every content; if taking the markers
    out gives the text back, their places are exact, and the content is what agrees around them. A content whose
    marker never shows up so has no segment.
    """
    opening, closing = islice((chr(code) for code in _PRIVATE_USE if chr(code) not in text), 2)
    pattern = re.compile(f"{opening}([0-9]+){closing}")
    contents = {key: part for turn in turns for key, part in turn.parts if key is not None and part.strip()}

    def probe(keys: Iterable[int], place: float) -> dict[int, tuple[int, int]]:
        """Per key that was found: the place of its marker in the text and in the content."""
        inside = {}
        for key in keys:
            first = len(contents[key]) - len(contents[key].lstrip())
            inside[key] = first + int(place * (len(contents[key].strip()) - 1))

        def marked(key: int | None, part: str) -> str:
            return f"{part[: inside[key]]}{opening}{key}{closing}{part[inside[key] :]}" if key in inside else part

        try:
            seen = apply(_Turn(turn.role, tuple((k, marked(k, p)) for k, p in turn.parts)) for turn in turns)
        except Exception:  # a template may refuse what it would take without the marker
            return {}
        if pattern.sub("", seen) != text:
            return {}
        found: dict[int, list[int]] = {}
        removed = 0
        for match in pattern.finditer(seen):
            found.setdefault(int(match[1]), []).append(match.start() - removed)
            removed += len(match[0])
        return {key: (places[0], inside[key]) for key, places in found.items() if len(places) == 1}

    found: dict[int, tuple[int, int]] = {}
    places = (1.0, 0.5, 0.0)  # the last character first: what templates drop is the beginning (earlier reasoning)
    for place in places:
        if missing := contents.keys() - found.keys():
            found |= probe(missing, place)
    for key in contents.keys() - found.keys():  # one content that resists a marker hides the others
        for place in places:
            if key not in found:
                found |= probe([key], place)

    segments: list[Segment] = []
    for key in sorted(found, key=lambda key: found[key]):
        at, inside = found[key]
        content = contents[key]
        floor = segments[-1].end if segments else 0
        start = at - common_suffix(content[:inside], text[floor:at])
        end = at + common_prefix(content[inside:], text[at : at + len(content) - inside])
        if end - start < len(content):  # a line break of the template may look like one that was trimmed
            start += len(text[start:end]) - len(text[start:end].lstrip())
            end -= len(text[start:end]) - len(text[start:end].rstrip())
        if end > start:
            segments.append(Segment(start, end, key))
    return segments


# The text as tokens


@dataclass(frozen=True)
class _Control:
    """Added tokens that steer the model: id -> string.

    `special` are the tokenizer's special tokens; `used` are others that the chat template writes. The latter
    ("<think>", "<tool_call>") are a model's own words in its answers, but not in what it is told.
    """

    special: dict[int, str]
    used: dict[int, str]

    @cached_property
    def every(self) -> dict[int, str]:
        return self.special | self.used

    def forbidden(self, role: str) -> dict[int, str]:
        """What must not become a control token in a content of this role."""
        return self.special if role == "assistant" else self.every


# Of each tokenizer what came out, and for how many tokens: Gemma has 6,000 added ones, and every prompt asks.
_known: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple[int, int, Any], _Control]] = WeakKeyDictionary()


def _control_tokens(tokenizer: PreTrainedTokenizerBase, template: Any) -> _Control:
    state = len(tokenizer), len(tokenizer.all_special_tokens), template
    known = _known.get(tokenizer)
    if known is None or known[0] != state:
        _known[tokenizer] = known = state, _read_control_tokens(tokenizer, template)
    return known[1]


def _read_control_tokens(tokenizer: PreTrainedTokenizerBase, template: Any) -> _Control:
    added = {i: (token.content, token.special) for i, token in tokenizer.added_tokens_decoder.items()}
    special = {i: content for i, (content, is_special) in added.items() if is_special}
    written = template if isinstance(template, str) else ""
    used = {i: content for i, (content, _) in added.items() if content.strip() and content in written}
    return _Control(special, {i: content for i, content in used.items() if i not in special})


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    segments: list[Segment],
    roles: list[str],
    control: _Control,
    *,
    plain: bool,
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and character spans, with control tokens inside contents read as plain text.

    The text is cut only where the tokenizer itself has cut out the control token, so everything around it is
    tokenized as ever.
    """

    def natural(piece: str, add_special_tokens: bool) -> Any:
        return tokenizer(
            piece,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            padding=False,
            truncation=False,
            verbose=False,
        )

    def read(piece: str, as_text: bool) -> tuple[list[int], list[tuple[int, int]]]:
        if as_text:
            return _encode_as_text(tokenizer, piece, control)
        encoding = natural(piece, False)
        return list(encoding["input_ids"]), list(encoding["offset_mapping"])

    def encode(start: int, end: int, as_text: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """A piece of the text."""
        line = _LINE if start and begins_with_a_space(tokenizer) else ""  # or it would put one before each piece
        known, (ids, spans) = read(line, as_text)[0] if line else [], read(line + text[start:end], as_text)
        if ids[: len(known)] != known:
            line, known, (ids, spans) = "", [], read(text[start:end], as_text)
        shift = start - len(line)
        return ids[len(known) :], [(shift + a, shift + b) for a, b in spans[len(known) :]]

    def intrusions(ids: list[int], spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Spans of the control tokens that overlap a content."""
        hits = []
        for token, (start, end) in zip(ids, spans, strict=True):
            if start < end and (token in control.special or token in control.used):
                # Some take the blanks beside them too, which may be a content's.
                own = text.find(control.every[token], start, end)
                low, high = (own, own + len(control.every[token])) if own >= 0 else (start, end)
                for segment in segments[bisect_right(ends, low) : bisect_left(starts, high)]:
                    role = "assistant" if segment.key == PREFIX else roles[int(segment.key)]
                    string = control.forbidden(role).get(token)
                    if string is None:
                        continue
                    if token == tokenizer.unk_token_id and string not in text[start:end]:
                        continue  # an unknown word
                    hits.append((start, end))
                    _warn(string, _place(segment.key, role, plain), "it is read as plain text")
                    break
        return hits

    # Segments are in order and don't overlap: a chat of many messages has as many control tokens around them.
    starts, ends = [segment.start for segment in segments], [segment.end for segment in segments]
    encoding = natural(text, plain)
    ids, spans = list(encoding["input_ids"]), list(encoding["offset_mapping"])
    if hits := intrusions(ids, spans):
        # What the tokenizer puts before and behind a plain text stays; the text between is encoded in pieces.
        body = [i for i, added in enumerate(encoding["special_tokens_mask"]) if not added]
        head, tail = ids[: body[0]], ids[body[-1] + 1 :]
        ids, spans = list(head), [(0, 0)] * len(head)
        todo = _cut(0, len(text), hits)[::-1]
        while todo:
            start, end, as_text = todo.pop()
            piece_ids, piece_spans = encode(start, end, as_text)
            if not as_text and (hits := intrusions(piece_ids, piece_spans)):
                todo += _cut(start, end, hits)[::-1]
            else:
                ids += piece_ids
                spans += piece_spans
        ids += tail
        spans += [(len(text), len(text))] * len(tail)
    return ids, _close_gaps(tokenizer, text, ids, spans)


def _cut(start: int, end: int, hits: list[tuple[int, int]]) -> list[tuple[int, int, bool]]:
    """The pieces of [start, end): those that are hits, with True, and those between them."""
    places = [start, *(place for hit in hits for place in hit), end]
    return [(a, b, i % 2 == 1) for i, (a, b) in enumerate(pairwise(places)) if a < b]


def _encode_as_text(
    tokenizer: PreTrainedTokenizerBase, text: str, control: _Control
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenize text without looking for added tokens in it."""
    from tokenizers import Tokenizer

    # A tokenizer over the same model, but without the added tokens: cheap, and the shared one stays as it is.
    shared = tokenizer.backend_tokenizer
    plain = Tokenizer(shared.model)
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(shared, part) is not None:
            setattr(plain, part, getattr(shared, part))
    unwanted = (control.special.keys() | control.used.keys()) - {tokenizer.unk_token_id}
    # Some models would still join the whole string to the control token; a cut inside prevents that.
    for cut in (0, 1):
        pieces = [(0, text[:cut]), (cut, text[cut:])]
        encodings = [(shift, plain.encode(piece, add_special_tokens=False)) for shift, piece in pieces if piece]
        ids = [i for _, encoding in encodings for i in encoding.ids]
        if not unwanted.intersection(ids):
            return ids, [(shift + a, shift + b) for shift, encoding in encodings for a, b in encoding.offsets]
    raise C2CError(f"the tokenizer can't read {text!r} as anything but a control token; take it out of the messages")


def _warn_unlocated(text: str, segments: list[Segment], turns: list[_Turn], control: _Control) -> None:
    """Warn of control tokens in contents whose place in the text is not known, so that they can't be kept apart."""
    located = {segment.key: text[segment.start : segment.end] for segment in segments}
    for turn in turns:
        for key, content in turn.parts:
            rest = content.replace(located.get(key, ""), "", 1) if key is not None else ""
            if rest.strip():
                for string in control.forbidden(turn.role).values():
                    if string in rest and string in text:
                        _warn(string, _place(key, turn.role, False), "it may be read as one; take it out")


def _place(key: int | str | None, role: str, plain: bool) -> str:
    if key == PREFIX:
        return "the start of the answer"
    return "the prompt" if plain or not isinstance(key, int) else f"message {key + 1} ({role})"


def _warn(string: str, place: str, what: str) -> None:
    hint = "token ids may hold control tokens, text may not"
    warnings.warn(f"{string!r} in {place} is a control token of this model; {what} ({hint})", stacklevel=2)


def _close_gaps(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], offsets: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Give characters that no span covers to the token that they were read into.

    Byte-level tokenizers may trim spaces off their spans, on both sides; normalizers join characters (an "e" and its
    accent) and report the first.
    """
    closed = list(offsets)
    reached, last = 0, -1  # the text is covered up to here, by this token
    for i, (start, end) in enumerate(offsets):
        if start == end and not text[reached:end].isspace():  # no text of its own: a special token
            closed[i] = (reached, reached)
            continue
        if start > reached:
            cut = reached
            if last >= 0:
                token = str(tokenizer.convert_ids_to_tokens(ids[last]))
                if spaces := token.strip("Ġ") and len(token) - len(token.rstrip("Ġ")):
                    cut = min(reached + spaces, start)
                cut = max(cut, reached + len(text[reached:start].rstrip()))
                closed[last] = (closed[last][0], max(closed[last][1], cut))
            closed[i] = (cut, end)
        if end >= reached:
            reached, last = end, i
    if last >= 0 and reached < len(text):
        closed[last] = (closed[last][0], len(text))
    return closed
