"""How well a pair writes: bits per byte of reference responses, and what greedy answers look like.

Bits per byte are summed over a response's tokens, without the one that ends a turn, and divided by its length in UTF-8:
the same text for both models, whatever their tokenizers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..config import DataSource, TrainConfig
from ..decode import score
from ..errors import C2CError
from ..files import only_writer, replace_text
from ..fuser import checkpoint
from ..kv import Prefilled, prefill_prompts, prefilled
from ..pair import C2C, PromptIds
from ..progress import Bar
from ..response import answered_from, fused_sharers
from ..training.data import Example, draw, examples, row_name, split
from ..training.items import response_ids
from ..training.store import Store, check_room
from .answers import SETTINGS, SUMMARY
from .asking import plain
from .controls import beside_of, fuse_others, rows_of, sharer_cache
from .loading import claim, load_pair, open_store
from .runner import batches_of
from .statistics import bootstrap
from .writing import Written, add_rows, read_rows, write, write_on

SCORED = {
    "receiver": "receiver alone",
    "sharer": "sharer alone",
    "c2c": "C2C",
    "other": "C2C, another row's cache",
}
WRITERS = ("receiver", "c2c")


@dataclass(frozen=True)
class Scored:
    """How likely a row's response is for one method: `nll` in nats, over `tokens`, of a text of `bytes` bytes.

    `partner`: the row whose cache the control was given.
    """

    id: str
    method: str
    nll: float
    tokens: int
    bytes: int
    partner: str | None = None


@dataclass(frozen=True)
class Spoken:
    """One method's greedy answer to a row's prompt, and how it repeats itself.

    Attributes:
        tokens: without the one that ends the answer.
        ended: whether it came to an end by itself.
        distinct2, distinct3: different pairs (triples) of neighbouring tokens, as a share of all; None: there is none.
        repeated: share of the tokens that lie in a run of four that the answer holds more than once.
        longest_repeat: the most tokens in a row that do.
    """

    id: str
    method: str
    prompt: str
    text: str
    tokens: int
    ended: bool
    repeated: float
    longest_repeat: int
    distinct2: float | None = None
    distinct3: float | None = None


@dataclass(frozen=True)
class Case:
    """A row that is short enough, as token ids: prompt and response, in the receiver's and in the sharer's tokens."""

    example: Example
    prompt: PromptIds
    receiver: list[int]
    sharer: list[int]


def run(
    fuser: str | None,
    source: DataSource | TrainConfig,
    *,
    limit: int | None,
    generate: int,
    max_new_tokens: int,
    max_tokens: int,
    batch_size: int,
    receiver: tuple[str | None, str],
    sharer: tuple[str | None, str],
    output: Path,
    data_dir: Path | None = None,
    subfolder: str | None = None,
    store: tuple[Path | None, str | None] = (None, None),
    max_bytes: int = 20 * 10**9,
) -> dict[str, Any]:
    """Measure, write `scores.jsonl`, `answers.jsonl` and `summary.json` to `output`, and print tables.

    Run again, it goes on where it was stopped. Arguments as for `held_out`, `cases_of`, `to_answer` and `report.run`.
    """
    found, trained_on = held_out(source, checkpoint.resolve(fuser, subfolder=subfolder), limit, data_dir)
    pair, settings = load_pair([fuser], [subfolder], receiver, ([sharer[0]], sharer[1]))
    check_pair(pair)
    prefills = open_store(*store, pair.sharers[0])
    cases = cases_of(pair, found, max_tokens)
    if len(cases) < 2:
        raise C2CError(f"{len(cases)} of {len(found)} rows are short enough; expected two or more: raise --max-tokens")
    prompts = to_answer(pair, cases, generate, max_new_tokens)
    said = "\n".join(json.dumps([e.id, list(map(dict, e.messages)), e.prefix, e.response]) for e in found)
    with only_writer(output):
        claim(
            output,
            {
                **settings,
                "rows_hash": hashlib.sha256(said.encode()).hexdigest(),
                "store": prefills.config["precision"] if prefills else None,
                "source": source.model_dump(mode="json", include={"data", "holdout", "seed", "rows", "jsonl", "split"}),
                "limit": limit,
                "max_tokens": max_tokens,
                "max_new_tokens": max_new_tokens,
            },
        )
        console = Console(stderr=True)
        left_out = {"trained_on": trained_on, "too_long": len(found) - len(cases)}
        console.print(
            f"{len(cases)} rows; left out: {left_out['too_long']} too long, {trained_on} that the fuser was trained on"
        )
        with Bar(console) as bar:
            scoring = bar.add_task("bits per byte", total=len(cases))
            if prefills:
                check_room([(prefills, [c.prompt.sharers[0] for c in cases])], max_bytes)
            scores = score_rows(
                pair, cases, output / "scores.jsonl", prefills, batch_size, lambda n: bar.advance(scoring, n)
            )
            speaking = bar.add_task("greedy answers", total=len(prompts), visible=bool(prompts))
            answers = speak(
                pair, prompts, output / "answers.jsonl", max_new_tokens, batch_size, lambda n: bar.advance(speaking, n)
            )
        settings = json.loads((output / SETTINGS).read_text(encoding="utf-8"))
        summary: dict[str, Any] = {"settings": settings, "left_out": left_out}
        summary["responses"] = summarize(scores)
        if answers:
            summary["answers"] = fluency(answers)
        replace_text(output / SUMMARY, json.dumps(summary, indent=2) + "\n")
        for made in tables(summary):
            Console().print(made)
        return summary


def check_pair(pair: C2C) -> None:
    """Raise a C2CError for a pair that can't be compared with its sharer."""
    if len(pair.sharers) != 1:
        raise C2CError(f"this evaluation takes a pair with one sharer, {len(pair.sharers)} were given")
    if not plain(pair):
        raise C2CError(
            "with the fuser's published token map the sharer doesn't read its own tokens, so this evaluation would not "
            "measure the sharer alone; give a fuser with the token map span"
        )


