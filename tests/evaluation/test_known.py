"""Scripted models of known behaviour: every method and control gives what follows by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cache2cache import C2C, C2CError
from cache2cache.evaluation import asking
from cache2cache.evaluation.answers import Answer
from cache2cache.evaluation.controls import gaussian, starts_of, zeroed
from cache2cache.evaluation.runner import evaluate
from cache2cache.evaluation.summary import summarize_run
from cache2cache.kv import KV
from cache2cache.tasks import OpenQuestion, Question
from evaluation.scripted import LETTERS, RECEIVER, SECOND, SHARER, marked, scripted_lm, scripted_pair

#            receiver, sharer
BELIEFS = [("A", "B"), ("B", ""), ("", "C"), ("C", "C"), ("D", "A"), ("", ""), ("A", "D"), ("B", "B")]
RIGHT = "BBCCDADC"
MINE = "ABACDAAB"  # what the receiver says: A where it believes nothing
THEIRS = "BACCAADB"
FUSED = "BBCCAADB"  # the sharer's belief, otherwise the receiver's
# The sharer's belief about the next question, of the last one about the first; otherwise the receiver's own.
OTHER = "ACCAD" + "DBB"


def letters(answers: list[Answer], method: str, way: str = "likelihood") -> str:
    found = {a.id: a for a in answers if a.method == method and a.answers == way}
    return "".join("-" if found[i].choice < 0 else LETTERS[found[i].choice] for i in sorted(found))


def ask(path: Path, methods: list[str], pair: Any = None, **options: Any) -> list[Answer]:
    return evaluate(
        pair or scripted_pair(),
        "own",
        marked(BELIEFS, RIGHT),
        path / "s.jsonl",
        methods=methods,
        batch_size=8,
        **options,
    )


def test_models_alone_fused_and_controls(tmp_path: Path) -> None:
    methods = ["receiver", "sharer", "c2c", "other", "zeroed", "gaussian", "off"]
    answers = ask(tmp_path, methods, answers="both")
    expected = {"receiver": MINE, "sharer": THEIRS, "c2c": FUSED, "other": OTHER, "zeroed": MINE, "off": MINE}
    # In words a model that believes nothing names no option.
    words = {"receiver": "AB-CD-AB", "sharer": "B-CCA-DB", "c2c": "BBCCA-DB", "other": OTHER}
    for method, said in expected.items():
        assert letters(answers, method) == said, method
        assert letters(answers, method, "generation") == words.get(method, words["receiver"]), method
    for row in (a for a in answers if a.method == "off"):
        same = next(a for a in answers if (a.method, a.answers, a.id) == ("receiver", row.answers, row.id))
        assert (row.logprobs, row.text) == (same.logprobs, same.text)  # exactly
    partners = {a.id: a.partner for a in answers if a.method == "other"}
    assert partners == {f"q{n}": f"q{(n + 1) % 8}" for n in range(8)}
    summary = summarize_run(answers, ["own"], methods)["likelihood"]["tasks"]["own"]
    accuracies = {m: summary[m]["accuracy"] for m in methods if m != "gaussian"}
    count = {m: 100 * sum(a == b for a, b in zip(said, RIGHT, strict=True)) / 8 for m, said in expected.items()}
    assert accuracies == count and count["receiver"] == 50 and count["sharer"] == 62.5 and count["c2c"] == 75
    assert (summary["gain"], summary["presence"], summary["content"]) == (25, count["other"] - 50, 75 - count["other"])
    assert (summary["rescued"], summary["harmed"], summary["harmed_share"]) == (3, 1, 25)
    assert summary["recovered"] == 200 and summary["off_differs"] == 0


def test_other_by_hand() -> None:
    """The expected string above, from the rule."""
    following = [BELIEFS[(n + 1) % 8][1] or BELIEFS[n][0] or "A" for n in range(8)]
    assert "".join(following) == OTHER


def test_noise_has_the_moments_of_the_cache() -> None:
    torch.manual_seed(0)
    # Every layer, row, head and channel has a mean and a deviation of its own.
    middle, spread = torch.randn(2, 2, 2, 3, 1, 4) * 20, torch.rand(2, 2, 2, 3, 1, 4) + 0.2
    cache = KV(*(torch.randn(2, 2, 3, 500, 4) * spread[kind] + middle[kind] for kind in range(2)))
    cache.keys[:, 0, :, :100] = 1e6  # padding
    known = [(cache, [400, 500])]
    ((noise, lengths),) = gaussian(known, ["0:a", "0:b"])
    assert lengths == [400, 500] and not torch.equal(noise.keys, cache.keys)
    for mine, true in ((noise.keys, cache.keys), (noise.values, cache.values)):
        for row, n in enumerate(lengths):
            a, b = mine[:, row, :, 500 - n :], true[:, row, :, 500 - n :]
            # Beyond five deviations of a mean and of a deviation of n draws.
            assert bool(((a.mean(2) - b.mean(2)).abs() < 5 * b.std(2) / n**0.5).all())
            assert bool(((a.std(2) / b.std(2) - 1).abs() < 5 / (2 * n) ** 0.5).all())
    ((again, _),) = gaussian(known, ["0:a", "0:c"])
    assert torch.equal(again.keys[:, 0], noise.keys[:, 0]) and not torch.equal(again.keys[:, 1], noise.keys[:, 1])
    (one, _), (two, _) = gaussian([*known, *known], ["0:a", "0:b"])  # two sharers that think alike
    assert torch.equal(one.keys, noise.keys) and not torch.isclose(one.keys[:, 1], two.keys[:, 1]).all(-1).any()
    flat = KV(torch.full_like(cache.keys, 2.0), torch.full_like(cache.values, 3.0))
    ((same, _),) = gaussian([(flat, [400, 500])], ["x", "y"])
    assert torch.equal(same.values[:, 1], flat.values[:, 1]) and torch.equal(
        same.keys[:, 0, :, 100:], flat.keys[:, 0, :, 100:]
    )
    ((nothing, _),) = zeroed(known)
    assert not nothing.keys.any() and not nothing.values.any()


def test_the_start_of_a_cache() -> None:
    cache = KV(torch.arange(2 * 5.0).view(1, 2, 1, 5, 1), torch.arange(2 * 5.0).view(1, 2, 1, 5, 1))
    alike = starts_of(cache, [5, 3], [4, 2])
    assert alike.keys[0, 0].flatten().tolist() == [0, 1, 2, 3] and alike.keys[0, 1, 0, 2:].flatten().tolist() == [7, 8]
    unlike = starts_of(cache, [5, 3], [4, 1])
    assert unlike.keys[0, 0].flatten().tolist() == [0, 1, 2, 3] and unlike.keys[0, 1].flatten().tolist() == [0, 0, 0, 7]


@pytest.mark.parametrize("form", ["text", "text-options", "text-answer"])
def test_text_to_text(form: str, tmp_path: Path) -> None:
    """The sharer says its belief in the receiver's marks: a receiver that believes nothing takes it over."""
    pair = scripted_pair(scripted_lm(SHARER, says=RECEIVER))
    answers = ask(tmp_path, ["sharer", form], pair, answers="both")
    taken = "".join(mine or theirs or "A" for mine, theirs in BELIEFS)
    assert letters(answers, form) == taken == "ABCCDAAB"
    assert letters(answers, "sharer") == THEIRS and letters(answers, "sharer", "generation") == "-" * 8
    rows = {a.id: a for a in answers if a.method == form and a.answers == "likelihood"}
    said = {i: a.message for i, a in rows.items()}
    assert said["q0"] == "$" and said["q2"] == "%" and rows["q0"].message_tokens == 1
    assert {a.id: a.message for a in answers if a.method == form and a.answers == "generation"} == said


