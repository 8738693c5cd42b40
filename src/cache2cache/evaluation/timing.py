"""The clock: a few prompts, one by one, answered by every method in so many tokens, whatever it would have said.

Every answer is made as long as the longest of LENGTHS, so one pass times all of them. Methods take turns prompt by
prompt, as a machine's speed may change in between. Memory is that of the models that a method needs, plus the most that
was added to it while it ran.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from .. import decode
from ..errors import C2CError
from ..heap import Peak
from ..kv import Prefilled, prefill_prompts
from ..methods.text_to_text import FORMS, MAX_MESSAGE_TOKENS
from ..models.load import LM
from ..pair import C2C
from ..response import answered_from, fused_sharers
from .asking import Case, fitting
from .writing import add_rows, read_rows, write

LENGTHS = (8, 64, 256)
TIMED = ("receiver", "sharer", *FORMS, "c2c")


@dataclass(frozen=True)
class Timed:
    """One answer on the clock, which starts before the prompt is tokenized.

    Attributes:
        first_token_s: until the first token.
        seconds: until the last one, by the length of the answer.
        bytes_passed: from the sharer to the receiver.
        message_tokens: that the sharer wrote.
        memory: bytes; None where the system doesn't say.
    """

    task: str
    id: str
    method: str
    first_token_s: float
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_passed: int = 0
    message_tokens: int = 0
    memory: int | None = None


def measure(
    pair: C2C,
    cases: Sequence[Case],
    methods: Sequence[str],
    path: Path,
    progress: Callable[[int], None] = lambda prompts: None,
) -> list[Timed]:
    """Time what `methods` have of TIMED on every case that fits; what stands in the file is not timed again."""
    done = [t for t in read_rows(path, Timed) if (t.task, t.id) in {(c.task, c.id) for c in cases}]
    have = {(t.task, t.id, t.method) for t in done}
    chosen = [m for m in TIMED if m in methods]
    todo = [(c, m) for c in cases for m in chosen if (c.task, c.id, m) not in have]
    warm: set[str] = set()
    for case, method in todo:
        try:
            if method not in warm:  # the first prompt pays for threads and buffers
                _timed(pair, case, method, 2)
                warm.add(method)
            found = _timed(pair, case, method, max(LENGTHS))
        except C2CError:  # prompt and answer don't fit the context: no time, but no end of the run either
            continue
        finally:
            progress(1)
        add_rows(path, [found])
        done.append(found)
    return [t for t in done if t.method in chosen]


def _timed(pair: C2C, case: Case, method: str, new_tokens: int) -> Timed:
    chat = case.ask.chat()
    lm = pair.sharers[0] if method == "sharer" else pair.receiver
    passed = message_tokens = 0
    memory = Peak()
    began = time.perf_counter()
    prompt: Prefilled
    if method == "c2c":
        fused = pair.prefill(chat, keep=bool(fused_sharers(pair)))
        prompt = answered_from(pair, fused)
        passed = fused.bytes_passed
    elif method in FORMS:
        told = [{"role": "user", "content": FORMS[method](case.ask)}]
        words = write(pair.sharers[0], [pair.rendered(pair.sharers[0], told).ids], MAX_MESSAGE_TOKENS)[0]
        passed, message_tokens = len(words.text.encode()), len(words.ids)
        prompt = prefill_prompts(lm, [pair.rendered(lm, fitting(pair, case, method, words.text)).ids])
    else:
        prompt = prefill_prompts(lm, [pair.rendered(lm, chat).ids])
    decode.check_room(lm, prompt.input_ids.shape[1], 1)
    room = min(new_tokens, lm.context_length - prompt.input_ids.shape[1])
    chunks = decode.stream(lm, prompt, do_sample=False, max_new_tokens=room, min_new_tokens=room)
    times = [time.perf_counter() - began for chunk in chunks if chunk.token is not None]
    models = [lm] if method in ("receiver", "sharer") else [pair.receiver, *pair.sharers]
    extra = memory.bytes()
    return Timed(
        case.task, case.id, method, round(times[0], 5),
        {str(n): round(times[n - 1], 5) for n in LENGTHS if n <= len(times)}, passed, message_tokens,
        None if extra is None else extra + sum(map(_weights, {id(m): m for m in models}.values())),
    )  # fmt: skip


def _weights(lm: LM) -> int:
    return sum(p.nbytes for p in {p.data_ptr(): p for p in lm.model.parameters()}.values())


def summarize(rows: Sequence[Timed]) -> dict[str, Any]:
    """Per method median and 95th percentile of the times, and medians of what passed; and from which answer length on
    C2C is cheaper than the sharer alone."""
    result: dict[str, Any] = {}
    for method in dict.fromkeys(t.method for t in rows):
        own = [t for t in rows if t.method == method]
        lengths = [str(n) for n in LENGTHS if all(str(n) in t.seconds for t in own)]
        memory = [t.memory for t in own if t.memory is not None]
        result[method] = {
            "prompts": len(own),
            "first_token": _spread([t.first_token_s for t in own]),
            "seconds": {n: _spread([t.seconds[n] for t in own]) for n in lengths},
            "bytes_passed": median(t.bytes_passed for t in own),
            "message_tokens": median(t.message_tokens for t in own),
            "memory": max(memory) if memory else None,
        }
    if {"c2c", "sharer"} <= result.keys():
        result["cheaper_from"] = cheaper_from(result["c2c"], result["sharer"])
    return result


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    p95 = quantiles(seconds, n=20, method="inclusive")[-1] if len(seconds) > 1 else seconds[0]
    return {"median": round(median(seconds), 4), "p95": round(p95, 4)}


def line_of_times(timed: dict[str, Any]) -> tuple[float, float]:
    """Seconds to the first token and for each further one, as a line through the medians of the shortest and the
    longest answer."""
    known = [(1, timed["first_token"]["median"]), *((int(n), s["median"]) for n, s in timed["seconds"].items())]
    (low, first), (high, last) = known[1 if len(known) > 2 else 0], known[-1]
    step = (last - first) / (high - low) if high > low else 0.0
    return first - (low - 1) * step, step


def cheaper_from(c2c: dict[str, Any], sharer: dict[str, Any]) -> int | None:
    """The number of tokens from which on an answer of C2C takes less time than the sharer's; None: there is none, be it
    that only shorter answers do."""
    (mine, my_step), (theirs, their_step) = line_of_times(c2c), line_of_times(sharer)
    if mine <= theirs and my_step <= their_step:
        return 1
    if my_step >= their_step:
        return None
    return max(1, int((mine - theirs) / (their_step - my_step)) + 2)
