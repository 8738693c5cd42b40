"""The structure probe: documents that say what is asked, and the two settings kept apart."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from cache2cache.config import FuserConfig
from cache2cache.errors import C2CError
from cache2cache.models.load import load_lm
from cache2cache.oracle import structure
from cache2cache.oracle.documents import Document, generate
from cache2cache.oracle.structure import Row
from cache2cache.pair import C2C
from cache2cache.tasks.base import Question
from tiny import TOKENIZER_OF, tiny_model, tiny_tokenizer

DOCUMENTS = generate(210, seed=0)


def pair(receiver: str = "qwen3", sharer: str = "llama") -> C2C:
    torch.manual_seed(0)
    models = [load_lm(tiny_model(f), tiny_tokenizer(TOKENIZER_OF[f])) for f in (receiver, sharer)]
    return C2C.from_models(*models, FuserConfig(hidden_dim=16, intermediate_dim=16, gate_init=1.0))


def solve(document: Document) -> str:
    """The answer, worked out from the document by a parser of its language."""
    text, asked = document.text, document.question.question
    quoted = re.findall(r'"(\w+)"', asked)
    if document.question.subject == "json":
        data = json.loads(text)
        if asked.startswith("What"):
            key, name = quoted
            return data[name][key]
        return next(name for name, values in data.items() if quoted[0] in values.values())
    if document.question.subject == "code":
        parameters = re.search(r"def \w+\((.*)\)", text)[1].split(", ")
        if "definition" in asked:
            return parameters[["first", "second", "third", "fourth"].index(asked.split()[3])]
        scope: dict[str, object] = {}
        definition, call = text.split("\n\n")
        exec(re.sub(r"return .*", "return locals()", definition), scope)
        return eval(call, scope)[re.search(r"parameter (\w+) get", asked)[1]]
    tree = ElementTree.fromstring(f"<root>{text}</root>")
    if "role" in asked:
        return next(turn.get("role") for turn in tree if turn.text == quoted[0])
    parents = {child: parent for parent in tree.iter() for child in parent}
    if "parent" in asked:
        child = re.search(r"<(\w+)>", asked)[1]
        return next(parents[e].tag for e in tree.iter() if e.tag == child)
    for element in tree.iter():
        if element.text == quoted[0]:
            return element.tag
        if element.tail == quoted[0]:
            return parents[element].tag
    raise AssertionError(asked)


def test_the_right_option_is_right_and_the_only_one() -> None:
    for document in DOCUMENTS:
        question = document.question
        assert question.options[question.answer] == solve(document), document
        assert len(set(question.options)) == 4


def test_every_option_stands_in_the_document() -> None:
    for document in DOCUMENTS:
        assert all(option in document.text for option in document.question.options), document


def test_documents_are_seeded_even_and_different() -> None:
    assert generate(210, seed=0) == DOCUMENTS != generate(210, seed=1)
    assert Counter(d.question.subject for d in DOCUMENTS) == {"markup": 70, "json": 70, "code": 70}
    assert len({d.text for d in DOCUMENTS}) == 210 and len({d.question.id for d in DOCUMENTS}) == 210
    for kind in ("markup", "json", "code"):  # always the same letter is chance
        places = Counter(d.question.answer for d in DOCUMENTS if d.question.subject == kind)
        assert len(places) == 4 and max(places.values()) - min(places.values()) <= 2


@pytest.mark.parametrize("receiver", ["qwen3", "llama", "gemma3"])
def test_private_context_never_reaches_the_receiver(receiver: str) -> None:
    both = pair(receiver, "qwen2")
    document = DOCUMENTS[0]
    tokenizer = both.receiver.need_tokenizer()
    private, shared = (structure.encode(both, document, setting) for setting in ("private", "both"))
    assert document.text not in tokenizer.decode(private.receiver)
    assert document.text in tokenizer.decode(shared.receiver)
    assert list(private.sharers[0]) == list(shared.sharers[0])
    # Every token of the question goes with its like behind the document.
    ours, theirs = (lm.need_tokenizer() for lm in (both.receiver, both.sharers[0]))
    start = len(theirs(document.text)["input_ids"])
    spoken = [(ours.decode([t]), theirs.decode([private.sharers[0][s]]), s)
              for t, s in zip(private.receiver, private.maps[0], strict=True) if s >= 0]  # fmt: skip
    words = [s for mine, other, s in spoken if mine.strip() and mine.strip() in document.question.question]
    assert len(words) > 5 and min(words[3:-3]) >= start - 1
    if receiver == "qwen3":  # the same tokenizer, so the very same tokens
        assert all(mine == other for mine, other, _ in spoken)


def test_the_private_document_changes_c2c_and_text_but_not_the_receiver(tmp_path: Path) -> None:
    both = pair()
    one, two = DOCUMENTS[0], DOCUMENTS[3]
    changed = replace(one, text=two.text)  # the same question about another document
    wanted = {"private": structure.methods(["tell"])}
    found = [
        {r.method: r for r in structure.answer(both, [d, two], wanted, 8) if r.id == one.question.id}
        for d in (one, changed)
    ]
    first, second = found
    assert first["receiver"].logprobs == pytest.approx(second["receiver"].logprobs, abs=1e-4)
    for method in ("sharer", "c2c"):
        assert first[method].logprobs != pytest.approx(second[method].logprobs, abs=1e-3), method
    assert first["text:tell"].message != second["text:tell"].message


def test_answers_do_not_depend_on_the_batch_and_bytes_are_the_pairs(tmp_path: Path) -> None:
    both = pair("gemma3", "qwen2")
    wanted = {s: structure.methods(["tell", "published"]) for s in structure.SETTINGS}
    rows = {(r.setting, r.id, r.method): r for r in structure.answer(both, DOCUMENTS[:3], wanted, 6)}
    assert len(rows) == 3 * 2 * 6
    alone = {(r.setting, r.id, r.method): r for r in structure.answer(both, [DOCUMENTS[1], DOCUMENTS[5]], wanted, 6)}
    for key, row in alone.items():
        if key in rows and row.method != "other":
            assert rows[key].logprobs == pytest.approx(row.logprobs, abs=2e-3), key
            assert (rows[key].bytes, rows[key].message) == (row.bytes, row.message)
    for setting in structure.SETTINGS:
        fused = both.fuse([structure.encode(both, DOCUMENTS[1], setting)])
        assert rows[setting, DOCUMENTS[1].question.id, "c2c"].bytes == fused.bytes_passed > 0
    text = rows["both", DOCUMENTS[1].question.id, "text:tell"]
    assert text.bytes == len(text.message.encode()) and text.message_tokens <= 6


def test_a_run_resumes_and_keeps_the_settings_apart(tmp_path: Path) -> None:
    both = pair()
    options = {"count": 6, "max_message_tokens": 4, "batch_size": 3}
    first = structure.run(both, tmp_path, **options)
    assert "private context" in first["meaning"]["private"] and "paper" in first["meaning"]["both"]
    for setting in ("both", "private"):
        assert set(first[setting]) == {"all", "markup", "json", "code"}
        assert first[setting]["all"]["c2c"]["questions"] == 6 and first[setting]["json"]["c2c"]["questions"] == 2
        assert first[setting]["all"]["text:tell"]["bytes"] < first[setting]["all"]["c2c"]["bytes"]
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:17]) + "\n" + rows[17][:9])
    again = structure.run(both, tmp_path, **options)
    assert again == first
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(rows) == 6 * 2 * 5
    with pytest.raises(C2CError, match="another rows_hash, seed"):
        structure.run(both, tmp_path, seed=1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": ["secret"]}, "both, private"),
        ({"forms": ["poem"]}, "tell, published"),
        ({"count": 1}, "at least two"),
        ({"count": 0}, "at least one"),
    ],
)
def test_bad_input(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(C2CError, match=message):
        structure.run(pair(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_messages_that_name_the_answer() -> None:
    """Whole words, and no other option beside it; per method, with the receiver's accuracy behind them."""
    question = Question("1", "Which value?", ("red", "green", "a.b", "x"), 1, "json")
    for message, named in (("It is green.", True), ("greenish", False), ("red, not green", False), ("", False)):
        assert structure.names_it(question, message) is named
    assert structure.names_it(Question("2", "?", ("a.b", "axb"), 0, "json"), 'The value is "a.b".')
    questions = {str(i): replace(question, id=str(i)) for i in range(4)}
    told = [("green", True), ("It is green", False), ("red", False), ("green or red", True)]
    rows = [
        Row("both", "json", str(i), method, 1, right, [], 5, message, 2, True)
        if method == "text:tell"
        else Row("both", "json", str(i), method, 1, True, [])
        for method in ("c2c", "text:tell")
        for i, (message, right) in enumerate(told)
    ]
    found = structure.summarize(rows, ["text:tell", "c2c"], questions)["all"]["text:tell"]
    assert found["accuracy"] == 50 and found["named"]["accuracy"] == 50
    assert found["behind_named"]["questions"] == 2 and found["behind_named"]["accuracy"] == 50
