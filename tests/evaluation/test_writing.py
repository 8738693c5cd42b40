"""Answers in batches that shrink, against each prompt alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cache2cache import C2CError, decode
from cache2cache.evaluation.writing import Ended, Written, add_rows, read_rows, write, write_on, written
from cache2cache.kv import Prefilled, prefill_prompts
from cache2cache.models import LM
from tiny import TOKENIZER_OF, tiny_model, tiny_tokenizer

NEW = 40
ROWS = [list(range(5 + row, 9 + 3 * row)) for row in range(9)]


def alone(lm: LM, prompt: Prefilled, limit: int) -> Written:
    sequences = decode.generate(lm, prompt, do_sample=False, max_new_tokens=limit)
    return written(lm, sequences[:, prompt.input_ids.shape[1] :])[0]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def lm(request: pytest.FixtureRequest) -> LM:
    """A model whose greedy answers to ROWS end after different numbers of tokens, one of them never."""
    family = request.param
    made = LM(tiny_model(family).eval().requires_grad_(False), tiny_tokenizer(TOKENIZER_OF[family]), family)
    made.model.generation_config.eos_token_id = None
    answers = [alone(made, prefill_prompts(made, [row]), NEW).ids for row in ROWS]
    ends = {answer[5 * n] for n, answer in enumerate(answers[:-1])} - set(answers[-1])
    made.model.generation_config.eos_token_id = sorted(ends)
    return made


@pytest.mark.parametrize("limits", [[NEW] * len(ROWS), [3, 7, 12, 40, 40, 31, 9, 40, 22]])
def test_each_row_is_answered_as_it_is_alone(lm: LM, limits: list[int]) -> None:
    expected = [alone(lm, prefill_prompts(lm, [row]), n) for row, n in zip(ROWS, limits, strict=True)]
    assert len({len(w.ids) for w in expected}) > 3 and {w.ended for w in expected} == {True, False}
    assert write_on(lm, prefill_prompts(lm, ROWS), limits) == expected


def test_prompts_with_positions_of_their_own(lm: LM) -> None:
    places = [[2 * p for p in range(len(row))] for row in ROWS]
    expected = [alone(lm, prefill_prompts(lm, [row], [at]), NEW) for row, at in zip(ROWS, places, strict=True)]
    assert write_on(lm, prefill_prompts(lm, ROWS, places), [NEW] * len(ROWS)) == expected


def test_ended_rows_are_read_no_more(lm: LM) -> None:
    lengths = sorted(len(w.ids) + w.ended for w in write(lm, ROWS, NEW))
    read: list[int] = []
    hook = lm.model.register_forward_pre_hook(
        lambda model, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    write_on(lm, prefill_prompts(lm, ROWS), [NEW] * len(ROWS))
    hook.remove()
    # A step for each token of the longest answer, and fewer than a quarter of a batch waits for others.
    assert len(read) == lengths[-1]
    assert sum(lengths) <= sum(read) <= sum(lengths) / 0.75 < len(ROWS) * lengths[-1]


def test_a_model_without_an_end_token_writes_to_the_limit(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm.model.generation_config, "eos_token_id", None)
    assert [(len(w.ids), w.ended) for w in write(lm, ROWS, 6)] == [(6, False)] * len(ROWS)


def test_the_least_number_of_tokens_is_counted_from_the_prompt(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though answers go on in a smaller batch: some rows end at their limits before it."""
    monkeypatch.setattr(lm.model.generation_config, "min_new_tokens", 20)
    limits = [3, 7, 12, 40, 40, 31, 9, 40, 22]
    least = [min(20, n) for n in limits]
    found = write_on(lm, prefill_prompts(lm, ROWS), limits)
    assert all(len(w.ids) >= n for w, n in zip(found, least, strict=True)) and any(w.ended for w in found)
    monkeypatch.setattr(lm.model.generation_config, "min_new_tokens", None)
    assert any(len(w.ids) < n for w, n in zip(write_on(lm, prefill_prompts(lm, ROWS), limits), least, strict=True))


def test_a_text_ends_an_answer_too(lm: LM) -> None:
    """With the token that completes it, wherever a batch has been cut meanwhile."""
    tokenizer = lm.need_tokenizer()
    whole = [alone(lm, prefill_prompts(lm, [row]), NEW) for row in ROWS]
    texts = ["e", "th", whole[-1].text[12:14]]
    expected = []
    for answer in whole:
        pieces = [tokenizer.decode(answer.ids[: n + 1]) for n in range(len(answer.ids))]
        first = next((n for n, piece in enumerate(pieces) if any(text in piece for text in texts)), None)
        expected.append(answer.ids if first is None else answer.ids[: first + 1])
    assert expected[-1] != whole[-1].ids and len({len(ids) for ids in expected}) > 3
    found = write_on(lm, prefill_prompts(lm, ROWS), [NEW] * len(ROWS), texts)
    assert [w.ids for w in found] == expected


def test_a_control_token_as_a_text(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends its row alone, though no decoded answer shows it, and what the prompt holds ends nothing."""
    monkeypatch.setattr(lm.model.generation_config, "eos_token_id", None)
    tokenizer = lm.need_tokenizer()
    letters = [tokenizer.convert_tokens_to_ids(c) for c in "ABCDEFGH"]
    stop, control = tokenizer.eos_token, tokenizer.eos_token_id
    made = torch.tensor([[*letters[:3], control, *letters[4:]], [*letters[:5], control, *letters[6:]]])
    sequences = torch.cat([torch.full((2, 3), control), made], dim=1)
    ended = Ended(lm, 3, [8, 8], [stop], each=True)
    assert [int(ended(sequences[:, : 3 + n], None).sum()) for n in range(1, 9)] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert ended.limits.tolist() == [4, 6]
    assert [w.text for w in written(lm, made, ended.limits.tolist())] == ["ABC", "ABCDE"]
    assert Ended(lm, 3, [8, 8], [stop])(sequences[:, :7], None).all()  # half of them are a quarter and more


@dataclass(frozen=True)
class Line:
    id: str
    text: str


def test_readers_change_nothing_and_writers_replace_what_a_kill_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    add_rows(path, [Line("a", "é"), Line("b", "x" * 9000)])
    whole = path.read_bytes()
    for size in (0, 1, 12, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:size])
        found = read_rows(path, Line)
        assert path.read_bytes() == whole[:size]  # its writer may be at it
        assert [row.id for row in found] == ["a", "b"][: whole[:size].count(b"\n")]
        add_rows(path, [Line("c", "")])
        assert [row.id for row in read_rows(path, Line)] == [*(row.id for row in found), "c"]
    assert read_rows(tmp_path / "none.jsonl", Line) == []
    path.write_bytes(whole[:20] + b"\xff" + whole[20:])
    with pytest.raises(C2CError, match="holds other rows than answers"):  # a damaged line is no last one
        read_rows(path, Line)
