"""Bits per byte and greedy answers: by hand, against plain forward passes, and what gets left out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cache2cache import C2C, C2CError, decode
from cache2cache.config import DataSource
from cache2cache.evaluation import chat
from cache2cache.evaluation.chat import (
    SCORED,
    Scored,
    cases_of,
    distinct,
    fluency,
    held_out,
    repeats,
    score_rows,
    speak,
    summarize,
    to_answer,
)  # fmt: skip
from cache2cache.evaluation.controls import with_others_cache
from cache2cache.evaluation.writing import Written, written
from cache2cache.training.data import Example, examples, split
from cache2cache.training.store import Store
from training.runs import config_of, lm_of, pair_of, write_rows

TEXTS = {"What is iron?": "A metal. 铁", "Why is water wet?": "It is.", "Plants, and light": "北 light, water and air"}


def rows_of(texts: dict[str, str] = TEXTS) -> list[Example]:
    return [
        Example(f"own:{n}", ({"role": "user", "content": asked},), "", said)
        for n, (asked, said) in enumerate(texts.items())
    ]


def by_method(scores: list[Scored]) -> dict[str, dict[str, Scored]]:
    return {m: {s.id: s for s in scores if s.method == m} for m in SCORED}


# ---- bits per byte --------------------------------------------------------------------------------------------------


def test_a_uniform_model_by_hand(tmp_path: Path) -> None:
    """Every token of a vocabulary of V costs log2 V bits, whatever the cache."""
    pair = pair_of(gate_init=1.0)
    for lm in (pair.receiver, *pair.sharers):
        lm.model.get_output_embeddings().weight.zero_()  # type: ignore[union-attr, operator]
    summary = summarize(score_rows(pair, cases_of(pair, rows_of(), 500), tmp_path / "s.jsonl"))
    size = sum(len(text.encode()) for text in TEXTS.values())
    assert summary["bytes"] == size == 12 + 6 + 24 and summary["rows"] == 3
    for method in SCORED:
        lm = pair.sharers[0] if method == "sharer" else pair.receiver
        tokens = sum(len(lm.need_tokenizer()(t, add_special_tokens=False)["input_ids"]) for t in TEXTS.values())
        assert summary[method]["tokens"] == tokens
        assert summary[method]["bits_per_byte"] == pytest.approx(tokens * math.log2(lm.vocab_size) / size, abs=1e-4)


@pytest.mark.parametrize(("receiver", "sharer"), [("llama", "qwen3"), ("gemma3", "llama")])
def test_each_model_alone_as_in_stock_transformers(receiver: str, sharer: str, tmp_path: Path) -> None:
    pair = pair_of(receiver, sharer)
    found = by_method(score_rows(pair, cases_of(pair, rows_of(), 500), tmp_path / "s.jsonl"))
    for method, lm in (("receiver", pair.receiver), ("sharer", pair.sharers[0])):
        tokenizer = lm.need_tokenizer()
        for n, (asked, said) in enumerate(TEXTS.items()):
            turns = [{"role": "user", "content": asked}]
            ids = tokenizer(
                tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True),
                add_special_tokens=False,
            )["input_ids"]
            more = tokenizer(said, add_special_tokens=False)["input_ids"]
            logits = lm.model(torch.tensor([ids + more])).logits[0, len(ids) - 1 : -1]
            nll = torch.nn.functional.cross_entropy(logits, torch.tensor(more), reduction="sum").item()
            assert found[method][f"own:{n}"].nll == pytest.approx(nll, abs=1e-2)
            assert found[method][f"own:{n}"].bytes == len(said.encode())


def test_closed_gates_are_the_receiver(tmp_path: Path) -> None:
    """To the last digit, in its likelihoods and in its words."""
    pair = pair_of(gate_init=0.0)
    cases = cases_of(pair, rows_of(), 500)
    scores = score_rows(pair, cases, tmp_path / "s.jsonl")
    found = by_method(scores)
    for method in ("c2c", "other"):
        assert [s.nll for s in found[method].values()] == [s.nll for s in found["receiver"].values()]
    summary = summarize(scores)
    assert summary["c2c"]["difference"] == 0 and summary["c2c"]["interval"] == [0, 0]
    assert summary["c2c"]["closed"] in (0, None) and summary["sharer"]["difference"] != 0
    answers = speak(pair, cases, tmp_path / "a.jsonl", 12)
    said = {m: [(a.id, a.text, a.tokens, a.ended) for a in answers if a.method == m] for m in ("receiver", "c2c")}
    assert said["c2c"] == said["receiver"] and len(said["c2c"]) == 3
    open_ = pair_of(gate_init=1.0)
    other = by_method(score_rows(open_, cases, tmp_path / "o.jsonl"))
    assert [s.nll for s in other["c2c"].values()] != [s.nll for s in other["receiver"].values()]
    assert [s.nll for s in other["c2c"].values()] != [s.nll for s in other["other"].values()]


def test_c2c_is_scored_on_its_fused_cache(tmp_path: Path) -> None:
    pair = pair_of(gate_init=1.0)
    found = by_method(score_rows(pair, cases_of(pair, rows_of(), 500), tmp_path / "s.jsonl", batch_size=3))
    for n, (asked, said) in enumerate(TEXTS.items()):
        (expected,) = pair.score([{"role": "user", "content": asked}], [said])
        assert found["c2c"][f"own:{n}"].nll == pytest.approx(-expected.logprob, abs=1e-2)  # type: ignore[union-attr]


@pytest.mark.parametrize("rows", [2, 5, 6])
def test_the_control_has_the_cache_of_the_row_beside_it(rows: int, tmp_path: Path) -> None:
    """Whatever the size of a batch; as if that row's sharer tokens had been this one's."""
    pair = pair_of(gate_init=1.0)
    texts = {"A" + " and more" * n + "?": f"That is {n}" for n in range(rows)}
    cases = cases_of(pair, rows_of(texts), 500)
    ids = [c.example.id for c in cases]
    beside = {2: [1, 0], 5: [1, 0, 3, 4, 2], 6: [1, 0, 3, 2, 5, 4]}[rows]
    expected = {}
    for case, other in zip(cases, (cases[i] for i in beside), strict=True):
        (score,) = decode.score(
            pair.receiver, pair.fuse([with_others_cache(case.prompt, other.prompt)]), [[case.receiver]]
        )
        expected[case.example.id] = -score[0].logprob
    for size in (2, 3, 4, 8):
        found = by_method(score_rows(pair, cases, tmp_path / f"{size}.jsonl", batch_size=size))
        assert [found["other"][i].partner for i in ids] == [ids[k] for k in beside]
        assert {found["c2c"][i].partner for i in ids} == {None}
        for i in ids:
            assert found["other"][i].nll == pytest.approx(expected[i], abs=1e-3)
            assert found["other"][i].nll != pytest.approx(found["c2c"][i].nll, abs=1e-3)


def test_a_row_alone_has_no_control(tmp_path: Path) -> None:
    pair = pair_of()
    with pytest.raises(C2CError, match="another row"):
        score_rows(pair, cases_of(pair, rows_of({"Who?": "I"}), 500), tmp_path / "s.jsonl")


def test_summary_by_hand() -> None:
    """Two rows of 8 and 16 bytes; of a gap of 12 bits C2C closes 9."""
    bits = {"receiver": (16, 32), "sharer": (8, 28), "c2c": (10, 29), "other": (17, 32)}
    scores = [
        Scored(f"r{row}", method, nats * math.log(2), 5, 8 * (row + 1))
        for method, pair in bits.items()
        for row, nats in enumerate(pair)
    ]
    summary = summarize(scores)
    assert [summary[m]["bits_per_byte"] for m in SCORED] == [2, 1.5, 1.625, pytest.approx(2.04167)]
    assert summary["c2c"]["difference"] == -0.375 and summary["c2c"]["closed"] == 75
    # A draw of two rows: twice the first (-6/8), once each, or twice the second (-3/16).
    assert summary["c2c"]["interval"] == [-0.75, -0.1875]
    assert summary["c2c"]["closed_interval"] == [75, 75]
    assert summary["other"]["closed"] == pytest.approx(-8.33) and summary["other"]["interval"] == [0, 0.125]

    def with_sharer(*bits: float) -> dict[str, Any]:
        changed = [Scored(f"r{row}", "sharer", b * math.log(2), 5, 8) for row, b in enumerate(bits)]
        return summarize([s for s in scores if s.method != "sharer"] + changed)["c2c"]

    # Better over all, but not in every draw; no better.
    assert (with_sharer(8, 38)["closed"], with_sharer(8, 38)["closed_interval"]) == (450, None)
    assert (with_sharer(8, 40)["closed"], with_sharer(8, 41)["closed"]) == (None, None)


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_long_rows_are_left_out(tmp_path: Path) -> None:
    pair = pair_of()
    found = rows_of({**TEXTS, "Short": "but then " * 40, "What of " * 40: "this"})
    kept = cases_of(pair, found, 150)
    assert [c.example.id for c in kept] == sorted(
        ("own:0", "own:1", "own:2"), key=lambda i: len(pair.encode(found[int(i[-1])].messages).sharers[0])
    )
    whole = max(len(c.prompt.sharers[0]) + len(c.sharer) for c in kept)  # bytes, the longer of the two
    assert len(cases_of(pair, found, whole)) == 3 and len(cases_of(pair, found, whole - 1)) == 2
    assert len(cases_of(pair, found, 10_000)) == 5


def test_rows_that_were_trained_on_are_left_out(tmp_path: Path) -> None:
    source = DataSource(jsonl=write_rows(tmp_path / "rows.jsonl", 22))
    every, none = held_out(source, tmp_path, None)
    assert len(every) == 22 and none == 0
    (tmp_path / "training_ids.txt").write_text("elsewhere/rows.jsonl:3\nrows.jsonl:5#2\nother.jsonl:7\n")
    found, left_out = held_out(source, tmp_path, None)
    assert left_out == 2 and {e.id[-2:] for e in every} - {e.id[-2:] for e in found} == {":3", ":5"}
    few, _ = held_out(source, tmp_path, 4)
    assert few == split(found, 4)[1] and len(few) == 4
    (tmp_path / "training_ids.txt").write_text("".join(f"rows.jsonl:{n}\n" for n in range(22)))
    with pytest.raises(C2CError, match="no instruction rows are left of 22, 22 of which the fuser was trained on"):
        held_out(source, tmp_path, None)


def test_the_hold_out_of_a_recipe(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 22)
    config = config_of(tmp_path)
    learned, watched = split(examples(config), config.holdout)
    (tmp_path / "training_ids.txt").write_text("".join(f"{e.id}\n" for e in learned))
    assert held_out(config, tmp_path, None) == (watched, 0) and len(watched) == 6
    assert held_out(config, tmp_path, 2)[0] == split(watched, 2)[1]
    with pytest.raises(C2CError, match="no instruction rows are left of 0"):
        held_out(config.model_copy(update={"holdout": 0}), tmp_path, None)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_cut_files_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of()
    cases = cases_of(pair, rows_of({**TEXTS, "Which?": "That one", "Who?": "I"}), 500)
    made: dict[str, Any] = {
        "s.jsonl": lambda path: score_rows(pair, cases, path, batch_size=2),
        "a.jsonl": lambda path: speak(pair, cases, path, 6, batch_size=2),
    }
    for name, compute in made.items():
        path = tmp_path / name
        once = compute(path)
        whole = path.read_bytes()
        assert whole.count(b"\n") == len(once) == {"s.jsonl": 20, "a.jsonl": 10}[name]
        for cut in (len(whole) // 2, len(whole) - 1, 3):
            path.write_bytes(whole[:cut])
            assert sorted(compute(path), key=str) == sorted(once, key=str)
            assert path.read_bytes() == whole

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("everything is there")

    for name in ("_score", "write"):
        monkeypatch.setattr(chat, name, never)
    assert all(compute(tmp_path / name) for name, compute in made.items())


def test_the_sharer_is_read_from_a_store(tmp_path: Path) -> None:
    pair = pair_of()
    cases = cases_of(pair, rows_of(), 500)
    store = Store(tmp_path / "store", pair.sharers[0], "bfloat16")
    first = score_rows(pair, cases, tmp_path / "1.jsonl", store)
    seen: list[int] = []
    decoder: Any = pair.sharers[0].decoder
    decoder.layers[0].register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[1]))
    assert score_rows(pair, cases, tmp_path / "2.jsonl", store) == first
    assert seen == [max(len(c.sharer) for c in cases)]  # the response on top of the stored prompt, nothing else
    live = by_method(score_rows(pair, cases, tmp_path / "3.jsonl"))
    for method, scores in by_method(first).items():
        for i, s in scores.items():
            assert s.nll == pytest.approx(live[method][i].nll, rel=0.02)


# ---- answers --------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_pair(tmp_path: Path) -> None:
    pair: C2C = pair_of(gate_init=1.0)
    cases = cases_of(pair, rows_of(), 500)
    answers = speak(pair, cases, tmp_path / "a.jsonl", 10, batch_size=3)
    for n, asked in enumerate(TEXTS):
        turns = [{"role": "user", "content": asked}]
        mine = {a.method: a for a in answers if a.id == f"own:{n}"}
        assert mine["c2c"].text == pair.chat(turns, do_sample=False, max_new_tokens=10)
        assert mine["c2c"].prompt == asked
        without = pair.chat(turns, do_sample=False, max_new_tokens=10, sharer_mask=0)
        assert mine["receiver"].text == without
    assert any(a.text != b.text for a in answers for b in answers if a.id == b.id)


def test_an_answer_ends_at_its_first_end_token() -> None:
    lm = lm_of("llama")
    end, pad = lm.model.generation_config.eos_token_id, lm.pad_token_id
    new = torch.tensor([[5, 6, end, pad], [5, 6, 7, 8], [end, pad, pad, pad]])
    assert [(w.ids, w.ended) for w in written(lm, new)] == [([5, 6], True), ([5, 6, 7, 8], False), ([], True)]
    lm.model.generation_config.eos_token_id = [7, end]  # type: ignore[assignment]
    assert [w.ids for w in written(lm, new)] == [[5, 6], [5, 6], []]


def test_repetition_by_hand() -> None:
    assert distinct([1, 2, 1, 2, 1], 2) == 2 / 4 and distinct([1, 2, 1, 2, 1], 3) == 2 / 3
    assert distinct([1], 2) is None and distinct([1, 2], 2) == 1
    assert repeats([]) == (0, 0) and repeats([1, 2, 3, 4, 5, 6, 7]) == (0, 0)
    assert repeats([1, 2, 3, 4, 9, 1, 2, 3, 4, 8]) == (8 / 10, 4)
    assert repeats([7] * 5 + [1]) == (5 / 6, 5)  # the two runs overlap
    answers = [chat._spoken(case, "c2c", said) for case, said in zip(CASES, SAID, strict=True)]
    assert fluency([*answers, *answers_of_receiver()])["c2c"] == {
        **{"answers": 2, "tokens": 3.5, "ended": 50.0, "distinct2": 40.0, "distinct3": 50.0},
        **{"repeated": 41.67, "longest_repeat": 2.5},
    }


CASES = [chat.Case(row, None, [], []) for row in rows_of()[:2]]  # type: ignore[arg-type]
SAID = [Written([7] * 5 + [1], "sevens", False), Written([3], "three", True)]


def answers_of_receiver() -> list[chat.Spoken]:
    return [chat._spoken(case, "receiver", Written([1, 2], "", True)) for case in CASES]


def test_answers_that_fit_the_context(tmp_path: Path) -> None:
    pair = pair_of()
    cases = cases_of(pair, rows_of(), 500)
    assert to_answer(pair, cases, 0, 10) == []
    two, every = to_answer(pair, cases, 2, 10), to_answer(pair, cases, 9, 10)
    assert len(two) == 2 and every == cases and all(c in every for c in two)
    longest = max(len(c.prompt.receiver) for c in cases)
    assert len(to_answer(pair, cases, 9, pair.receiver.context_length - longest)) == 3
    assert len(to_answer(pair, cases, 9, pair.receiver.context_length - longest + 1)) == 2


def test_a_run_and_its_files(tiny_pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = DataSource(jsonl=write_rows(tmp_path / "rows.jsonl", 8))
    cases = cases_of(C2C.from_pretrained(tiny_pair_folder), held_out(source, tmp_path, 6)[0], 500)
    lengths = sorted(len(c.prompt.sharers[0]) + len(c.sharer) for c in cases)
    assert lengths[3] < lengths[4]
    options: dict[str, Any] = {
        "limit": 6, "generate": 3, "max_new_tokens": 5, "max_tokens": lengths[3], "batch_size": 4,
        "receiver": (None, "auto"), "sharer": (None, "auto"), "output": tmp_path / "out",
        "store": (tmp_path / "store", "int8"),
    }  # fmt: skip
    summary = chat.run(str(tiny_pair_folder), source, **options)
    printed = capsys.readouterr()
    assert "bits per byte of 4 responses" in printed.out and "greedy answers to 3 prompts" in printed.out
    assert "4 rows; left out: 2 too long, 0 that the fuser was trained on" in " ".join(printed.err.split())
    assert summary["left_out"] == {"trained_on": 0, "too_long": 2}
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("[!.]*")}
    assert sorted(before) == ["answers.jsonl", "scores.jsonl", "settings.json", "summary.json"]
    assert chat.run(str(tiny_pair_folder), source, **options) == summary
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("[!.]*")} == before
    with pytest.raises(C2CError, match="another max_tokens, rows_hash, source; choose another --output"):
        other = DataSource(jsonl=write_rows(tmp_path / "more.jsonl", 8))
        chat.run(str(tiny_pair_folder), other, **{**options, "max_tokens": 300})
    assert source.jsonl is not None
    source.jsonl.write_text(source.jsonl.read_text().replace("a", "e"))  # the same ids, other texts
    with pytest.raises(C2CError, match="another rows_hash; choose another --output"):
        chat.run(str(tiny_pair_folder), source, **options)
