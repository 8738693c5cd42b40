"""One model alone behind our adapter to the lm-evaluation-harness, against the harness's own model `hf`.

    python benchmarks/harness.py
    python benchmarks/harness.py --requests 64 --batch-size 8

The same requests, made up here: questions with four options each, scored by the letter (one token) and by the option's
text (several), and short greedy answers. Both take turns in one run; a ratio above 1 says that ours is faster.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from statistics import median
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from measure import take_turns

from cache2cache import C2C, FuserConfig, load_lm
from cache2cache.evaluation.lm_eval import HarnessLM

NOUNS = ["iron", "water", "sunlight", "a magnet", "the river", "a plant", "steam", "the moon"]
KINDS = {"letters": "loglikelihood", "option texts": "loglikelihood", "answers": "generate_until"}


def options_of(i: int) -> list[str]:
    """Four options of question `i`, none of them right."""
    return [f"{NOUNS[(i + k) % 8]} and {NOUNS[(i * k + 3) % 8]}" for k in range(4)]


def asked(i: int) -> str:
    """Question `i`; their lengths differ."""
    return f"Question {i}: which of these {'really ' * (i % 5)}belongs to {NOUNS[i % 8]}?"


def requests_of(kind: str, count: int, new_tokens: int) -> list[Instance]:
    """So many requests, four a question but for answers."""
    made: list[tuple[Any, ...]] = []
    for i in range(count if kind == "answers" else -(-count // 4)):
        options = options_of(i)
        lines = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
        question = f"{asked(i)}\n{lines}\nAnswer:"
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
    models = {
        "ours": HarnessLM(alone, method="receiver", batch_size=given.batch_size),
        "hf": HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=given.batch_size),
    }
    for kind in KINDS:
        requests = requests_of(kind, given.requests, given.new_tokens)
        found: dict[str, Any] = {}
        turns = {name: partial(ask, model, name, kind, requests, found) for name, model in models.items()}
        times = {name: median(seconds) for name, seconds in take_turns(turns, given.rounds, seconds=120).items()}
        pairs = list(zip(found["ours"], found["hf"], strict=True))
        if KINDS[kind] == "loglikelihood":
            same = f"largest difference {max(abs(one[0] - other[0]) for one, other in pairs):.1e}"
        else:
            same = f"{sum(one == other for one, other in pairs)} alike"
        wall = f"ours {times['ours']:.2f} s, hf {times['hf']:.2f} s, ratio {times['hf'] / times['ours']:.2f}"
        cpu = f"{times['hf processor'] / times['ours processor']:.2f} in processor time"
        print(f"{kind:13}{len(requests):4} requests: {wall}, {cpu}; {same}")


def ask(model: Any, name: str, kind: str, requests: list[Instance], found: dict[str, Any]) -> dict[str, float]:
    """Put the answers into `found`; returns the processor's seconds, which other processes don't lengthen."""
    began = time.process_time()
    found[name] = getattr(model, KINDS[kind])(requests, disable_tqdm=True)
    return {f"{name} processor": time.process_time() - began}


if __name__ == "__main__":
    main()
