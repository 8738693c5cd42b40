"""c2c ask: one question, answered by the receiver alone, the sharer alone, text-to-text and C2C, side by side."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache2cache.cli import options
from cache2cache.errors import C2CError

if TYPE_CHECKING:
    from cache2cache.methods import Answer
    from cache2cache.tasks import Question

LABELS = {
    "c2c": "C2C",
    "receiver": "Receiver alone",
    "sharer": "Sharer alone",
    "text": "Text-to-text",
    "text-options": "Text-to-text, sharer sees the options",
    "text-answer": "Text-to-text, sharer may answer",
}
DEFAULT = ("c2c", "receiver", "sharer", "text")
DEMO_NOTE = "Three questions written for this demo."


def ask(
    question: Annotated[str | None, typer.Argument(help="The question.  [default: three that come along]")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Only this method; give it again for more. One of {', '.join(LABELS)}.", metavar="METHOD"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    max_new_tokens: options.MaxNewTokens = 64,
    fuser: options.Fusers = None,
    subfolder: options.Subfolders = None,
    receiver: options.Receiver = None,
    sharer: options.Sharers = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    system: options.System = None,
    skip: options.Skip = None,
    picture: Annotated[
        Path | None, typer.Option(callback=options.file, help="Also write what was shown to this SVG file.")
    ] = None,
) -> None:
    """Answer a question in each way, side by side; each runs alone, so that its clock is true."""
    from cache2cache.config import is_address

    # A sharer that is served elsewhere reads prompts and doesn't answer; of several the first one would.
    default = DEFAULT[:2] if is_address(sharer[0] if sharer else None) else DEFAULT
    chosen = list(dict.fromkeys(only or default))
    if unknown := [method for method in chosen if method not in LABELS]:
        raise C2CError(f"unknown method {unknown[0]!r}; expected one of {', '.join(LABELS)}")
    if question is not None and not question.strip():
        raise C2CError("the question is empty; expected some text, or no argument for the questions that come along")
    from cache2cache import tasks

    questions: list[str | Question] = [question] if question is not None else [*tasks.load(str(_DEMO))]

    from rich.console import Console

    from cache2cache.cli import view
    from cache2cache.methods import METHODS, Ask

    pair = options.load_pair(fuser, subfolder, receiver, sharer, dtype, device)
    names = {"receiver": pair.receiver.name, "sharers": [lm.name for lm in pair.sharers]}
    show = view.silent if as_json else view.shower()
    if question is None and not as_json:
        print(DEMO_NOTE)
    results, shown = [], []
    for number, item in enumerate(questions, 1):
        prompt = Ask.of(item, system=system, skip=skip)
        title = f"Question {number} of {len(questions)}" if len(questions) > 1 else "Question"
        # Nothing runs before its turn: every method is a generator whose clock starts with its first piece.
        runs = {method: METHODS[method](pair, prompt, max_new_tokens) for method in chosen}
        answers = show(title, prompt.prompt, runs, LABELS)
        letters = [_letter(item, answer) for answer in answers]
        right = None if isinstance(item, str) else item.letter
        shown.append(view.Shown(title, prompt.prompt, answers, letters, right))
        if not as_json:
            Console().print(view.table(answers, letters, right, LABELS))
            for answer in answers:
                if answer.transfer_bytes:
                    print(f"over the wire: {answer.transfer_bytes / 1e6:.2f} MB in {answer.transfer_s:.2f} s")
        results.append(_result(item, prompt.prompt, answers, letters))
    if as_json:
        print(json.dumps({**names, "questions": results}, ensure_ascii=False, indent=2))
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        view.picture(picture, shown, LABELS)


_DEMO = Path(__file__).with_name("demo_questions.jsonl")


def _letter(item: str | Question, answer: Answer) -> str | None:
    from cache2cache.tasks.prompts import extract_letter

    return None if isinstance(item, str) else extract_letter(answer.text, len(item.options))


def _result(item: str | Question, prompt: str, answers: list[Answer], letters: list[str | None]) -> dict[str, Any]:
    if isinstance(item, str):
        return {"prompt": prompt, "answers": [asdict(answer) for answer in answers]}
    rows = [{**asdict(answer), "letter": letter} for answer, letter in zip(answers, letters, strict=True)]
    return {"prompt": prompt, "right": item.letter, "answers": rows}
