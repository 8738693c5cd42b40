"""What the benchmarks share: a clock for several quantities at once, the matrix rate, peak memory, prompts of a length.

A time says little on a machine that others use too, so everything is reported as a ratio of two quantities that took
turns in the same run.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import random
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cache2cache.alignment.chat import render
from cache2cache.errors import C2CError
from cache2cache.heap import Peak
from cache2cache.models.load import LM

# ---- the clock -------------------------------------------------------------------------------------------------------


clock: Callable[[], float] = time.perf_counter


def now() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock()


def take_turns(
    quantities: Mapping[str, Callable[[], Mapping[str, float] | None]], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of every quantity, round after round, all of them in every round.

    A quantity may return further times of its own, by name. No round begins after `seconds`. The first one warms up and
    isn't kept, unless it alone takes half of that time.
    """
    times: dict[str, list[float]] = {}
    began = now()
    for number in range(rounds + 1):
        spent = now() - began
        if number and spent > seconds:
            break
        if number == 1 and spent < seconds / 2:
            times = {}
        for name, run in quantities.items():
            start = now()
            further = run()
            times.setdefault(name, []).append(now() - start)
            for key, value in (further or {}).items():
                times.setdefault(key, []).append(value)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: median(values) for name, values in times.items()}


# ---- the machine -----------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What a reader needs to know about where this ran."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        except (OSError, StopIteration):
            name = platform.processor() or platform.machine()
    import transformers

    return {
        "processor": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def product(batch: int, rows: int, inner: int, columns: int, like: Tensor) -> tuple[Callable[[], None], float]:
    """A batched matrix product (batch, rows, inner) x (batch, inner, columns) to be timed, and its operations."""
    a, b = like.new_empty(batch, rows, inner).normal_(), like.new_empty(batch, inner, columns).normal_()
    if batch == 1:
        a, b = a[0], b[0]
    out = a @ b

    def run() -> None:
        torch.matmul(a, b, out=out)

    return run, 2.0 * batch * rows * inner * columns


def pass_operations(lm: LM, rows: list[int], num_layers: int) -> float:
    """Additions and multiplications of reading `rows` tokens each through the lowest `num_layers` layers.

    Every weight of a layer once per token, and causal attention; no embedding, no LM head.
    """
    layers: Any = lm.decoder.layers
    weights = sum(p.numel() for layer in list(layers)[:num_layers] for p in layer.parameters())
    width = lm.text_config.num_attention_heads * lm.head_dim
    return sum(2.0 * weights * n + num_layers * 2.0 * width * n * n for n in rows)


def prefill_operations(lm: LM, rows: list[int], num_layers: int) -> float:
    """Those of filling a cache: of the highest layer nothing but its keys and values is needed."""
    projections = 2 * lm.text_config.hidden_size * lm.num_kv_heads * lm.head_dim
    return pass_operations(lm, rows, num_layers - 1) + 2.0 * projections * sum(rows)


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak_rise(run: Callable[[], Any]) -> int | None:
    """By how many bytes memory rose at its peak while `run` ran, see `heap.Peak`; None where this can't be told.

    What earlier work left unused in the heap is handed back first: free pages would count as used before, and the rise
    as smaller.
    """
    gc.collect()
    if not torch.cuda.is_available():
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc
    peak = Peak()
    run()
    return peak.bytes()


# ---- prompts ---------------------------------------------------------------------------------------------------------

_NOUNS = "river|bridge|teacher|magnet|kettle|orchard|signal|engine|harbour|violin|glacier|market|lantern|compass"
_VERBS = "carries|follows|repairs|measures|heats|reaches|describes|crosses|lifts|remembers|replaces|surprises"
_PLACES = "in the valley|near the old station|behind the school|at 7:45 in the morning|on the 3rd floor|by the sea"
_CHINESE = "水在加热时会沸腾变成水蒸气|磁铁能吸引铁制的物体|植物需要阳光才能生长|老师在河边讲了一个故事"


def _pick(draw: random.Random, words: str) -> str:
    return draw.choice(words.split("|"))


def _prose(draw: random.Random) -> Iterator[str]:
    while True:
        subject, verb, thing, place = (_pick(draw, words) for words in (_NOUNS, _VERBS, _NOUNS, _PLACES))
        yield f"The {subject} {verb} the {thing} {place}. "


def _code(draw: random.Random) -> Iterator[str]:
    while True:
        name = _pick(draw, _NOUNS)
        yield f"def {name}_{draw.randrange(90)}(x, y={draw.random():.3f}):\n    return {{'{name}': x ** 2 - y}}\n\n"


def _chinese(draw: random.Random) -> Iterator[str]:
    while True:
        yield _pick(draw, _CHINESE) + draw.choice("。!?😀")


# Per kind: what stands before the last message, and what that is made of.
KINDS: tuple[tuple[list[tuple[str, str]], Callable[[random.Random], Iterator[str]]], ...] = (
    ([], _prose),
    ([("system", "Answer in one word.")], _code),
    ([("user", "Hello!"), ("assistant", "Hello, how can I help?")], _prose),
    ([], _chinese),
)


def chat(tokenizer: PreTrainedTokenizerBase, kind: int, tokens: int, kwargs: Mapping[str, Any]) -> list[dict[str, str]]:
    """A chat that is exactly `tokens` long for the given tokenizer, template and all. Kinds of chat follow in a circle.

    Raises:
        C2CError: the template alone takes more, or the length can't be hit.
    """
    before, sentences = KINDS[kind % len(KINDS)]
    draw = sentences(random.Random(kind))
    text = ""
    while len(text) < 8 * tokens:  # no tokenizer here takes more characters than that to a token of such text
        text += next(draw)

    def made(characters: int, more: int = 0) -> list[dict[str, str]]:
        turns = [*before, ("user", text[:characters] + more * " a" + "?")]
        return [{"role": role, "content": content} for role, content in turns]

    def length(characters: int, more: int = 0) -> int:
        return len(render(tokenizer, made(characters, more), chat_template_kwargs=kwargs).ids)

    # The length grows with the characters, but may jump over the one that is asked for: then single words fill up.
    near = bisect_left(range(len(text)), tokens, key=length)
    for characters in range(near, max(-1, near - 20), -1):
        for more in range(9):
            if length(characters, more) == tokens:
                return made(characters, more)
    raise C2CError(f"no prompt of {tokens} tokens can be made: its template takes {length(0)}; give a larger length")
