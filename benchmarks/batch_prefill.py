"""What a batch of prompts spares: by reading once what all of them begin with, and rows of like length together.

    python benchmarks/batch_prefill.py
    python benchmarks/batch_prefill.py --model qwen2.5-coder-1.5b-instruct --rows 16 --rounds 2

The questions are made up here and put by the paper's prompt: template, system message and instruction are alike. For
the second part some are put behind passages, so that lengths differ as those of instructions do. Prints how many of the
tokens are spared, or how many positions there are for each token, and the time over that of whole prompts, or of one
padded batch: medians of turns in one run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from statistics import median
from unittest.mock import patch

from harness import asked, options_of
from measure import machine, take_turns

from cache2cache import LM, heap, kv, load_lm
from cache2cache.alignment.chat import render
from cache2cache.kv import common_start, prefill_prompts
from cache2cache.tasks import Question
from cache2cache.tasks.prompts import ANSWER_PREFIX, paper_prompt


def questions(lm: LM, count: int, passages: bool = False) -> list[list[int]]:
    """Token ids of so many questions, of lengths that differ, with the start of the answer; behind passages of none to
    four other questions if asked for."""
    rows = []
    for i in range(count):
        before = [asked(count + i + k) for k in range(i % 5 if passages else 0)]
        prompt = paper_prompt(Question(str(i), " ".join([*before, asked(i)]), tuple(options_of(i)), i % 4))
        chat = [{"role": "user", "content": prompt}]
        rows.append(render(lm.need_tokenizer(), chat, prefix=ANSWER_PREFIX).ids)
    return rows


def read(lm: LM, rows: Sequence[Sequence[int]], worth: int, apart: bool = False) -> None:
    groups = kv.like_lengths if apart else together
    with patch.object(kv, "_WORTH", worth), patch.object(kv, "like_lengths", groups):
        prefill_prompts(lm, rows)


def together(lengths: Sequence[int]) -> list[list[int]]:
    return [list(range(len(lengths)))]


def padded(groups: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    """Positions over tokens."""
    return sum(len(group) * max(lengths[row] for row in group) for group in groups) / sum(lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    heap.keep()
    lm = load_lm(given.model)
    print(json.dumps(machine()))
    for count in given.rows:
        rows = questions(lm, count)
        start, tokens = len(common_start(rows)), sum(map(len, rows))
        spared = start * (count - 1)
        times = take_turns(
            {"whole": partial(read, lm, rows, tokens), "once": partial(read, lm, rows, 1)}, given.rounds, 600
        )
        ratio = median(times["once"]) / median(times["whole"])
        print(
            f"{given.model}, {count} questions of {tokens // count} tokens, {start} of them alike: "
            f"{spared / tokens:.0%} of all tokens spared, time {ratio:.2f}",
            flush=True,
        )
        rows = questions(lm, count, passages=True)
        lengths = [len(row) - len(common_start(rows)) - 1 for row in rows]  # the last token is left to decoding
        groups = kv.like_lengths(lengths)
        ways = {name: partial(read, lm, rows, kv._WORTH, name == "apart") for name in ("together", "apart")}
        times = take_turns(ways, given.rounds, 600)
        ratio = median(times["apart"]) / median(times["together"])
        print(
            f"{given.model}, {count} questions of {min(lengths)} to {max(lengths)} tokens behind what is alike: "
            f"{padded(together(lengths), lengths):.2f} positions a token in one batch, "
            f"{padded(groups, lengths):.2f} in {len(groups)}, time {ratio:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