def test_examples_in_front(tmp_path: Path) -> None:
    """Three examples that are marked for B outweigh the one mark of the question."""
    examples = marked([("B",)] * 5, "BBBBB")
    examples = [Question(f"e{n}", e.question, e.options, e.answer) for n, e in enumerate(examples)]
    answers = ask(tmp_path, ["few-shot"], answers="both", examples=examples, shots=3)
    assert letters(answers, "few-shot") == letters(answers, "few-shot", "generation") == "B" * 8
    with pytest.raises(C2CError, match="few-shot needs examples for own"):
        ask(tmp_path, ["few-shot"])


def test_single_self_and_skip(tmp_path: Path) -> None:
    pair = scripted_pair()
    mirror = scripted_pair(pair.receiver, receiver=pair.receiver)
    methods = ["single", "self", "skip", "receiver"]
    answers = ask(tmp_path, methods, pair, single=scripted_lm(SHARER), identical=mirror, skip=0.5, answers="both")
    assert letters(answers, "single") == THEIRS and letters(answers, "self") == MINE
    assert letters(answers, "single", "generation") == "B-CCA-DB"
    # Where the receiver believes nothing it is not confident, so only there the sharer is asked.
    assert letters(answers, "skip") == "".join(mine or theirs or "A" for mine, theirs in BELIEFS)
    rows = [a for a in answers if a.method == "skip" and a.answers == "likelihood"]
    assert {a.id for a in rows if not a.skipped} == {"q2", "q5"}
    for method, options in (("single", {}), ("self", {}), ("skip", {})):
        with pytest.raises(C2CError, match=f"the method {method} needs"):
            ask(tmp_path, [method], pair, **options)


def test_the_prompt_in_chinese(tmp_path: Path) -> None:
    """Behind its own start of an answer, a letter without a space."""
    answers = ask(tmp_path, ["receiver", "c2c"], prompt="chinese", answers="both")
    assert letters(answers, "receiver") == MINE and letters(answers, "c2c") == FUSED
    likely = next(a for a in answers if a.id == "q0" and a.method == "receiver")
    assert max(likely.logprobs) > -0.1  # it is what the model says next


