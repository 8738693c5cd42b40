"""Accuracy by option likelihood, against stock transformers; and the control, which must never see its own question."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cache2cache import C2C, C2CError
from cache2cache.alignment.chat import render
from cache2cache.decode import score
from cache2cache.evaluation import asking, runner
from cache2cache.evaluation.answers import Answer
from cache2cache.evaluation.controls import fuse_others, next_rows, rows_of, with_others_cache
from cache2cache.evaluation.runner import batches_of, evaluate
from cache2cache.evaluation.writing import Written
from cache2cache.kv import CACHE, KV, pad_left, prefill, prefill_prompts
from cache2cache.methods import METHODS as streaming
from cache2cache.methods import Ask, text_to_text
from cache2cache.methods.text_to_text import BACKGROUND
from cache2cache.models import LM
from cache2cache.pair import FusedCache, PromptIds
from cache2cache.tasks import OpenQuestion, Question, load
from cache2cache.tasks.prompts import ANSWER_PREFIX, extract_letter, paper_prompt, short_prompt
from cache2cache.training.store import Store
from training.runs import pair_of, write_questions


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    made = load(str(write_questions(tmp_path / "questions.jsonl", 9)))
    assert sorted({len(q.options) for q in made}) == [3, 4, 5]
    return made


def by_method(answers: list[Answer], method: str) -> dict[str, Answer]:
    return {a.id: a for a in answers if a.method == method}


def letters_of_stock(lm: LM, prompt: str, letters: str) -> list[float]:
    """The letters' log-likelihoods behind the prompt, each from one ordinary forward pass over everything."""
    tokenizer = lm.need_tokenizer()
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + ANSWER_PREFIX
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = []
    for letter in letters:
        more = tokenizer(f" {letter}", add_special_tokens=False)["input_ids"]
        logprobs = lm.model(torch.tensor([ids + more])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        found.append(logprobs.gather(1, torch.tensor(more)[:, None]).sum().item())
    return found


# ---- what is measured -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "text_of"), [("paper", paper_prompt), ("short", short_prompt)])
@pytest.mark.parametrize(("receiver", "sharer"), [("llama", "qwen3"), ("gemma3", "llama"), ("qwen2", "gemma3")])
def test_each_model_alone_answers_as_in_stock_transformers(
    receiver: str, sharer: str, prompt: str, text_of: Any, questions: list[Question], tmp_path: Path
) -> None:
    pair = pair_of(receiver, sharer)
    answers = evaluate(pair, "own", questions, tmp_path / "samples.jsonl", prompt=prompt, batch_size=4)
    assert len(answers) == 4 * 9
    for method, lm in (("receiver", pair.receiver), ("sharer", pair.sharers[0])):
        mine = by_method(answers, method)
        choices = set()
        for question in questions:
            answer = mine[question.id]
            expected = letters_of_stock(lm, text_of(question), question.letters)
            assert answer.logprobs == pytest.approx(expected, abs=1e-3)
            assert answer.choice == expected.index(max(expected)) < len(question.options)
            assert answer.correct == (answer.choice == question.answer)
            assert (answer.task, answer.prompt) == ("own", prompt)
            choices.add(answer.choice)
        assert len({tuple(a.logprobs) for a in mine.values()}) == 9 and choices
    assert by_method(answers, "receiver") != by_method(answers, "sharer")


def test_closed_gates_answer_as_the_receiver(questions: list[Question], tmp_path: Path) -> None:
    answers = evaluate(pair_of(gate_init=0.0), "own", questions, tmp_path / "samples.jsonl")
    alone = by_method(answers, "receiver")
    for method in ("c2c", "other"):
        mine = by_method(answers, method)
        assert {i: a.choice for i, a in mine.items()} == {i: a.choice for i, a in alone.items()}
        for i, answer in mine.items():
            assert answer.logprobs == pytest.approx(alone[i].logprobs, abs=1e-4)


def test_c2c_answers_from_the_fused_cache(questions: list[Question], tmp_path: Path) -> None:
    """As `pair.score` does one question at a time, and the control as on the other question's cache."""
    pair = pair_of()
    answers = evaluate(pair, "own", questions, tmp_path / "samples.jsonl", prompt="short", batch_size=9)
    chats = {q.id: [{"role": "user", "content": short_prompt(q)}] for q in questions}
    for question in questions:
        letters = [f" {letter}" for letter in question.letters]
        expected = [s.logprob for s in pair.score(chats[question.id], letters, prefix=ANSWER_PREFIX)]
        assert by_method(answers, "c2c")[question.id].logprobs == pytest.approx(expected, abs=1e-3)
    encoded = {i: pair.encode(chat, prefix=ANSWER_PREFIX) for i, chat in chats.items()}
    order = sorted(encoded, key=lambda i: (len(encoded[i].sharers[0]), i))
    for place, i in enumerate(order):
        mixed = with_others_cache(encoded[i], encoded[order[(place + 1) % 9]])
        letters = [f" {letter}" for letter in next(q for q in questions if q.id == i).letters]
        expected = [s.logprob for s in pair.score(mixed, letters)]
        got = by_method(answers, "other")[i].logprobs
        assert got == pytest.approx(expected, abs=1e-3)
        assert got != pytest.approx(by_method(answers, "c2c")[i].logprobs, abs=1e-3)


# ---- the control ----------------------------------------------------------------------------------------------------


def prompts_of(pair: C2C) -> list[PromptIds]:
    texts = [
        "Which is it?\nA. iron\nB. water\nAnswer.",
        "What?\nA. x\nB. yes\nAnswer.",
        "Plants and light, which? Answer.",
    ]
    return [pair.encode([{"role": "user", "content": t}], prefix=ANSWER_PREFIX) for t in texts]


def caches_of(pair: C2C, prompts: list[PromptIds]) -> KV:
    return prefill(pair.sharers[0], *pad_left([p.sharers[0] for p in prompts], 0, "cpu"))


def control(pair: C2C, prompts: list[PromptIds], cache: KV) -> FusedCache:
    turned = next_rows(len(prompts))
    theirs = rows_of([(cache, [len(p.sharers[0]) for p in prompts])], turned)
    clean = prefill_prompts(pair.receiver, [p.receiver for p in prompts])
    return fuse_others(pair, prompts, [prompts[i] for i in turned], clean, theirs)


def test_the_control_reads_the_next_question_alone() -> None:
    """Damage one question's cache: only the question before it, in the circle of the batch, may notice."""
    pair = pair_of()
    prompts = prompts_of(pair)
    for damaged in range(3):
        cache = caches_of(pair, prompts)
        cache.keys[:, damaged] = cache.values[:, damaged] = float("nan")
        fused = control(pair, prompts, cache).kv
        noticed = []
        for row, prompt in enumerate(prompts):
            mine = fused.keys[:, row, :, fused.length - len(prompt.receiver) + 1 :]
            noticed.append(bool(mine.isnan().any()))
        assert noticed == [row == (damaged - 1) % 3 for row in range(3)]


def test_the_control_is_the_fuser_on_the_others_cache() -> None:
    """Position by position, with a fuser that leaves nothing of the receiver's own cache ("project")."""
    pair = pair_of(residual=False, gating=False)
    with torch.no_grad():
        pair.fusers[0].in_receiver.weight.zero_()
    prompts = prompts_of(pair)
    assert len({len(p.sharers[0]) for p in prompts}) == 3
    fused = control(pair, prompts, caches_of(pair, prompts))
    for row, prompt in enumerate(prompts):
        other = prompts[(row + 1) % 3]
        theirs, mine = other.sharers[0], prompt.sharers[0]
        layers = pair.sharers[0].model(torch.tensor([theirs]))[CACHE].layers
        sharer = KV(torch.stack([x.keys for x in layers]), torch.stack([x.values for x in layers]))
        length = len(prompt.receiver) - 1
        blank = KV(torch.zeros(3, 1, 3, length, 8), torch.zeros(3, 1, 3, length, 8))
        positions = [(t, s) for t, s in enumerate(prompt.maps[0][:-1]) if s >= 0]
        # Counted from the end, where both prompts have the same template; before its start its first token.
        where = [(0, t, 0, max(0, len(theirs) - (len(mine) - s))) for t, s in positions]
        with torch.no_grad():
            expected = pair.fusers[0](blank, sharer, torch.tensor(where).T)
        at = [t for t, _ in positions]
        start = fused.kv.length - length
        torch.testing.assert_close(
            fused.kv.keys[:, row, :, start:][:, :, at], expected.keys[:, 0][:, :, at], atol=1e-4, rtol=1e-4
        )
        assert len(at) > 20 and fused.fused_positions[row] == len(at)


def test_the_last_tokens_keep_their_partners() -> None:
    mine = PromptIds([1, 2, 3, 4], [[10, 11, 12, 13, 14]], [[-1, 0, 3, 4]])
    longer = PromptIds([5], [[20, 21, 22, 23, 24, 25, 26]], [[0]])
    shorter = PromptIds([5], [[30, 31, 32]], [[0]])
    assert with_others_cache(mine, longer) == PromptIds(mine.receiver, longer.sharers, [[-1, 2, 5, 6]])
    assert with_others_cache(mine, shorter) == PromptIds(mine.receiver, shorter.sharers, [[-1, 0, 1, 2]])


def test_a_single_question_has_no_other(questions: list[Question], tmp_path: Path) -> None:
    with pytest.raises(C2CError, match="the control other needs another question; give at least two"):
        evaluate(pair_of(), "own", questions[:1], tmp_path / "samples.jsonl")
    assert len(evaluate(pair_of(), "own", questions[:1], tmp_path / "s.jsonl", methods=["receiver", "c2c"])) == 2


def test_no_batch_holds_a_single_question() -> None:
    for count in range(2, 70):
        items: list[Any] = list(range(count))
        for size in range(2, 20):
            made = batches_of(items, size)
            assert [i for batch in made for i in batch] == items
            assert all(2 <= len(batch) <= max(size, 3) for batch in made)
            assert max(map(len, made)) - min(map(len, made)) <= 1


# ---- samples --------------------------------------------------------------------------------------------------------


def test_a_cut_samples_file_is_completed(
    questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, path = pair_of(), tmp_path / "samples.jsonl"
    told: list[int] = []
    once = evaluate(pair, "own", questions, path, batch_size=4, progress=told.append)
    whole = path.read_bytes()
    assert told == [3, 3, 3] and whole.count(b"\n") == 36
    first_lines = len(b"".join(whole.splitlines(keepends=True)[:17]))
    for cut in (first_lines + 30, first_lines, len(whole) - 1, 5, 0):
        path.write_bytes(whole[:cut])
        again = evaluate(pair, "own", questions, path, batch_size=4)
        assert path.read_bytes() == whole
        assert again == once
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("samples.jsonl", "questions.jsonl")] == []

    def never(*_: Any) -> None:
        raise AssertionError("everything has been answered")

    monkeypatch.setattr(runner, "_answered", never)
    assert len(evaluate(pair, "own", questions, path, batch_size=4)) == 36


def test_a_cut_file_with_skipped_questions_is_completed(questions: list[Question], tmp_path: Path) -> None:
    pair, path = pair_of(), tmp_path / "samples.jsonl"
    alone = evaluate(pair, "own", questions, path, batch_size=4, methods=["receiver"])
    sure = sorted(a.confidence for a in alone if a.confidence is not None)
    options: dict[str, Any] = {"methods": ["receiver", "skip"], "skip": (sure[4] + sure[5]) / 2, "batch_size": 4}
    path.unlink()
    once = evaluate(pair, "own", questions, path, **options)
    whole = path.read_bytes()
    assert whole.count(b"\n") == 18
    for cut in (len(whole) // 2, len(whole) - 1, 0):
        path.write_bytes(whole[:cut])
        assert sorted(evaluate(pair, "own", questions, path, **options), key=str) == sorted(once, key=str)
        assert path.read_bytes() == whole
    c2c = by_method(evaluate(pair, "own", questions, tmp_path / "all.jsonl", batch_size=4), "c2c")
    skipped, own = by_method(once, "skip"), by_method(once, "receiver")
    assert sum(bool(a.skipped) for a in skipped.values()) == 4
    for i, answer in skipped.items():
        assert answer.skipped == (own[i].confidence > options["skip"])  # type: ignore[operator]
        assert answer.logprobs == pytest.approx((own if answer.skipped else c2c)[i].logprobs, abs=1e-4)
        assert own[i].skipped is None and answer.confidence is None


@pytest.mark.usefixtures("in_one_pass")
def test_the_method_skip_reads_with_the_sharer_only_what_it_must(questions: list[Question], tmp_path: Path) -> None:
    pair = pair_of()
    seen: list[int] = []
    pair.sharers[0].decoder.layers[0].register_forward_pre_hook(lambda m, a: seen.append(len(a[0])))  # type: ignore[union-attr, index]
    evaluate(pair, "own", questions, tmp_path / "a.jsonl", methods=["receiver", "skip"], skip=0.0)
    assert seen == []
    evaluate(pair, "own", questions, tmp_path / "b.jsonl", methods=["receiver", "skip"], skip=1.0)
    assert seen == [1, 9]  # what all of them begin with, and the rest of each


def test_only_what_is_asked_for_comes_back(questions: list[Question], tmp_path: Path) -> None:
    """One file holds several tasks and prompts; fewer questions or methods later give fewer answers."""
    pair, path = pair_of(), tmp_path / "samples.jsonl"
    evaluate(pair, "one", questions, path)
    evaluate(pair, "two", questions[:4], path, prompt="short", methods=["receiver"])
    assert len(path.read_text().splitlines()) == 40
    evaluate(pair, "three", questions[:2], path, methods=["receiver"])
    assert len(path.read_text().splitlines()) == 42
    again = evaluate(pair, "one", questions[2:5], path, methods=["c2c", "receiver"])
    assert {(a.id, a.method) for a in again} == {(q.id, m) for q in questions[2:5] for m in ("c2c", "receiver")}
    assert all((a.task, a.prompt) == ("one", "paper") for a in again) and len(again) == 6
    assert len(path.read_text().splitlines()) == 42
    more = evaluate(pair, "two", questions[:4], path, prompt="short", methods=["receiver", "c2c"])
    assert len(more) == 8 and len(path.read_text().splitlines()) == 46


def test_wrong_input(questions: list[Question], tmp_path: Path) -> None:
    pair, path = pair_of(), tmp_path / "samples.jsonl"
    with pytest.raises(C2CError, match="unknown prompt 'long'; expected one of paper, short"):
        evaluate(pair, "own", questions, path, prompt="long")
    with pytest.raises(C2CError, match="unknown method 'words'; expected one of receiver, sharer, c2c, other"):
        evaluate(pair, "own", questions, path, methods=["c2c", "words"])
    with pytest.raises(C2CError, match="the method skip needs a threshold"):
        evaluate(pair, "own", questions, path, methods=["skip"])
    with pytest.raises(C2CError, match="expected a confidence from 0"):
        evaluate(pair, "own", questions, path, methods=["skip"], skip=2.0)
    with pytest.raises(C2CError, match="two questions of own have the same id"):
        evaluate(pair, "own", [questions[0], replace(questions[1], id=questions[0].id)], path)
    assert not path.exists()
    for content in ('{"other": 1}\n', "text\n", "[]\n", json.dumps([1]) + "\n"):
        path.write_text(content)
        with pytest.raises(
            C2CError, match=r"samples.jsonl holds other rows than answers \(.*\); choose another output"
        ):
            evaluate(pair, "own", questions, path)
        assert path.read_text() == content


# ---- from a store ---------------------------------------------------------------------------------------------------


def lengths_read(lm: LM) -> list[int]:
    """A list that every pass through the model adds its number of tokens to."""
    seen: list[int] = []
    lm.decoder.layers[0].register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[1]))  # type: ignore[union-attr, index]
    return seen


