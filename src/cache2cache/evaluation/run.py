"""An evaluation run: models in; rows, a summary and a report out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console

from .. import tasks as sets
from ..config import EvalConfig, EvalTask
from ..errors import C2CError
from ..files import check_writable, only_writer, replace_text
from ..fuser import checkpoint
from ..methods.base import Ask
from ..progress import Bar
from ..tasks import OpenQuestion, Question
from ..tasks.longbench import bucket
from ..training.data import row_name
from . import report, routing, timing
from .answers import (
    LIKELIHOOD,
    QUESTIONS,
    ROUTED_ROWS,
    ROUTER,
    ROUTER_ROWS,
    SAMPLES,
    SETTINGS,
    SUMMARY,
    TIMES,
    WAYS,
    Answer,
    Asked,
    drawn,
    read_answers,
)
from .asking import EVERY, FEW_SHOT, ROUTED, SINGLE, SKIP, Setup, check_names, expanded
from .loading import claim, load, pack_models
from .runner import AnyQuestion, Unit, check_stores, gather, plan, unchanged, work
from .summary import summarize_run
from .writing import add_rows, line_of

Plans = Mapping[str, tuple[list[Unit], list[Answer]]]


@dataclass(frozen=True)
class _Run:
    """A run that is ready to ask.

    Attributes:
        plans: by set, what is to be asked and what can't be.
        learning, training: what a router learns from, and how that is asked.
        trained_on: by set, how many of its questions the fusers were trained on.
    """

    config: EvalConfig
    processes: PartialState
    console: Console
    questions: Mapping[str, Sequence[AnyQuestion]]
    setup: Setup
    plans: Plans
    learning: Setup
    training: Plans
    trained_on: Mapping[str, int]


def run(config: EvalConfig) -> dict[str, Any]:
    """Evaluate, and write everything to the run's folder. Returns the summary.

    With several processes (Accelerate) each does its share of the batches; the first one writes the rest.
    """
    config = named(config)
    for folder in filter(None, [config.output, config.results]):
        check_writable(folder)
    # Before anything is loaded: this also chooses each process's GPU. One may wait for another's last batches.
    processes = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    console = Console(stderr=True, quiet=not processes.is_main_process)
    questions = {task.label: questions_of(task, config) for task in config.tasks}
    setup, settings = load(config)
    trained = trained_on(config, questions)
    for label, count in trained.items():
        console.print(
            f"the fuser was trained on {count} of the {len(questions[label])} questions of {label}", markup=False
        )
    plans = {t.label: plan_of(t, config, setup, questions[t.label]) for t in config.tasks}
    # A router learns from letters, for which cot is no prompt.
    learning = replace(setup, prompt="paper") if setup.prompt == "cot" else setup
    training = router_plans(config, learning, questions) if routing.LEARNED in config.methods else {}
    with only_writer(config.output) if processes.is_main_process else nullcontext():
        if processes.is_main_process:
            claim(config.output, settings, free=["limit"])  # more questions are the same ones and others
        return _asked(_Run(config, processes, console, questions, setup, plans, learning, training, trained))


def _asked(run: _Run) -> dict[str, Any]:
    """Clock, ask, summarize: all that a run writes."""
    config, processes, setup, plans = run.config, run.processes, run.setup, run.plans
    timed = bool(config.timing) and processes.is_main_process
    # The clock comes first: it asks one by one, and what follows lays the weights out for batches.
    first = next(iter(plans))
    times = {"task": first, **clock(config, setup, plans[first][0], run.console)} if timed else None
    processes.wait_for_everyone()
    if config.batch_size > 1:
        pack_models(setup)
    _do(run, run.learning, run.training, config.output / ROUTER_ROWS)
    answers = _do(run, setup, plans, config.output / SAMPLES)
    summary: dict[str, Any] = {}
    if processes.is_main_process:
        routed = route(config, setup, run.training, run.questions, answers)
        if routed:
            replace_text(config.output / ROUTED_ROWS, "".join(map(line_of, routed)))
        write_questions(config.output / QUESTIONS, plans, run.questions)
        summary = {"settings": json.loads((config.output / SETTINGS).read_text(encoding="utf-8"))}
        summary |= summarize_run(
            [*answers, *routed], list(run.questions), expanded(config.methods, setup.pair), config.seed
        )
        summary["asked"] = {label: len(rows) for label, rows in run.questions.items()}
        summary |= {"trained_on": run.trained_on} if run.trained_on else {}
        if times is not None:
            summary["timing"] = times
        replace_text(config.output / SUMMARY, json.dumps(summary, indent=2) + "\n")
        made = report.read_run(config.output)
        report.write(config.output, [made])
        if config.results is not None:
            report.publish(made, config.results)
    processes.wait_for_everyone()
    return summary


def named(config: EvalConfig) -> EvalConfig:
    """The configuration with the methods that a threshold, an adapter or a fuser of its own stands for."""
    given = ((SKIP, config.skip), (SINGLE, config.single), ("self", config.identical))
    methods = [*config.methods, *(m for m, value in given if value is not None)]
    made = config.model_copy(update={"methods": list(dict.fromkeys(methods))})
    if "split" not in config.model_fields_set:  # a set that lacks the usual one is asked in its own
        tasks = [
            t.model_copy(update={"split": t.split or sets.WITHOUT_VALIDATION.get(t.task.split("/")[0])})
            for t in made.tasks
        ]
        made = made.model_copy(update={"tasks": tasks})
    check_names(made.prompt, made.methods, made.answers)
    asking = [m for m in EVERY if m not in ROUTED]  # a router answers whatever receiver and sharer do
    if unknown := [m for limits in (made.limits, *(t.limits for t in made.tasks)) for m in limits if m not in asking]:
        raise C2CError(f"limits names the unknown method {unknown[0]!r}; expected one of {', '.join(asking)}")
    needs = set(made.methods) & set(ROUTED)
    if needs and not {"receiver", "sharer"} <= set(made.methods):
        raise C2CError(f"the method {min(needs)} chooses between receiver and sharer; ask for both as well")
    return made


def questions_of(task: EvalTask, config: EvalConfig) -> list[AnyQuestion]:
    """The questions of a set that are asked."""
    split = task.split or config.split
    rows: list[AnyQuestion]
    if sets.is_open(task.task):
        rows = list(sets.load_open(task.task, split, config.data_dir))
    else:
        rows = list(sets.load(task.task, split, config.data_dir))
    if not rows:
        raise C2CError(f"{task.task} holds no questions; give at least one")
    return drawn(rows, task.limit or config.limit, config.seed)


def trained_on(config: EvalConfig, questions: Mapping[str, Sequence[AnyQuestion]]) -> dict[str, int]:
    """By set, how many of its questions the fusers were trained on, where their folders name any. Rows of LongBench go
    by other names there, so that none is found."""
    ids = set().union(*map(checkpoint.training_ids, checkpoint.resolve_all(config.fuser, config.subfolder)))
    known = set(map(row_name, ids))
    found = {t.label: sum(row_name(f"{t.task}:{q.id}") in known for q in questions[t.label]) for t in config.tasks}
    return {label: n for label, n in found.items() if n}


def plan_of(
    task: EvalTask, config: EvalConfig, setup: Setup, questions: Sequence[AnyQuestion]
) -> tuple[list[Unit], list[Answer]]:
    """All that is to be done for a set of questions."""
    examples: list[Question] = []
    if FEW_SHOT in config.methods and isinstance(questions[0], Question):
        examples = sets.load(task.shots_task or task.task, task.shots_split or "train", config.data_dir)
    return plan(
        setup, task.label, questions, methods=config.methods, answers=config.answers,
        limits={**config.limits, **task.limits}, batch_size=config.batch_size, examples=examples, shots=config.shots,
        max_prompt_tokens=task.max_prompt_tokens, buckets=_buckets(questions),
    )  # fmt: skip


def _buckets(questions: Sequence[AnyQuestion]) -> dict[str, str]:
    lengths = {q.id: q.length for q in questions if isinstance(q, OpenQuestion) and q.length}
    return {i: bucket(n) for i, n in lengths.items()}


def _do(run: _Run, setup: Setup, plans: Plans, samples: Path) -> list[Answer]:
    """This process's share of the units, and then the rows of all of them, in order."""
    if not plans:
        return []
    processes = run.processes
    if processes.is_main_process:
        gather(samples)
    processes.wait_for_everyone()
    every = [u for units, _ in plans.values() for u in units]
    have = unchanged(read_answers(samples), every)
    into, me, count = samples, processes.process_index, processes.num_processes
    if count > 1:
        into = samples.with_name(f"{samples.stem}-{me}{samples.suffix}")
    # The questions of all sets first: which of them a store lacks is known before anything is computed.
    check_stores(setup, every, have, int(run.config.max_gb * 1e9))
    for label, (units, failed) in plans.items():
        mine = units[me::count]
        with Bar(run.console) as bar:
            row = bar.add_task(label, total=sum(len(u.cases) for u in mine))
            work(setup, mine, have, into, partial(bar.advance, row))
        if processes.is_main_process:
            add_rows(into, failed)
    processes.wait_for_everyone()
    order = [
        key
        for units, failed in plans.values()
        for key in [*(a.key for a in failed), *(k for u in units for k in u.keys)]
    ]
    if processes.is_main_process:
        gather(samples, order)
    processes.wait_for_everyone()
    found = {a.key: a for a in read_answers(samples)}
    if lost := [key for key in order if key not in found]:
        raise C2CError(f"{samples} lacks {len(lost)} of the rows that were written to it; run the same command again")
    return [found[key] for key in order]


