"""What a batch of questions spares by reading once what all of them begin with, against reading each whole.

    python benchmarks/common_start.py
    python benchmarks/common_start.py --model qwen2.5-coder-1.5b-instruct --rows 16 --rounds 2

The questions are made up here and put by the paper's prompt: template, system message and instruction are alike. Prints
how many of the tokens are spared, and the time over that of whole prompts, medians of turns in one run.
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


def questions(lm: LM, count: int) -> list[list[int]]:
    """Token ids of so many questions, of lengths that differ, with the start of the answer."""
    rows = []
    for i in range(count):
        prompt = paper_prompt(Question(str(i), asked(i), tuple(options_of(i)), i % 4))
        chat = [{"role": "user", "content": prompt}]
        rows.append(render(lm.need_tokenizer(), chat, prefix=ANSWER_PREFIX).ids)
    return rows


def read(lm: LM, rows: Sequence[Sequence[int]], worth: int) -> None:
    with patch.object(kv, "_WORTH", worth):
        prefill_prompts(lm, rows)


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


if __name__ == "__main__":
    main()