@pytest.mark.parametrize(("precision", "close"), [("bfloat16", 0.05), ("int8", 0.2)])
def test_a_store_is_filled_once_and_then_read(
    precision: Any, close: float, questions: list[Question], tmp_path: Path
) -> None:
    pair = pair_of(gate_init=1.0)
    live = evaluate(pair, "own", questions, tmp_path / "live.jsonl", batch_size=4)
    store = Store(tmp_path / "store", pair.sharers[0], precision)
    seen = lengths_read(pair.sharers[0])
    first = evaluate(pair, "own", questions, tmp_path / "1.jsonl", batch_size=4, store=store)
    assert any(n > 1 for n in seen) and len(store.index) == 9
    seen.clear()
    # Another process, a fuser with other weights: the sharer reads its last token and a letter's first, for its own
    # answers, and nothing else.
    other = pair_of(gate_init=1.0, hidden_dim=16)
    for lm in other.sharers:
        seen = lengths_read(lm)
    again = Store(tmp_path / "store", other.sharers[0])
    second = evaluate(other, "own", questions, tmp_path / "2.jsonl", batch_size=4, store=again)
    assert seen == [2, 2, 2]
    shards = sorted((tmp_path / "store").glob("shard-*"))
    assert sorted(set(again.index)) == sorted(store.index) and len(shards) == 3
    assert by_method(second, "sharer") == by_method(first, "sharer")
    assert by_method(second, "c2c") != by_method(first, "c2c")
    for method in ("receiver", "sharer", "c2c", "other"):
        exact = by_method(live, method)
        for i, answer in by_method(first, method).items():
            assert answer.logprobs == pytest.approx(exact[i].logprobs, abs=0 if method == "receiver" else close)
    assert by_method(first, "c2c") != by_method(live, "c2c")  # it was read from what was rounded