def write_questions(path: Path, plans: Plans, questions: Mapping[str, Sequence[AnyQuestion]]) -> None:
    """What was asked, for the report, and what could not be; it stays in the run's folder."""
    prompts = {(c.task, c.id): c.ask.prompt for units, _ in plans.values() for u in units for c in u.cases}
    rows = []
    for task, asked in questions.items():
        for q in asked:
            answer = " | ".join(q.references) if isinstance(q, OpenQuestion) else f"{q.letter}. {q.options[q.answer]}"
            rows.append(Asked(task, q.id, prompts.get((task, q.id), _full(q)), answer))
    replace_text(path, "".join(map(line_of, rows)))


# ---- routing ---------------------------------------------------------------------------------------------------------


def router_plans(config: EvalConfig, setup: Setup, questions: Mapping[str, Sequence[AnyQuestion]]) -> Plans:
    """What receiver and sharer are asked so that a router can learn from it: none of the `questions` themselves."""
    asked = {_full(q) for rows in questions.values() for q in rows}
    given = [t.model_copy(update={"split": t.split or "train"}) for t in config.router.tasks]
    own = [EvalTask(task=t.task, name=t.label, split="train") for t in config.tasks]
    found = {}
    for task in given or own:
        try:
            if sets.is_open(task.task) or (not given and task.task.endswith(".jsonl")):
                continue  # these have no train split
            rows = sets.load(task.task, task.split or "train", config.data_dir)
        except C2CError:
            if given:
                raise
            continue
        chosen = [q for q in drawn(rows, task.limit or config.router.limit, config.seed) if _full(q) not in asked]
        if not chosen:
            continue
        found[task.label] = plan(
            setup, task.label, chosen, methods=["receiver", "sharer"], batch_size=config.batch_size
        )
    if not found:
        raise C2CError(
            "no set of the run has a split train, of other questions than those asked, for the method route to learn "
            "from; name some in router.tasks"
        )
    return found


