"""What fusing the answer's tokens too costs and changes: tokens a second, and answers to a few questions.

    python benchmarks/response.py

The questions are made up here and count an answer as right that holds the expected word. There are few of them: enough
to see a large change, not a small one. `c2c evaluate` measures quality.
"""

from __future__ import annotations

import argparse
import re
import time
from typing import Any

from cache2cache import C2C

QUESTIONS = [
    ("What is the capital of Australia?", "Canberra"),
    ("Which planet is closest to the sun?", "Mercury"),
    ("What is 17 plus 25?", "42"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
    ("What is the chemical symbol for gold?", "Au"),
    ("Which gas do plants take in from the air?", "[Cc]arbon dioxide"),
    ("How many legs does a spider have?", "8|[Ee]ight"),
    ("What is the largest ocean on Earth?", "Pacific"),
    ("Which of these is a mammal?\nA. shark\nB. dolphin\nC. trout\nD. octopus", "B|[Dd]olphin"),
    ("What is the opposite of cold?", "[Hh]ot|[Hh]eat|[Ww]arm"),
    ("At how many degrees Celsius does water boil?", "100"),
    ("Which Python keyword defines a function?", "def"),
]
WAYS: dict[str, dict[str, Any]] = {
    "receiver alone": {"sharer_mask": 0, "fuse_response": False},
    "prompt fused": {"fuse_response": False},
    "prompt and answer fused": {"fuse_response": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuser", help="folder or hub id; the packaged one without it")
    parser.add_argument("--receiver", help="instead of the model that the fuser was trained for")
    parser.add_argument("--sharer", help="likewise")
    parser.add_argument("--questions", type=int, default=len(QUESTIONS))
    parser.add_argument("--new-tokens", type=int, default=24)
    given = parser.parse_args()
    pair = C2C.from_pretrained(given.fuser, receiver=given.receiver, sharers=given.sharer)
    seconds, tokens, right = (dict.fromkeys(WAYS, 0.0) for _ in range(3))
    for question, expected in QUESTIONS[: given.questions]:
        print(f"\n{question}")
        for way, options in WAYS.items():
            fuse_response = options["fuse_response"]
            prompt = {name: value for name, value in options.items() if name != "fuse_response"}
            fused = pair.prefill([{"role": "user", "content": question}], keep=fuse_response, **prompt)
            began = time.perf_counter()
            ids = pair.generate(fused, fuse_response=fuse_response, max_new_tokens=given.new_tokens, do_sample=False)
            seconds[way] += time.perf_counter() - began
            answer = pair.receiver.need_tokenizer().decode(ids[0, fused.kv.length + 1 :], skip_special_tokens=True)
            tokens[way] += ids.shape[1] - fused.kv.length - 1
            right[way] += bool(re.search(rf"\b({expected})\b", answer))
            print(f"  {way}: {answer!r}")
    print()
    for way in WAYS:
        print(f"{way:24}{tokens[way] / seconds[way]:7.2f} tokens/s  {right[way]:.0f} of {given.questions} right")


if __name__ == "__main__":
    main()