def test_layers_that_only_the_sharer_needs_are_left(questions: list[Question], tmp_path: Path) -> None:
    """Without the method sharer only the fuser's layers are read from the store, and that changes nothing."""
    pair = pair_of()
    store = Store(tmp_path / "store", pair.sharers[0], "bfloat16")
    every = evaluate(pair, "own", questions, tmp_path / "1.jsonl", store=store)
    asked: list[Any] = []
    read = store.read

    def reading(*args: Any, **kwargs: Any) -> KV:
        asked.append(kwargs["layers"])
        return read(*args, **kwargs)

    store.read = reading  # type: ignore[method-assign]
    few = evaluate(pair, "own", questions, tmp_path / "2.jsonl", store=store, methods=["c2c", "other"])
    assert asked == [(1, 4)]
    for method in ("c2c", "other"):
        assert by_method(few, method) == by_method(every, method)


def test_skipping_reads_the_store(questions: list[Question], tmp_path: Path) -> None:
    pair = pair_of()
    store = Store(tmp_path / "store", pair.sharers[0], "bfloat16")
    alone = evaluate(pair, "own", questions, tmp_path / "1.jsonl", store=store, methods=["receiver", "c2c"])
    sure = sorted(a.confidence for a in alone if a.confidence is not None)
    seen = lengths_read(pair.sharers[0])
    options: dict[str, Any] = {"methods": ["skip"], "skip": (sure[4] + sure[5]) / 2, "store": store}
    skipped = by_method(evaluate(pair, "own", questions, tmp_path / "2.jsonl", **options), "skip")
    assert seen == [] and sum(bool(a.skipped) for a in skipped.values()) == 4
    for i, answer in skipped.items():
        same = by_method(alone, "receiver" if answer.skipped else "c2c")[i]
        assert answer.logprobs == pytest.approx(same.logprobs, abs=1e-4)