def test_examples_end_in_english_whatever_the_prompt(tmp_path: Path) -> None:
    """So the letter behind them has a space."""
    examples = marked([("B",)] * 5, "BBBBB")
    examples = [Question(f"e{n}", e.question, e.options, e.answer) for n, e in enumerate(examples)]
    answers = ask(tmp_path, ["few-shot"], prompt="chinese", examples=examples, shots=3)
    assert letters(answers, "few-shot") == "B" * 8
    found = next(a for a in answers if a.method == "few-shot")
    usual = ask(tmp_path / "usual", ["few-shot"], examples=examples, shots=3)
    assert found.logprobs == next(a for a in usual if a.id == found.id).logprobs


def test_several_sharers(tmp_path: Path) -> None:
    """The stronger of two sharers wins; each is measured alone; the controls replace both."""
    pair = scripted_pair(scripted_lm(SHARER), scripted_lm(SECOND), scales=(5.0, 9.0))
    beliefs = [("A", "B", "C"), ("A", "B", ""), ("A", "", ""), ("", "", "D")]
    questions = marked(beliefs, "CBAD")
    methods = ["receiver", "sharer", "c2c", "other", "zeroed", "off"]
    answers = evaluate(pair, "own", questions, tmp_path / "s.jsonl", methods=methods, answers="both")
    expected = {
        "receiver": "AAAA", "sharer": "BBAA", "sharer-2": "CAAD", "c2c": "CBAD", "zeroed": "AAAA", "off": "AAAA",
        "other": "BADC",
    }  # fmt: skip
    for method, said in expected.items():
        assert letters(answers, method) == said, method
    summary = summarize_run(answers, ["own"], [*methods, "sharer-2"])
    assert summary["likelihood"]["tasks"]["own"]["sharer-2"]["accuracy"] == 75


def test_open_questions(tmp_path: Path) -> None:
    """Answers in words against references, whatever way is asked for; those of C2C are the sharer's."""
    marks = [*zip(RECEIVER, SHARER[::-1], strict=True)]
    questions = [OpenQuestion(f"q{n}", f"Say it. {m}{s}", ("a",), "exact", 4) for n, (m, s) in enumerate(marks)]
    methods = ["receiver", "sharer", "c2c", "other", "zeroed", "off"]
    answers = evaluate(scripted_pair(), "own", questions, tmp_path / "s.jsonl", methods=methods)
    assert {a.answers for a in answers} == {"generation"} and {a.choice for a in answers} == {-1}
    said = {m: "".join(str(a.text) for a in answers if a.method == m) for m in methods}
    assert said == {
        "receiver": "ABCD", "sharer": "DCBA", "c2c": "DCBA", "other": "CBAD", "zeroed": "ABCD", "off": "ABCD"
    }  # fmt: skip
    values = {m: [a.score for a in answers if a.method == m] for m in methods}
    assert values["receiver"] == [1, 0, 0, 0] and values["c2c"] == [0, 0, 0, 1] and values["other"] == [0, 0, 1, 0]
    with pytest.raises(C2CError, match="few-shot needs examples"):
        evaluate(scripted_pair(), "own", questions, tmp_path / "t.jsonl", methods=["few-shot"])


def test_long_questions_lose_their_middle(tmp_path: Path) -> None:
    text = "# at the front" + "." * 300 + "% at the end"
    question = [OpenQuestion("q", text, ("A",), "exact", 4), OpenQuestion("r", "$", ("B",), "exact", 4)]
    answers = evaluate(
        scripted_pair(), "own", question, tmp_path / "s.jsonl", methods=["receiver"], max_prompt_tokens=20
    )
    assert [a.text for a in sorted(answers, key=lambda a: a.id)] == ["A", "B"]  # "# at the f" and "% at the end"[-10:]


def test_a_long_question_fits_twice_behind_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text-to-text shows the receiver the question two times: it loses as much as it must to fit the context."""
    questions = [
        OpenQuestion("long", "# at the front" + "." * 300 + "% at the end", ("A",), "exact", 4),
        OpenQuestion("short", "# at the front", ("A",), "exact", 4),
    ]
    pair, read = scripted_pair(), {}

    def spy(of: C2C, case: asking.Case, form: str, message: str) -> list[dict[str, str]]:
        read[case.id] = chat = fitting(of, case, form, message)
        return chat

    fitting = asking.fitting
    monkeypatch.setattr(asking, "fitting", spy)
    whole = evaluate(pair, "own", questions, tmp_path / "whole.jsonl", methods=["text"])
    before = dict(read)
    needed = len(pair.rendered(pair.receiver, before["long"]).ids) + 4
    assert not any(a.error for a in whole) and before["long"][-1]["content"] == questions[0].prompt
    for room in (needed, needed - 1, needed - 250):
        monkeypatch.setattr(pair.receiver.model.config, "max_position_embeddings", room)
        answers = evaluate(pair, "own", questions, tmp_path / f"{room}.jsonl", methods=["text"])
        assert not any(a.error for a in answers) and read["short"] == before["short"]
        assert room - 4 <= len(pair.rendered(pair.receiver, read["long"]).ids) + 4 <= room
        last = read["long"][-1]["content"]
        assert last.startswith("# at") and last.endswith("the end") and last in read["long"][0]["content"]
