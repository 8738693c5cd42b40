"""Questions for the page: which of them C2C changes for the better and for the worse.

python benchmarks/examples.py benchmarks/questions.jsonl                # with the default pair
python benchmarks/examples.py benchmarks/questions.jsonl --write FILE --keep 4

The rows are multiple-choice questions as `c2c evaluate` reads them (question, options, answer). Each is put to the
receiver alone and to the pair, greedily; printed is every question whose letter is right with one of them only. With
--write they are written as the page reads them (src/cache2cache/serving/examples.jsonl): question and change, "better"
or "worse"; at most so many of each as --keep says. Rows of that file without a change stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from cache2cache.cli.options import load_pair
from cache2cache.errors import C2CError
from cache2cache.files import replace_text
from cache2cache.methods import METHODS, Ask
from cache2cache.pair import C2C
from cache2cache.tasks.own import read_questions
from cache2cache.tasks.prompts import extract_letter


def find(pair: C2C, path: Path, new_tokens: int) -> list[dict[str, str]]:
    """The questions whose answer changes, as rows of the page's examples."""
    rows = []
    for question in read_questions(path):
        ask = Ask.of(question)
        letters = {}
        for way in ("receiver", "c2c"):
            *_, answer = METHODS[way](pair, ask, new_tokens)
            letters[way] = extract_letter(answer.text, len(question.options))
        right = {way: letter == question.letter for way, letter in letters.items()}
        if right["receiver"] != right["c2c"]:
            rows.append({"question": ask.prompt, "change": "better" if right["c2c"] else "worse"})
            print(f"{rows[-1]['change']}: {question.question} {letters}, right: {question.letter}", flush=True)
    return rows


def write(path: Path, rows: list[dict[str, str]], keep: int) -> None:
    """Put the first `keep` rows of each change into the file, before those that it has without one."""
    kept = [row for change in ("better", "worse") for row in [r for r in rows if r["change"] == change][:keep]]
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept += [row for row in map(json.loads, filter(str.strip, old)) if not row["change"]]
    replace_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--fuser")
    parser.add_argument("--receiver")
    parser.add_argument("--sharer")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--keep", type=int, default=4, help="of each change")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    sharers = [args.sharer] if args.sharer else None
    try:
        pair = load_pair([args.fuser] if args.fuser else None, None, args.receiver, sharers, None, None)
        rows = find(pair, args.questions, args.new)
    except C2CError as error:
        sys.exit(f"error: {error}")
    counts = {change: sum(row["change"] == change for row in rows) for change in ("better", "worse")}
    print(f"{counts['better']} better, {counts['worse']} worse")
    if args.write:
        write(args.write, rows, args.keep)


if __name__ == "__main__":
    main()