def test_a_store_that_would_grow_too_large(questions: list[Question], tmp_path: Path) -> None:
    pair = pair_of()
    store = Store(tmp_path / "store", pair.sharers[0], "bfloat16")
    with pytest.raises(C2CError, match=r"GB, the limit is 0\.0 GB"):
        evaluate(pair, "own", questions, tmp_path / "s.jsonl", store=store, max_bytes=1000)
    assert not (tmp_path / "store").exists() and not (tmp_path / "s.jsonl").exists()
    alone = evaluate(pair, "own", questions, tmp_path / "s.jsonl", store=store, max_bytes=0, methods=["receiver"])
    assert len(alone) == 9 and not (tmp_path / "store").exists()


# ---- methods that write ---------------------------------------------------------------------------------------------


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models hardly ever come to an end."""
    for module in (asking, text_to_text):
        monkeypatch.setattr(module, "MAX_MESSAGE_TOKENS", 12)


WRITTEN: dict[str, Any] = {"methods": ["receiver", "text"], "answers": "both", "max_new_tokens": 16}


@pytest.mark.usefixtures("brief")
def test_written_answers_are_those_of_one_by_one(questions: list[Question], tmp_path: Path) -> None:
    """As the streaming methods of `cache2cache.methods` write, question by question; in every form and from fused
    caches too."""
    pair, questions = pair_of(gate_init=1.0), questions[:5]
    methods = ["receiver", "sharer", "c2c", "text", "text-options", "text-answer"]
    options: dict[str, Any] = {"methods": methods, "answers": "both", "max_new_tokens": 16}
    answers = evaluate(pair, "own", questions, tmp_path / "s.jsonl", prompt="short", batch_size=4, **options)
    assert len(answers) == 5 * 6 * 2
    for question in questions:
        ask = Ask.of(question)
        for method in methods:
            mine = by_method([a for a in answers if a.answers == "generation"], method)[question.id]
            *_, alone = streaming[method](pair, ask, 16)
            assert mine.text is not None and mine.text.rstrip("\ufffd") == alone.text.rstrip("\ufffd"), method
            assert mine.logprobs == [] and (mine.tokens or 0) <= alone.new_tokens <= (mine.tokens or 0) + 1
            letter = extract_letter(alone.text, len(question.options))
            assert mine.choice == (-1 if letter is None else question.letters.index(letter))
            assert mine.correct == (mine.choice == question.answer)
        relayed = by_method([a for a in answers if a.answers == "likelihood"], "text")[question.id]
        *_, told = streaming["text"](pair, ask, 1)
        assert relayed.message == told.message and relayed.text is None
        chat = [
            {"role": "user", "content": BACKGROUND.format(question=question.question)},
            {"role": "assistant", "content": told.message},
            {"role": "user", "content": short_prompt(question)},
        ]
        ids = render(pair.receiver.need_tokenizer(), chat, prefix=ANSWER_PREFIX).ids
        letters = [pair.receiver.continuation_ids(f" {letter}") for letter in question.letters]
        ((*scores,),) = score(pair.receiver, prefill_prompts(pair.receiver, [ids]), [letters])
        assert relayed.logprobs == pytest.approx([s.logprob for s in scores], abs=1e-3)


@pytest.mark.usefixtures("brief")
def test_messages_are_written_in_larger_batches(
    questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times as many at once as are answered, the same ones; where that fails each batch tries for itself."""
    pair, wrote, bound = pair_of(), [], [100]
    original = asking.write

    def counted(lm: LM, rows: Any, limit: int) -> list[Written]:
        wrote.append(len(rows))
        if len(rows) > bound[0]:
            raise RuntimeError("no memory")
        return original(lm, rows, limit)

    monkeypatch.setattr(asking, "write", counted)

    def texts(name: str, **options: Any) -> dict[str, Any]:
        wrote.clear()
        rows = evaluate(pair, "own", questions, tmp_path / name, methods=["text"], **options)
        return {a.id: (a.message, a.message_tokens, a.choice) for a in rows if a.error is None}

    alone = texts("alone", batch_size=1)
    assert wrote == [1] * 9 and len(alone) == 9
    assert texts("together", batch_size=2) == alone and wrote == [4, 5]
    monkeypatch.setattr(runner, "MESSAGE_POSITIONS", 1)  # long prompts
    assert texts("long", batch_size=2) == alone and wrote == [2, 2, 2, 1, 2]
    monkeypatch.undo()
    monkeypatch.setattr(asking, "MAX_MESSAGE_TOKENS", 12)
    monkeypatch.setattr(asking, "write", counted)
    bound[0] = 3
    assert texts("failing", batch_size=2) == alone and wrote == [4, 2, 2, 5, 2, 2, 1]