# ---- rows -----------------------------------------------------------------------------------------------------------


def held_out(
    source: DataSource | TrainConfig, fuser: Path, limit: int | None, data_dir: Path | None = None
) -> tuple[list[Example], int]:
    """Rows of a source, or of a recipe its hold-out's, that the fuser was not trained on.

    Args:
        source: instruction data; of a recipe question sets are left out.
        fuser: its folder, where `training_ids.txt` may say what it was trained on.
        limit: those with the smallest hashes, as `training.data.split` sets rows apart.
        data_dir: local mirror of the data sets, for a source.

    Returns:
        The rows, and how many were left out as trained on.
    """
    if isinstance(source, TrainConfig):
        _, held = split(examples(source), source.holdout)
        found = [e for e in held if not source.data[e.source].task]
    else:
        found = draw(source, 0, data_dir)
    known = set(map(row_name, checkpoint.training_ids(fuser)))
    kept = [e for e in found if row_name(e.id) not in known]
    if not kept:
        raise C2CError(
            f"no instruction rows are left of {len(found)}, {len(found) - len(kept)} of which the fuser was trained "
            "on; give rows that it has not seen, or a recipe with a hold-out of such rows"
        )
    chosen = split(kept, limit)[1] if limit else kept
    return chosen, len(found) - len(kept)


def cases_of(pair: C2C, found: Sequence[Example], max_tokens: int) -> list[Case]:
    """The rows whose prompt and whole response have at most `max_tokens` tokens for either model, short ones first."""
    receiver, sharer = pair.receiver, pair.sharers[0]
    made = []
    for example in found:
        whole = replace(example, ends=False)  # the text alone, not the end of the turn
        try:
            prompt = pair.encode(list(example.messages), prefix=example.prefix)
        except C2CError as error:
            raise C2CError(f"{example.id}: {error}") from error
        mine, theirs = (response_ids(lm.need_tokenizer(), whole) for lm in (receiver, sharer))
        case = Case(example, prompt, mine, theirs)
        lengths = len(prompt.receiver) + len(mine), len(prompt.sharers[0]) + len(theirs)
        if all(n <= min(max_tokens, lm.context_length) for n, lm in zip(lengths, (receiver, sharer), strict=True)):
            made.append(case)
    return sorted(made, key=lambda c: (len(c.prompt.sharers[0]), len(c.sharer), c.example.id))


def to_answer(pair: C2C, cases: Sequence[Case], count: int, max_new_tokens: int) -> list[Case]:
    """At most `count` cases, those whose rows have the smallest hashes, with room for an answer."""
    room = [c for c in cases if len(c.prompt.receiver) + max_new_tokens <= pair.receiver.context_length]
    chosen = {e.id for e in split([c.example for c in room], count)[1][:count]}
    return [c for c in room if c.example.id in chosen]


# ---- reference responses ---------------------------------------------------------------------------------------------


def score_rows(
    pair: C2C,
    cases: Sequence[Case],
    path: Path,
    store: Store | None = None,
    batch_size: int = 4,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Scored]:
    """Every method's likelihood of every row's response; rows that stand in the file are not computed again.

    Each row's control gets the cache of the row beside it in `cases`, whatever the size of a batch.
    """
    done = read_rows(path, Scored)
    have = {(s.id, s.method) for s in done}
    for batch in _even(cases, batch_size):
        if any((c.example.id, m) not in have for c in batch for m in SCORED):
            new = [s for s in _score(pair, batch, store) if (s.id, s.method) not in have]
            add_rows(path, new)
            done += new
        progress(len(batch))
    ids = {c.example.id for c in cases}
    return [s for s in done if s.id in ids]


