"""What a run of `c2c evaluate` takes beyond its models' computing, and what batches are good for.

    python benchmarks/evaluate.py
    python benchmarks/evaluate.py --questions 64 --sharer qwen2.5-coder-1.5b-instruct

One model alone answers questions that are made up here, by likelihood and in words, through everything that the command
does but loading: the share of that time which the model's own forward passes take (target 0.8 at least), and the time
over that of the lm-evaluation-harness's model `hf` for the same requests (target 1 at most). Then questions a second
with batches over one by one, of answers in words all of one length (target 3), by the model and by `--sharer` where one
is given. As in the command, weights are laid out for batches (models/packed.py) and not for single questions.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from harness import asked, options_of
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from measure import clock, machine, take_turns

from cache2cache import C2C, LM, FuserConfig, load_lm
from cache2cache.config import EvalConfig
from cache2cache.evaluation import run as runs
from cache2cache.evaluation.answers import GENERATION
from cache2cache.evaluation.runner import Unit, evaluate
from cache2cache.models.packed import pack


def rows_of(count: int) -> list[dict[str, Any]]:
    """So many questions with four options, of lengths that differ."""
    return [{"id": str(i), "question": asked(i), "options": options_of(i), "answer": i % 4} for i in range(count)]


class Computing:
    """Seconds inside a model's forward passes, whichever of its parts is called."""

    def __init__(self) -> None:
        self.seconds, self.depth, self.began = 0.0, 0, 0.0

    @contextmanager
    def of(self, lm: LM) -> Iterator[None]:
        parts: list[Any] = [lm.model, lm.decoder, lm.model.get_output_embeddings()]
        for part in parts:
            part.forward = self.clocked(part.forward)
        try:
            yield
        finally:
            for part in parts:
                del part.forward  # the class's own is behind it

    def clocked(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self.depth:
                self.began = clock()
            self.depth += 1
            try:
                return forward(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += clock() - self.began

        return run


def requests_of(units: list[Unit], lm: LM, new_tokens: int) -> dict[str, list[Instance]]:
    """What the run asks its model, as the harness asks it."""
    tokenizer = lm.need_tokenizer()
    made: dict[str, list[tuple[Any, ...]]] = {"loglikelihood": [], "generate_until": []}
    for case in [case for unit in units for case in unit.cases]:
        made["loglikelihood"] += [(tokenizer.decode(case.whole.receiver), f" {letter}") for letter in "ABCD"]
        assert case.bare is not None
        options = {"until": [], "max_gen_toks": new_tokens, "do_sample": False}
        made["generate_until"].append((tokenizer.decode(case.bare.receiver), options))
    return {
        kind: [Instance(kind, {}, given, i) for i, given in enumerate(every)]  # type: ignore[arg-type]
        for kind, every in made.items()
    }


def whole_run(lm: LM, given: argparse.Namespace, folder: Path) -> dict[str, float]:
    """A run's time, its model's share, and the harness's time for the same requests; medians of a few turns."""
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(given.questions)))
    C2C.from_models(lm, lm, FuserConfig(hidden_dim=8, intermediate_dim=8)).save_pretrained(folder / "fuser")
    settings = {"fuser": str(folder / "fuser"), "tasks": [str(file)], "methods": ["receiver"], "answers": "both"}
    settings |= {"receiver": given.model, "sharer": given.model}
    settings |= {"batch_size": given.batch_size, "max_new_tokens": given.new_tokens}

    def config(number: int) -> EvalConfig:
        return EvalConfig.model_validate({**settings, "output": folder / f"run-{number}"})

    first = config(0)
    loaded = setup, _ = runs.load(first)
    lm = setup.pair.receiver
    runs.load = lambda config: loaded  # type: ignore[assignment]  # loading is not what is measured
    units, failed = runs.plan_of(first.tasks[0], first, setup, runs.questions_of(first.tasks[0], first))
    assert not failed
    requests = requests_of(units, lm, given.new_tokens)
    harness, computing, numbers = (
        HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=given.batch_size),
        Computing(),
        iter(range(1000)),
    )

    def ours() -> dict[str, float]:
        computing.seconds = 0.0
        began = clock()
        with computing.of(lm):
            runs.run(config(next(numbers)))
        return {"share": computing.seconds / (clock() - began)}

    def theirs() -> None:
        for kind, instances in requests.items():
            getattr(harness, kind)(instances, disable_tqdm=True)

    times = take_turns({"ours": ours, "hf": theirs}, given.rounds, seconds=600)
    return {name: median(seconds) for name, seconds in times.items()}


def batches(name: str, given: argparse.Namespace, folder: Path) -> float:
    """Questions a second in batches over one by one, answered in words."""
    file = folder / "few.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(given.batch_size)))
    config = EvalConfig.model_validate({"tasks": [str(file)]})
    questions, numbers = runs.questions_of(config.tasks[0], config), iter(range(1000))

    def answering(size: int) -> Callable[[], None]:
        lm = load_lm(name)
        assert lm.model.generation_config is not None
        lm.model.generation_config.min_new_tokens = given.batch_tokens
        pair = C2C.from_models(lm, lm, FuserConfig(hidden_dim=8, intermediate_dim=8))
        if size > 1:
            pack(lm)

        def answer() -> None:
            evaluate(
                pair, "few", questions, folder / f"batches-{next(numbers)}.jsonl", methods=["receiver"],
                answers=GENERATION, batch_size=size, max_new_tokens=given.batch_tokens,
            )  # fmt: skip

        return answer

    times = take_turns({"together": answering(given.batch_size), "one by one": answering(1)}, given.rounds, 600)
    return median(times["one by one"]) / median(times["together"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--sharer", help="also measure batches of this model")
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32, help="of an answer in words in the whole run")
    parser.add_argument("--batch-tokens", type=int, default=128, help="of an answer where batches are measured")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    print(json.dumps(machine()))
    with tempfile.TemporaryDirectory() as work:
        lm = load_lm(given.model)
        found = whole_run(lm, given, Path(work))
        del lm
        print(f"{given.questions} questions to {given.model}, {found['ours']:.2f} s, hf {found['hf']:.2f} s")
        print(f"  the model's share of a run: {found['share']:.3f} (target ≥ 0.8)")
        print(f"  a run over hf for the same requests: {found['ours'] / found['hf']:.2f} (target ≤ 1)")
        for name in filter(None, (given.model, given.sharer)):
            gain = batches(name, given, Path(tempfile.mkdtemp(dir=work)))  # rows of another model would be kept
            print(
                f"  {name}, {given.batch_tokens} new tokens: {gain:.2f} times the questions a second in batches of "
                f"{given.batch_size} (target ≥ 3)"
            )


if __name__ == "__main__":
    main()