def test_prompts_with_messages_of_like_length_are_answered_together(
    questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = asking.Setup(pair_of())
    methods = ["receiver", "text", "text-answer"]
    (alone, *more), _ = runner.plan(setup, "own", questions, methods=methods, answers="both", batch_size=3)
    (unit,) = [u for u in more if len(u.cases) == 9]
    receiver = setup.pair.receiver
    assert alone.batches(receiver, {}) == [alone]  # these are of like length already
    words = {q.id: [7 * i % 9, 4 * i % 9] for i, q in enumerate(questions)}
    messages = {
        ("own", form, name): ("word " * 200 * counts[j], 0)
        for j, form in enumerate(("text", "text-answer"))
        for name, counts in words.items()
    }
    batches = unit.batches(receiver, messages)
    for j, form in enumerate(("text", "text-answer")):
        mine = [b for b in batches if b.asked == [("likelihood", form), ("generation", form)]]
        assert [len(b.cases) for b in mine] == [3, 3, 3]
        assert [words[c.id][j] for b in mine for c in b.cases] == list(range(9))
    assert len(batches) == 6 and sorted(k for b in batches for k in b.keys) == sorted(unit.keys)
    monkeypatch.setattr(runner, "POSITIONS", 3000)
    tokenizer, smaller = receiver.need_tokenizer(), unit.batches(receiver, messages)
    for batch in smaller:
        ((_, form), *_) = batch.asked
        texts = [messages[c.task, form, c.id][0] + c.ask.prompt for c in batch.cases]
        assert len(batch.cases) in (1, 2, 3)
        assert len(batch.cases) == 1 or max(len(tokenizer(t)["input_ids"]) for t in texts) * len(texts) <= 3000
    assert len(smaller) > 6 and sorted(k for b in smaller for k in b.keys) == sorted(unit.keys)


@pytest.mark.usefixtures("brief", "in_one_pass")
def test_a_prompt_is_read_once_for_both_ways(questions: list[Question], tmp_path: Path) -> None:
    """What is answered in words begins like what options are compared behind."""
    pair, examples = pair_of(gate_init=1.0), questions[5:]
    seen = [lengths_read(lm) for lm in (pair.receiver, *pair.sharers)]
    methods = ["receiver", "sharer", "c2c", "text", "few-shot"]
    options: dict[str, Any] = {"methods": methods, "max_new_tokens": 4, "examples": examples, "shots": 2}
    made, prompts = {}, {}
    for answers in ("likelihood", "generation", "both"):
        made[answers] = evaluate(
            pair, "own", questions[:5], tmp_path / f"{answers}.jsonl", answers=answers, batch_size=8, **options
        )
        # The rest is answers, token by token; generate reads one token for them, score a few.
        prompts[answers] = [sum(n > 8 for n in lengths) for lengths in seen]
        for lengths in seen:
            lengths.clear()
    # What all begin with, and the rest of each: by the receiver for itself and C2C, for text, and for few-shot; by the
    # sharer for C2C and itself, and for its message.
    assert prompts == {"likelihood": [6, 4], "generation": [6, 4], "both": [6, 4]}
    alone = {a.key: a for way in ("likelihood", "generation") for a in made[way]}
    assert len(alone) == len(made["both"]) == 2 * 5 * 5
    for answer in made["both"]:
        assert (answer.text, answer.choice) == (alone[answer.key].text, alone[answer.key].choice)
        assert answer.logprobs == pytest.approx(alone[answer.key].logprobs, abs=1e-4)


def test_examples_are_read_once_a_batch(tmp_path: Path) -> None:
    """Questions of one subject are asked together behind their examples; the answers are those of one by one."""
    asked = [
        Question(f"q{i}", f"Which {'plant ' * (i % 3)}is {i}?", ("a", "b", "c"), i % 3, subject="xy"[i % 2])
        for i in range(10)
    ]
    examples = [replace(q, id=f"e{q.id}", question=f"An example: {q.question * 5}") for q in asked]
    pair = pair_of()
    seen = lengths_read(pair.receiver)
    options: dict[str, Any] = {"methods": ["few-shot"], "examples": examples, "shots": 3}
    together = evaluate(pair, "own", asked, tmp_path / "s.jsonl", batch_size=8, **options)
    read = list(seen)
    seen.clear()
    alone = evaluate(pair, "own", asked, tmp_path / "t.jsonl", batch_size=1, **options)
    # Each subject's five prompts take one pass over the examples and a short one over the questions.
    prompts = [n for n in read if n > 8]
    assert len(prompts) == 4 and sum(prompts) < 2.7 * sum(n for n in seen if n > 8) / 10
    for one, other in zip(*(sorted(made, key=lambda a: a.id) for made in (together, alone)), strict=True):
        assert (one.id, one.choice) == (other.id, other.choice)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_an_answer_in_words_is_right_or_wrong(
    questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = iter(["The correct answer is A.", "No idea.", "C"] * 3)
    monkeypatch.setattr(asking, "write_on", lambda lm, state, n: [Written([], next(texts), True) for _ in n])
    answers = evaluate(pair_of(), "own", questions, tmp_path / "s.jsonl", methods=["receiver-generate"], batch_size=9)
    assert [a.choice for a in answers] == [0, -1, 2] * 3
    assert {(a.method, a.answers) for a in answers} == {("receiver", "generation")}
    right = {q.id: q.answer for q in questions}
    assert [a.correct for a in answers] == [a.choice == right[a.id] for a in answers]
    assert not any(a.correct for a in answers if a.choice == -1) and any(a.correct for a in answers)


@pytest.mark.usefixtures("brief")
def test_written_answers_are_completed(
    questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a message that is known isn't written again."""
    pair, path = pair_of(), tmp_path / "samples.jsonl"
    once = evaluate(pair, "own", questions[:4], path, batch_size=2, **WRITTEN)
    whole = path.read_bytes()
    assert whole.count(b"\n") == 16
    for cut in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        again = evaluate(pair, "own", questions[:4], path, batch_size=2, **WRITTEN)
        assert path.read_bytes() == whole and again == once
    likely = [line for line in whole.splitlines(keepends=True) if b"likelihood" in line]
    path.write_bytes(b"".join(likely))
    monkeypatch.setattr(asking, "write", lambda *_: pytest.fail("the messages are known"))
    assert evaluate(pair, "own", questions[:4], path, batch_size=2, **WRITTEN) == once and path.read_bytes() == whole


def test_the_control_is_given_another_text() -> None:
    """Questions about one text are of like length, and so neighbours."""
    setup = asking.Setup(pair_of())

    def given(documents: str, batch_size: int = 4) -> str:
        rows = [
            OpenQuestion(f"q{n}", f"What is it about, {n}?", ("a",), "f1", 4, document=text.strip())
            for n, text in enumerate(documents)
        ]
        units, _ = runner.plan(setup, "own", rows, methods=["c2c", "other"], batch_size=batch_size)
        return "".join(p.id[1:] for unit in units for p in unit.partners)

    assert given("    ") == "1230"  # each about its own
    assert given("aabb") == "2200"
    assert given("aaab") == "3330"
    assert given("aaaabb", batch_size=2) == "444400"  # from another batch
    assert given("aaaa") == "1230"  # there is no other