def _even(cases: Sequence[Case], size: int) -> list[Sequence[Case]]:
    """Batches of an even size, up to `size` or 2; the last one takes what would be alone."""
    size = max(2, size - size % 2)
    bounds = [*range(0, max(1, len(cases) - 1), size), len(cases)]
    return [cases[a:b] for a, b in pairwise(bounds)]


def _score(pair: C2C, batch: Sequence[Case], store: Store | None) -> list[Scored]:
    prompts = [c.prompt for c in batch]
    cache = sharer_cache(pair, 0, prompts, store)
    clean = prefill_prompts(pair.receiver, [p.receiver for p in prompts])
    known = [(cache, [len(p.sharers[0]) for p in prompts])]
    beside = beside_of(len(prompts))
    states: dict[str, Callable[[], Prefilled]] = {  # made one by one, so that one at a time takes memory
        "receiver": lambda: clean,
        "sharer": lambda: prefilled(pair.sharers[0], [p.sharers[0] for p in prompts], cache),
        "c2c": lambda: pair.fuse(prompts, clean=clean, sharers=known),
        "other": lambda: fuse_others(pair, prompts, [prompts[i] for i in beside], clean, rows_of(known, beside)),
    }
    made = []
    for method, state in states.items():
        lm = pair.sharers[0] if method == "sharer" else pair.receiver
        responses = [[c.sharer if method == "sharer" else c.receiver] for c in batch]
        for row, (case, (found,)) in enumerate(zip(batch, score(lm, state(), responses), strict=True)):
            size = len(case.example.response.encode())
            partner = batch[beside[row]].example.id if method == "other" else None
            made.append(Scored(case.example.id, method, round(-found.logprob, 5), found.num_tokens, size, partner))
    return made


def summarize(scores: Sequence[Scored]) -> dict[str, Any]:
    """Bits per byte of each method over all rows, differences to the receiver, and the part of the gap that is closed.

    Differences and the closed share, in %, have 95% intervals by the bootstrap over rows, paired: the methods are
    compared on the same drawn rows. The share is None where the sharer is no better than the receiver.
    """
    ids = sorted({s.id for s in scores})
    by_name = {(s.id, s.method): s for s in scores}
    nll = {m: np.array([by_name[i, m].nll for i in ids]) for m in SCORED}
    sizes = np.array([by_name[i, "receiver"].bytes for i in ids])
    result: dict[str, Any] = {"rows": len(ids), "bytes": int(sizes.sum())}

    def bits(method: str, times: np.ndarray) -> Any:
        return times @ nll[method] / (times @ sizes) / math.log(2)

    once = np.ones(len(ids))
    for method in SCORED:
        tokens = sum(s.tokens for s in scores if s.method == method)
        result[method] = {"bits_per_byte": round(float(bits(method, once)), 5), "tokens": tokens}

    def difference(times: np.ndarray, method: str) -> Any:
        return bits(method, times) - bits("receiver", times)

    for method in ("sharer", "c2c", "other"):
        interval = bootstrap(len(ids), partial(difference, method=method))
        result[method]["difference"] = round(float(difference(once, method)), 5)
        result[method]["interval"] = [round(x, 5) for x in interval]

    def closed(times: np.ndarray, method: str) -> Any:
        gap = bits("receiver", times) - bits("sharer", times)
        return 100 * (bits("receiver", times) - bits(method, times)) / np.where(gap == 0, 1e-12, gap)

    clear = result["sharer"]["interval"][1] < 0  # else some draws have no gap, and a share of it no interval
    for method in ("c2c", "other"):
        better = bits("sharer", once) < bits("receiver", once)
        result[method]["closed"] = round(float(closed(once, method)), 2) if better else None
        shares = bootstrap(len(ids), partial(closed, method=method)) if clear else ()
        result[method]["closed_interval"] = [round(x, 2) for x in shares] or None
    return result


# ---- greedy answers --------------------------------------------------------------------------------------------------


