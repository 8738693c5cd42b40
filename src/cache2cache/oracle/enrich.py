"""Cache enrichment: is a cache better for having read more, at the same length (paper, oracle experiment 1)?

Direct      head, question
Few-shot    head, exemplars, question
Oracle      prefilled as Few-shot; then the exemplars' slots are removed, so the cache is as long as Direct's

`head` is one line that names the subject. Its slots come before the exemplars, so they are the same numbers in all
three, and a first token is always there for attention to rest on. In Oracle the question's slots keep the positions at
which they were prefilled (`kept`), or their keys are turned to those of Direct (`rotated`).

Layer by layer, a cache is mixed: some layers from Oracle, the others from Direct. One token reads it at one position,
so all layers are brought to Direct's positions: attention depends on distances alone, and a layer whose keys are all
turned back by the removed length has Oracle's distances. With every layer chosen that is Oracle, with none Direct.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..alignment.chat import render
from ..analysis.runs import check_ids
from ..errors import C2CError
from ..evaluation.letters import letter_logprobs, likeliest
from ..evaluation.statistics import accuracy
from ..evaluation.writing import add_rows, read_rows
from ..kv import CACHE, KV, Prefilled, Read, prefill_prompts
from ..models.load import LM
from ..progress import Bar
from ..rotary import Rotary
from ..tasks.base import Question
from ..tasks.prompts import answered, few_shot_head, unanswered
from . import study

POSITIONS = ("kept", "rotated")  # of the question's slots in Oracle
ROWS_AT_ONCE = 16  # mixed caches of one question that are scored together


# ---- prompts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shots:
    """What stands in front of a subject's questions, read once: `read` is head and exemplars, the first `head` tokens
    of which are the head."""

    read: Read
    head: int

    @property
    def removed(self) -> int:
        """Slots that Oracle loses."""
        return len(self.read.ids) - self.head


def shots_ids(lm: LM, subject: str, exemplars: Sequence[Question]) -> tuple[list[int], list[int]]:
    """The tokens of the head and of the exemplars. Each part is tokenized alone, so that its tokens are the same
    whatever stands beside it."""
    head = render(lm.need_tokenizer(), few_shot_head(subject)).ids
    return list(head), lm.continuation_ids("".join(map(answered, exemplars))) if exemplars else []


def read_shots(lm: LM, subject: str, exemplars: Sequence[Question]) -> Shots:
    head, rest = shots_ids(lm, subject, exemplars)
    ids = [*head, *rest]
    kv = prefill_prompts(lm, [[*ids, ids[-1]]]).kv  # the last token of a prompt is not read
    return Shots(Read(ids, kv), len(head))


# ---- caches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Caches:
    """One question's prompts: `direct`, `few_shot`, and Oracle's cache, of which `removed` slots behind the first
    `head` are gone; its keys are as they were prefilled."""

    direct: Prefilled
    few_shot: Prefilled
    enriched: KV
    head: int
    removed: int

    def oracle(self) -> Prefilled:
        """Oracle as it is, with the question's tokens at the positions at which they were read."""
        slots = torch.arange(self.direct.input_ids.shape[1], device=self.direct.input_ids.device)
        positions = slots + self.removed * (slots >= self.head)
        return replace(self.direct, kv=self.enriched, position_ids=positions[None])

    def aligned(self, rotary: Rotary, positions: str) -> KV:
        """Oracle's cache at Direct's positions: `kept`, with the same distances as before, for every key is turned
        back; `rotated`, with Direct's distances, for the head stays where it is."""
        start = 0 if positions == "kept" else self.head
        keys = self.enriched.keys.clone()
        moved = keys[:, 0, :, start:].transpose(1, 2)  # (L, T, H, D)
        # Keys are scaled already, so they turn without.
        turning = Rotary(rotary.inv_freq, torch.ones_like(rotary.scaling))
        layers = torch.arange(len(keys), device=keys.device)
        by = torch.full((moved.shape[1],), self.removed, device=keys.device)
        keys[:, 0, :, start:] = turning.turn(moved, layers, by, back=True).transpose(1, 2)
        return KV(keys, self.enriched.values)


def read_question(lm: LM, shots: Shots, question: str) -> Caches:
    ids = lm.continuation_ids(question)
    head = list(shots.read.ids[: shots.head])
    past = [shots.read]
    direct = prefill_prompts(lm, [[*head, *ids]], past=past)
    few_shot = prefill_prompts(lm, [[*shots.read.ids, *ids]], past=past)

    def without(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[..., : shots.head, :], tensor[..., shots.head + shots.removed :, :]], dim=-2)

    enriched = KV(without(few_shot.kv.keys), without(few_shot.kv.values))
    return Caches(direct, few_shot, enriched, shots.head, shots.removed)