def route(
    config: EvalConfig,
    setup: Setup,
    training: Plans,
    questions: Mapping[str, Sequence[AnyQuestion]],
    answers: Sequence[Answer],
) -> list[Answer]:
    """The routers' answers, which follow from those of receiver and sharer."""
    methods = [m for m in ROUTED if m in config.methods]
    if not methods:
        return []
    receiver, scores = setup.pair.receiver, {}
    texts = {(label, q.id): _full(q) for label, rows in questions.items() for q in rows}
    if routing.LEARNED in methods:
        router = _router(config, setup, training)
        embedded = routing.embed(receiver, list(texts.values()))
        scores = dict(zip(texts, router.score(embedded), strict=True))
    made = []
    for method in methods:
        for task in questions:
            ranks = {i: s for (label, i), s in scores.items() if label == task} if method == routing.LEARNED else None
            for way in WAYS:
                rows = [a for a in routing.with_confidence(answers) if a.task == task and a.answers == way]
                if {"receiver", "sharer"} <= {a.method for a in rows}:
                    made += routing.routed(rows, method, config.router.share, ranks)
    return made


def _full(question: AnyQuestion) -> str:
    return Ask.of(question if isinstance(question, Question) else question.prompt).full


def _router(config: EvalConfig, setup: Setup, training: Plans) -> routing.Router:
    """Fitted on the questions of `training`."""
    path, settings = config.output / ROUTER, config.output / SETTINGS
    cases = {(c.task, c.id): c for units, _ in training.values() for u in units for c in u.cases}
    rows = [a for a in read_answers(config.output / ROUTER_ROWS) if a.answers == LIKELIHOOD and (a.task, a.id) in cases]
    right = {m: {(a.task, a.id): a.correct for a in rows if a.method == m} for m in ("receiver", "sharer")}
    keys = [k for k, c in cases.items() if k in right["receiver"] and k in right["sharer"]]
    router = routing.fit(
        routing.embed(setup.pair.receiver, [cases[k].ask.full for k in keys]),
        [right["sharer"][k] for k in keys], [right["receiver"][k] for k in keys],
        [f"{task}:{i}" for task, i in keys], config.router.penalty,
    )  # fmt: skip
    router.save(path)
    about = routing.record(router, config.router.share, config.router.penalty)
    known = json.loads(settings.read_text(encoding="utf-8"))
    replace_text(settings, json.dumps({**known, "router": about}, indent=2) + "\n")
    return router


# ---- the clock -------------------------------------------------------------------------------------------------------


def clock(config: EvalConfig, setup: Setup, units: Sequence[Unit], console: Console) -> dict[str, Any]:
    """The timing pass on some of the first set's questions."""
    cases = list({c.id: c for u in units for c in u.cases}.values())
    chosen = drawn(cases, config.timing, config.seed)
    with Bar(console) as bar:
        row = bar.add_task("clock", total=None)
        rows = timing.measure(setup.pair, chosen, config.methods, config.output / TIMES, partial(bar.advance, row))
    return timing.summarize(rows)