def speak(
    pair: C2C,
    cases: Sequence[Case],
    path: Path,
    max_new_tokens: int = 256,
    batch_size: int = 4,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Spoken]:
    """Greedy answers of the receiver and of C2C; those that stand in the file are not written again."""
    done = read_rows(path, Spoken)
    have = {(s.id, s.method) for s in done}
    for batch in batches_of(cases, batch_size) if cases else []:
        prompts = [c.prompt for c in batch]
        for method in WRITERS:
            if all((c.example.id, method) in have for c in batch):
                continue
            if method == "receiver":
                answers = write(pair.receiver, [p.receiver for p in prompts], max_new_tokens)
            else:
                fused = pair.fuse(prompts, keep=bool(fused_sharers(pair)))
                answers = write_on(pair.receiver, answered_from(pair, fused), [max_new_tokens] * len(prompts))
            new = [_spoken(c, method, a) for c, a in zip(batch, answers, strict=True)]
            new = [s for s in new if (s.id, s.method) not in have]
            add_rows(path, new)
            done += new
        progress(len(batch))
    ids = {c.example.id for c in cases}
    return [s for s in done if s.id in ids]


def _spoken(case: Case, method: str, answer: Written) -> Spoken:
    share, longest = repeats(answer.ids)
    asked = case.example.messages[-1]["content"]
    return Spoken(
        case.example.id, method, asked, answer.text, len(answer.ids), answer.ended, round(share, 5), longest,
        *(None if (d := distinct(answer.ids, n)) is None else round(d, 5) for n in (2, 3)),
    )  # fmt: skip


def _runs(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def distinct(ids: Sequence[int], n: int) -> float | None:
    """Different runs of n tokens, of all of them; None where there is none."""
    every = _runs(ids, n)
    return len(set(every)) / len(every) if every else None


def repeats(ids: Sequence[int], n: int = 4) -> tuple[float, int]:
    """The share of tokens in a run of n that occurs more than once, and the most in a row that are."""
    times = Counter(_runs(ids, n))
    repeated = {i + k for i, run in enumerate(_runs(ids, n)) if times[run] > 1 for k in range(n)}
    longest = current = 0
    for i in range(len(ids)):
        current = current + 1 if i in repeated else 0
        longest = max(longest, current)
    return len(repeated) / max(1, len(ids)), longest


def fluency(answers: Sequence[Spoken]) -> dict[str, Any]:
    """Per method the means over its answers; shares in %."""
    result: dict[str, Any] = {}
    for method in WRITERS:
        mine = [a for a in answers if a.method == method]

        def mean(values: Sequence[float | None]) -> float | None:
            known = [v for v in values if v is not None]
            return round(sum(known) / len(known), 2) if known else None

        result[method] = {
            "answers": len(mine),
            "tokens": mean([a.tokens for a in mine]),
            "ended": mean([100 * a.ended for a in mine]),
            "distinct2": mean([None if a.distinct2 is None else 100 * a.distinct2 for a in mine]),
            "distinct3": mean([None if a.distinct3 is None else 100 * a.distinct3 for a in mine]),
            "repeated": mean([100 * a.repeated for a in mine]),
            "longest_repeat": mean([a.longest_repeat for a in mine]),
        }
    return result


# ---- tables ----------------------------------------------------------------------------------------------------------

MEASURES = {
    "tokens": "tokens",
    "ended": "ended by itself, %",
    "distinct2": "different pairs of tokens, %",
    "distinct3": "different triples, %",
    "repeated": "tokens in a repeated run of four, %",
    "longest_repeat": "… the most in a row",
}


def tables(summary: dict[str, Any]) -> list[Table]:
    """Bits per byte, and what the answers look like where there are any."""
    responses = summary["responses"]
    made = Table(title=f"bits per byte of {responses['rows']} responses, {responses['bytes']:,} bytes [95% interval]")
    for heading in ("", "bits per byte", "against the receiver", "% of the gap to the sharer"):
        made.add_column(heading, justify="right" if heading else "left")
    for method, label in SCORED.items():
        row = responses[method]
        cells = [f"{row['bits_per_byte']:.4f}", "", ""]
        if "difference" in row:
            cells[1] = "{:+.4f}  [{:+.4f}, {:+.4f}]".format(row["difference"], *row["interval"])
        if "closed" in row:
            cells[2] = "–" if row["closed"] is None else f"{row['closed']:.1f}"
            if row["closed_interval"]:
                cells[2] += "  [{:.1f}, {:.1f}]".format(*row["closed_interval"])
        made.add_row(label, *cells)
    if "answers" not in summary:
        return [made]
    answers = summary["answers"]
    looks = Table(title=f"greedy answers to {answers['c2c']['answers']} prompts, means")
    for heading in ("", *(SCORED[m] for m in WRITERS)):
        looks.add_column(heading, justify="right" if heading else "left")
    for key, label in MEASURES.items():
        looks.add_row(label, *("–" if answers[m][key] is None else f"{answers[m][key]:.1f}" for m in WRITERS))
    return [made, looks]