def mixed(direct: Prefilled, enriched: KV, chosen: Tensor) -> Prefilled:
    """One prompt as many times as `chosen` (V, L) has rows, the chosen layers of each from the enriched cache."""
    pick = chosen.T[:, :, None, None, None]
    kv = KV(
        torch.where(pick, enriched.keys, direct.kv.keys),
        torch.where(pick, enriched.values, direct.kv.values),
    )
    count = len(chosen)
    return Prefilled(direct.input_ids.expand(count, -1), direct.attention_mask.expand(count, -1), kv)


# ---- sliding windows ------------------------------------------------------------------------------------------------


@contextmanager
def head_out_of_window(lm: LM, chosen: Tensor, head: int, removed: int) -> Iterator[None]:
    """Let sliding layers not see head slots that are outside the window by their positions.

    A model counts slots, and the removed ones no longer count: the head would come back into a window that it had left
    when the question was read.

    Args:
        chosen: (V, L), per prompt the layers that are at Oracle's distances.
        head, removed: see `Caches`.
    """
    config = lm.text_config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * lm.num_layers
    sliding = [i for i, kind in enumerate(kinds) if kind == "sliding_attention" and bool(chosen[:, i].any())]
    with ExitStack() as stack:
        for layer in sliding if window and removed else []:
            hide = partial(_hide, chosen=chosen[:, layer], head=head, removed=removed, window=int(window or 0))
            hook = study.attention(lm, layer).register_forward_pre_hook(hide, with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _hide(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, chosen: Tensor, head: int, removed: int, window: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer's attention with some head slots masked."""
    hidden_states: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    rows, length = hidden_states.shape[:2]
    mask, cache = kwargs["attention_mask"], kwargs[CACHE]
    before = cache.get_seq_length(module.layer_idx)
    query = torch.arange(before, before + length, device=hidden_states.device)[:, None]
    slot = torch.arange(before + length, device=hidden_states.device)
    far = (slot < head) & (query - slot + removed >= window)
    # A prompt with several continuations of several tokens comes once for each.
    of_row = chosen.to(far.device).repeat_interleave(rows // len(chosen))[:, None, None, None]
    if mask is None:
        mask = torch.zeros(1, 1, length, before + length, dtype=hidden_states.dtype, device=hidden_states.device)
        mask = mask.masked_fill(slot > query, torch.finfo(mask.dtype).min)
    if mask.dtype == torch.bool:
        mask = mask & ~(far & of_row)
    else:
        mask = mask.masked_fill(far & of_row, torch.finfo(mask.dtype).min)
    return args, {**kwargs, "attention_mask": mask}


# ---- which questions, which layers ----------------------------------------------------------------------------------

DIRECT, FEW_SHOT, ORACLE, ROTATED = "direct", "few-shot", "oracle", "oracle-rotated"


@dataclass(frozen=True)
class Asked:
    """A question and the half it belongs to: layers are chosen on half 0 and reported on half 1."""

    question: Question
    half: int


@dataclass(frozen=True)
class Row:
    """The letters' log-likelihoods of one question, for every cache that it was answered from.

    `tokens` is the length of Direct's prompt, `removed` that of the exemplars. Names of layer sets are `layer:3`,
    `bottom:4`, `top:4`, `best:2` and `worst:2`.
    """

    id: str
    subject: str
    half: int
    answer: int
    tokens: int
    removed: int
    logprobs: dict[str, list[float]]

    def right(self, name: str) -> bool:
        return likeliest(self.logprobs[name]) == self.answer


def choose(questions: Sequence[Question], limit: int | None, seed: int) -> list[Asked]:
    """`limit` questions, from every subject as many as from the others, and of each as many in either half."""
    generator = random.Random(seed)
    subjects: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        subjects[question.subject].append(question)
    for group in subjects.values():
        generator.shuffle(group)
    rounds = max(map(len, subjects.values()), default=0)
    chosen = [
        Asked(group[turn], (turn + place) % 2)
        for turn in range(rounds)
        for place, group in enumerate(subjects.values())
        if turn < len(group)
    ]
    return chosen[:limit]


def counts(num_layers: int) -> list[int]:
    """How many layers at once: at most nine numbers from 1 to one less than all."""
    steps = {1, 2, *(round(num_layers * eighth / 8) for eighth in range(1, 8))}
    return sorted(n for n in steps if 0 < n < num_layers)


def ranking(rows: Sequence[Row], num_layers: int) -> list[int]:
    """The layers, best first, by accuracy when enriched alone on the first half; ties by the right letter's
    log-likelihood."""
    mine = [row for row in rows if row.half == 0]
    if not mine:
        raise C2CError("no question is in the half on which layers are chosen; give more questions")

    def merit(layer: int) -> tuple[int, float]:
        name = f"layer:{layer}"
        return sum(row.right(name) for row in mine), sum(row.logprobs[name][row.answer] for row in mine)

    return sorted(range(num_layers), key=merit, reverse=True)


def layer_sets(num_layers: int, order: Sequence[int] | None) -> dict[str, list[int]]:
    """What is enriched, by name: each layer alone; and where `order` is known, from both ends and from both ends of
    the order."""
    sets = {f"layer:{layer}": [layer] for layer in range(num_layers)}
    for n in counts(num_layers) if order is not None else []:
        assert order is not None
        sets[f"bottom:{n}"] = list(range(n))
        sets[f"top:{n}"] = list(range(num_layers - n, num_layers))
        sets[f"best:{n}"] = sorted(order[:n])
        sets[f"worst:{n}"] = sorted(order[-n:])
    return sets


# ---- answers --------------------------------------------------------------------------------------------------------


def answer(
    lm: LM,
    question: Question,
    shots: Shots,
    *,
    sets: Mapping[str, Sequence[int]],
    positions: str,
    rotary: Rotary | None,
) -> tuple[dict[str, list[float]], int]:
    """The letters' log-likelihoods from every cache, and the length of Direct's prompt.

    Without a rotary embedding there are only Direct, Few-shot and Oracle.
    """
    caches = read_question(lm, shots, unanswered(question))
    every = torch.ones(1, lm.num_layers, dtype=torch.bool)

    def scored(prompt: Prefilled) -> list[list[float]]:
        return letter_logprobs(lm, prompt, [question] * len(prompt.input_ids))

    found = {DIRECT: scored(caches.direct)[0], FEW_SHOT: scored(caches.few_shot)[0]}
    with head_out_of_window(lm, every, caches.head, caches.removed):
        found[ORACLE] = scored(caches.oracle())[0]
    if rotary is None:
        return found, caches.direct.input_ids.shape[1]
    found[ROTATED] = scored(replace(caches.direct, kv=caches.aligned(rotary, "rotated")))[0]
    enriched = caches.aligned(rotary, positions)
    names = list(sets)
    for begin in range(0, len(names), ROWS_AT_ONCE):
        some = names[begin : begin + ROWS_AT_ONCE]
        chosen = torch.zeros(len(some), lm.num_layers, dtype=torch.bool)
        for row, name in enumerate(some):
            chosen[row, list(sets[name])] = True
        prompt = mixed(caches.direct, enriched, chosen.to(lm.device))
        with head_out_of_window(lm, chosen, caches.head, caches.removed if positions == "kept" else 0):
            found |= dict(zip(some, scored(prompt), strict=True))
    return found, caches.direct.input_ids.shape[1]


def ask_all(
    lm: LM,
    asked: Sequence[Asked],
    exemplars: Mapping[str, Sequence[Question]],
    path: Path,
    *,
    positions: str = "kept",
    layers: bool = True,
    progress: Callable[[int], None] = lambda questions: None,
) -> list[Row]:
    """Answer every question from every cache; what stands in the file already is not asked again.

    The first half goes first: the second one also tries the layers that did best and worst there. A subject's exemplars
    are read once and kept for both halves (57 subjects of 600 tokens take 2 GB with 1.5B parameters in float32).

    Args:
        lm: the receiver.
        asked: what to ask.
        exemplars: of each subject.
        path: JSONL file of the rows.
        positions: of Oracle's cache in the layer sets.
        layers: also layer by layer, which takes a rotary embedding that `Rotary` understands.
        progress: called with 1 for each question.
    """
    rotary = _rotary(lm) if layers else None
    done = read_rows(path, Row)
    have = {row.id for row in done}
    shots: dict[str, Shots] = {}
    for half in (0, 1):
        group = sorted((a for a in asked if a.half == half), key=lambda a: a.question.subject)
        order = ranking(done, lm.num_layers) if half and layers else None
        sets = layer_sets(lm.num_layers, order) if layers else {}
        for one in group:
            question, subject = one.question, one.question.subject
            if question.id not in have:
                if subject not in shots:
                    shots[subject] = read_shots(lm, subject, exemplars[subject])
                found, tokens = answer(lm, question, shots[subject], sets=sets, positions=positions, rotary=rotary)
                row = Row(question.id, subject, half, question.answer, tokens, shots[subject].removed, found)
                add_rows(path, [row])
                done.append(row)
            progress(1)
    ids = {a.question.id for a in asked}
    return [row for row in done if row.id in ids]


def _rotary(lm: LM) -> Rotary:
    try:
        return Rotary.of(lm)
    except C2CError as error:
        raise C2CError(f"layers can't be mixed: {error.args[0].rsplit('; ', 1)[0]}; give --no-layers") from error


# ---- the study ------------------------------------------------------------------------------------------------------


def summarize(rows: Sequence[Row], num_layers: int, layers: bool) -> dict[str, Any]:
    """Accuracies on all questions of the caches that nothing was chosen for; layer sets on the second half.

    Every cache but Direct's is compared with Direct's on the same questions.
    """

    def table(names: Sequence[str], mine: Sequence[Row]) -> dict[str, Any]:
        direct = [row.right(DIRECT) for row in mine]
        found = {}
        for name in names:
            right = [row.right(name) for row in mine]
            found[name] = accuracy(right)
            if name != DIRECT:
                found[name]["against_direct"] = study.against(right, direct)
        return found

    names = [name for name in (DIRECT, FEW_SHOT, ORACLE, ROTATED) if all(name in row.logprobs for row in rows)]
    result: dict[str, Any] = {
        "tokens": round(sum(row.tokens for row in rows) / len(rows), 1),
        "removed": round(sum(row.removed for row in rows) / len(rows), 1),
        "all": table(names, rows),
    }
    if not layers:
        return result
    first, second = ([row for row in rows if row.half == half] for half in (0, 1))
    if not second:
        raise C2CError("no question is in the half on which layers are reported; give more questions")
    order = ranking(rows, num_layers)
    return {
        **result,
        "num_layers": num_layers,
        "order": order,
        "chosen_on": table([DIRECT, ORACLE, *layer_sets(num_layers, None)], first),
        "reported_on": table([*names, *layer_sets(num_layers, order)], second),
    }


def fitting(
    lm: LM, questions: Sequence[Question], dev: Sequence[Question], shots: int, max_tokens: int
) -> tuple[list[Question], dict[str, list[Question]], list[str]]:
    """The questions whose subject has `shots` exemplars that are not too long; these; and the subjects left out.

    A question that is an exemplar itself is not asked: the answer would stand in front of it.
    """
    by_subject: dict[str, list[Question]] = defaultdict(list)
    for question in dev:
        by_subject[question.subject].append(question)
    exemplars, left_out = {}, []
    for subject in dict.fromkeys(q.subject for q in questions):
        some = by_subject[subject][:shots]
        if len(some) == shots and sum(map(len, shots_ids(lm, subject, some))) <= max_tokens:
            exemplars[subject] = some
        else:
            left_out.append(subject)
    shown = {(q.question, q.options) for some in exemplars.values() for q in some}
    kept = [q for q in questions if q.subject in exemplars and (q.question, q.options) not in shown]
    if exemplars and not kept:
        raise C2CError(
            f"all {len(questions)} questions are exemplars themselves; give other exemplars, or more questions"
        )
    if not kept:
        raise C2CError(
            f"none of {len(left_out)} subjects has {shots} exemplars of at most {max_tokens} tokens in all; give fewer "
            "shots, more tokens or other exemplars"
        )
    return kept, exemplars, left_out


def run(
    lm: LM,
    questions: Sequence[Question],
    dev: Sequence[Question],
    output: Path,
    *,
    shots: int = 5,
    limit: int | None = 300,
    max_tokens: int = 1024,
    positions: str = "kept",
    layers: bool = True,
    seed: int = 0,
    data: Mapping[str, Any] | None = None,
    command: str = "",
) -> dict[str, Any]:
    """The study; writes its folder's rows and numbers, and returns these.

    Args:
        lm: the receiver.
        questions, dev: what is asked, and where exemplars are taken from, by subject.
        output: folder.
        shots: exemplars.
        limit: questions; None: all.
        max_tokens: subjects whose exemplars are longer are left out.
        positions, layers: see `ask_all`.
        seed: of the draw of questions.
        data: what the settings say of where the questions come from.
        command: how the study was called, for the record.
    """
    if positions not in POSITIONS:
        raise C2CError(f"unknown positions {positions!r}; expected kept or rotated")
    kept, exemplars, left_out = fitting(lm, questions, dev, shots, max_tokens)
    check_ids("what is asked", kept)
    asked = choose(kept, limit, seed)
    if layers and len({one.half for one in asked}) < 2:
        raise C2CError(
            f"{len(asked)} question: layers are chosen on one half of the questions and reported on the other; give "
            "more questions, or --no-layers"
        )
    settings = {
        "receiver": study.described(lm),
        **(data or {}),
        "shots": shots,
        "limit": limit,
        "max_tokens": max_tokens,
        "positions": positions,
        "layers": layers,
        "exemplars_hash": hashlib.sha256(repr(sorted(exemplars.items())).encode()).hexdigest(),
    }
    about = study.begin(output, settings, "enrich", [a.question for a in asked], seed, command)
    with Bar() as bar:
        task = bar.add_task("enrich", total=len(asked))
        rows = ask_all(
            lm, asked, exemplars, output / "rows.jsonl", positions=positions, layers=layers,
            progress=lambda n: bar.advance(task, n),
        )  # fmt: skip
    results = {"left_out": left_out, **summarize(rows, lm.num_layers, layers)}
    return study.finish(output, about, results)
