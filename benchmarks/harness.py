"""One model alone behind our adapter to the lm-evaluation-harness, against the harness's own model `hf`.

    python benchmarks/harness.py
    python benchmarks/harness.py --requests 64 --batch-size 8

The same requests, made up here: questions with four options each, scored by the letter (one token) and by the option's
text (several), and short greedy answers. Both take turns in one run; a ratio above 1 says that ours is faster.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from measure import take_turns

from cache2cache import C2C, FuserConfig, load_lm
from cache2cache.evaluation.lm_eval import HarnessLM

NOUNS = ["iron", "water", "sunlight", "a magnet", "the river", "a plant", "steam", "the moon"]
KINDS = {"letters": "loglikelihood", "option texts": "loglikelihood", "answers": "generate_until"}


def requests_of(kind: str, count: int, new_tokens: int) -> list[Instance]:
    """So many requests, four a question but for answers."""
    made: list[tuple[Any, ...]] = []
    for i in range(count if kind == "answers" else -(-count // 4)):
        options = [f"{NOUNS[(i + k) % 8]} and {NOUNS[(i * k + 3) % 8]}" for k in range(4)]
        lines = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
        question = f"Question {i}: which of these {'really ' * (i % 5)}belongs to {NOUNS[i % 8]}?\n{lines}\nAnswer:"
        if kind == "answers":
            made.append((question, {"until": ["\n\n"], "max_gen_toks": new_tokens, "do_sample": False}))
        else:
            made += [(question, f" {end}") for end in ("ABCD" if kind == "letters" else options)]
    return [Instance(KINDS[kind], {}, given, i) for i, given in enumerate(made[:count])]  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    lm = load_lm(given.model)
    alone = C2C.from_models(lm, lm, FuserConfig(hidden_dim=8, intermediate_dim=8))
    ours = HarnessLM(alone, method="receiver", batch_size=given.batch_size)
    theirs = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=given.batch_size)
    for kind, asked in KINDS.items():
        requests = requests_of(kind, given.requests, given.new_tokens)
        found: dict[str, Any] = {}

        def run(model: Any, name: str, asked: str, requests: Any, found: dict[str, Any]) -> None:
            found[name] = getattr(model, asked)(requests, disable_tqdm=True)

        times = take_turns(
            {
                "ours": lambda: run(ours, "ours", asked, requests, found),  # noqa: B023
                "theirs": lambda: run(theirs, "theirs", asked, requests, found),  # noqa: B023
            },
            given.rounds,
            seconds=120,
        )
        mine, other = (median(times[name]) for name in ("ours", "theirs"))
        if asked == "loglikelihood":
            pairs = zip(found["ours"], found["theirs"], strict=True)
            same = f"largest difference {max(abs(a[0] - b[0]) for a, b in pairs):.1e}"
        else:
            same = f"{sum(a == b for a, b in zip(found['ours'], found['theirs'], strict=True))} alike"
        seconds = f"ours {mine:6.2f} s  hf {other:6.2f} s  ratio {other / mine:5.2f}"
        print(f"{kind:13}{len(requests):4} requests  {seconds}  {same}")


if __name__ == "__main__":
    main()
