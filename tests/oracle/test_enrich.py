"""Enrichment: what must be equal is equal, for full and sliding receivers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cache2cache.decode import score
from cache2cache.errors import C2CError
from cache2cache.kv import CACHE
from cache2cache.models.load import LM, load_lm
from cache2cache.oracle import enrich
from cache2cache.rotary import Rotary
from cache2cache.tasks.base import Question
from cache2cache.tasks.prompts import unanswered
from tiny import FAMILIES, TOKENIZER_OF, tiny_model, tiny_tokenizer

every_family = pytest.mark.parametrize("family", FAMILIES)


def receiver(family: str, seed: int = 0) -> LM:
    return load_lm(tiny_model(family, seed), tiny_tokenizer(TOKENIZER_OF[family]))


def questions(count: int, split: str, subjects: tuple[str, ...] = ("sums", "rivers")) -> list[Question]:
    return [
        Question(f"{split}-{s}-{i}", f"What is {i} plus {k} ({split})?", (str(i + k), str(i), "no", f"{k}"), i % 4, s)
        for k, s in enumerate(subjects, 1)
        for i in range(count)
    ]


def caches(lm: LM, shots: int) -> enrich.Caches:
    read = enrich.read_shots(lm, "sums", questions(shots, "dev", ("sums",)))
    return enrich.read_question(lm, read, unanswered(questions(3, "test")[2]))


def letters(lm: LM) -> list[list[int]]:
    return [lm.continuation_ids(f" {letter}") for letter in "ABCD"]


def scores(lm: LM, prompt, chosen: torch.Tensor, found: enrich.Caches, removed: int | None = None) -> list[float]:
    removed = found.removed if removed is None else removed
    with enrich.head_out_of_window(lm, chosen, found.head, removed):
        return [s.logprob for s in score(lm, prompt, [letters(lm)])[0]]


ALL = {f: torch.ones(1, receiver(f).num_layers, dtype=torch.bool) for f in FAMILIES}


@every_family
def test_no_exemplars_are_direct(family: str) -> None:
    lm = receiver(family)
    found = caches(lm, 0)
    assert found.removed == 0
    torch.testing.assert_close(found.enriched.keys, found.direct.kv.keys)
    torch.testing.assert_close(found.enriched.values, found.direct.kv.values)
    oracle = scores(lm, found.oracle(), ALL[family], found)
    assert oracle == pytest.approx(scores(lm, found.direct, ~ALL[family], found), abs=1e-4)
    few = scores(lm, found.few_shot, ~ALL[family], found)
    assert oracle == pytest.approx(few, abs=1e-4)


@every_family
def test_exemplars_change_the_cache_but_not_its_length_or_head(family: str) -> None:
    lm = receiver(family)
    found = caches(lm, 3)
    assert found.removed > 50
    assert found.enriched.keys.shape == found.direct.kv.keys.shape
    head = found.head
    torch.testing.assert_close(found.enriched.values[:, :, :, :head], found.direct.kv.values[:, :, :, :head])
    assert not torch.allclose(found.enriched.values[1:, ..., -1, :], found.direct.kv.values[1:, ..., -1, :], atol=1e-2)
    direct = scores(lm, found.direct, ~ALL[family], found)
    assert scores(lm, found.oracle(), ALL[family], found) != pytest.approx(direct, abs=1e-3)


@every_family
def test_every_layer_is_oracle_and_none_is_direct(family: str) -> None:
    lm = receiver(family)
    found = caches(lm, 3)
    aligned = found.aligned(Rotary.of(lm), "kept")
    everything = scores(lm, enrich.mixed(found.direct, aligned, ALL[family]), ALL[family], found)
    assert everything == pytest.approx(scores(lm, found.oracle(), ALL[family], found), abs=2e-3)
    nothing = scores(lm, enrich.mixed(found.direct, aligned, ~ALL[family]), ~ALL[family], found)
    assert nothing == scores(lm, found.direct, ~ALL[family], found)


@every_family
def test_oracle_is_few_shot_whose_exemplars_are_masked(family: str) -> None:
    """The reference keeps every slot: the model's own masks then count positions."""
    lm = receiver(family)
    found = caches(lm, 3)
    mask = torch.ones_like(found.few_shot.attention_mask)
    mask[:, found.head : found.head + found.removed] = 0
    length = mask.shape[1]
    with torch.no_grad():
        output = lm.model(
            input_ids=found.few_shot.input_ids[:, -1:], attention_mask=mask, use_cache=True,
            position_ids=torch.tensor([[length - 1]]), **{CACHE: found.few_shot.kv.to_cache()},
        )  # fmt: skip
        with enrich.head_out_of_window(lm, ALL[family], found.head, found.removed):
            prompt = found.oracle()
            ours = lm.model(
                input_ids=prompt.input_ids[:, -1:], attention_mask=prompt.attention_mask, use_cache=True,
                position_ids=torch.tensor([[length - 1]]), **{CACHE: prompt.kv.to_cache()},
            )  # fmt: skip
    torch.testing.assert_close(ours.logits, output.logits, atol=1e-3, rtol=1e-3)


def test_a_sliding_receiver_lets_go_of_the_head() -> None:
    """Without the hook the removed slots would bring the head back into the window; a short question shows it."""
    lm = receiver("gemma3")
    read = enrich.read_shots(lm, "s", questions(3, "dev", ("s",)))
    found = enrich.read_question(lm, read, "Hi")
    assert found.direct.input_ids.shape[1] - found.head < lm.text_config.sliding_window
    with_hook = scores(lm, found.oracle(), ALL["gemma3"], found)
    assert with_hook != pytest.approx(scores(lm, found.oracle(), ~ALL["gemma3"], found), abs=1e-3)
    aligned = enrich.mixed(found.direct, found.aligned(Rotary.of(lm), "kept"), ALL["gemma3"])
    assert scores(lm, aligned, ALL["gemma3"], found) == pytest.approx(with_hook, abs=2e-3)


@every_family
def test_rotated_keys_have_directs_distances(family: str) -> None:
    """The first layer's keys depend on token and position alone, so turned back they are Direct's."""
    lm = receiver(family)
    found = caches(lm, 2)
    rotated = found.aligned(Rotary.of(lm), "rotated")
    torch.testing.assert_close(rotated.keys[0], found.direct.kv.keys[0], atol=1e-3, rtol=1e-3)
    kept = found.aligned(Rotary.of(lm), "kept")
    torch.testing.assert_close(kept.keys[..., found.head :, :], rotated.keys[..., found.head :, :])
    assert not torch.allclose(kept.keys[0, ..., 1, :], found.direct.kv.keys[0, ..., 1, :], atol=1e-2)


def test_rows_of_a_batch_of_layer_sets_are_what_they_are_alone() -> None:
    lm = receiver("gemma3")
    question = questions(3, "test")[2]
    shots = enrich.read_shots(lm, "sums", questions(2, "dev", ("sums",)))
    sets = {"none": [], "layer:1": [1], "layer:3": [3], "all": range(6)}
    rotary = Rotary.of(lm)
    together, _ = enrich.answer(lm, question, shots, sets=sets, positions="kept", rotary=rotary)
    for name, layers in sets.items():
        alone, _ = enrich.answer(lm, question, shots, sets={name: layers}, positions="kept", rotary=rotary)
        assert together[name] == pytest.approx(alone[name], abs=1e-4)
    assert together["none"] == pytest.approx(together["direct"], abs=1e-4)
    assert together["all"] == pytest.approx(together["oracle"], abs=2e-3)
    assert together["layer:1"] != pytest.approx(together["layer:3"], abs=1e-3)


def test_halves_are_even_and_drawn_by_seed() -> None:
    chosen = enrich.choose(questions(9, "test"), 10, seed=1)
    assert len({a.question.id for a in chosen}) == 10
    for subject in ("sums", "rivers"):
        halves = [a.half for a in chosen if a.question.subject == subject]
        assert len(halves) == 5 and abs(halves.count(0) - halves.count(1)) == 1
    assert chosen == enrich.choose(questions(9, "test"), 10, seed=1) != enrich.choose(questions(9, "test"), 10, seed=2)


def test_layers_are_ranked_on_the_first_half_alone() -> None:
    def row(id: str, half: int, good: int) -> enrich.Row:
        logprobs = {f"layer:{i}": [0.0, -1.0] if i == good else [-1.0, 0.0] for i in range(3)}
        return enrich.Row(id, "s", half, 0, 1, 1, logprobs)

    rows = [row("a", 0, 2), row("b", 0, 2), row("c", 0, 1), *(row(str(i), 1, 0) for i in range(9))]
    assert enrich.ranking(rows, 3) == [2, 1, 0]
    with pytest.raises(C2CError, match="more questions"):
        enrich.ranking(rows[3:], 3)


def test_layer_sets() -> None:
    sets = enrich.layer_sets(4, [2, 0, 3, 1])
    assert sets["layer:3"] == [3] and sets["best:2"] == [0, 2] and sets["worst:1"] == [1]
    assert sets["bottom:2"] == [0, 1] and sets["top:3"] == [1, 2, 3]
    assert enrich.counts(24) == [1, 2, 3, 6, 9, 12, 15, 18, 21] and enrich.counts(1) == []


@pytest.mark.parametrize("positions", ["kept", "rotated"])
def test_a_run_resumes_and_says_everything(positions: str, tmp_path: Path) -> None:
    lm = receiver("qwen3")
    options = {"shots": 2, "limit": 8, "positions": positions, "max_tokens": 2000}
    first = enrich.run(lm, questions(6, "test"), questions(2, "dev"), tmp_path / "a", **options)
    assert first["about"]["receiver"]["name"] and first["about"]["seed"] == 0 and first["about"]["rows"] == 8
    assert first["all"]["oracle"]["questions"] == 8 and first["reported_on"]["best:1"]["questions"] == 4
    assert set(first["all"]["oracle"]["against_direct"]) >= {"difference", "interval", "p"}
    rows = (tmp_path / "a" / "rows.jsonl").read_text().splitlines()
    assert len(rows) == 8 and [json.loads(r)["half"] for r in rows] == [0] * 4 + [1] * 4
    # Killed in the middle of a row: the rest is asked, the same comes out.
    (tmp_path / "a" / "rows.jsonl").write_text("\n".join(rows[:5]) + "\n" + rows[5][:40])
    again = enrich.run(lm, questions(6, "test"), questions(2, "dev"), tmp_path / "a", **options)
    assert again == first
    others = [replace(q, question=f"{q.question} Now?") for q in questions(2, "dev")]
    with pytest.raises(C2CError, match="another exemplars_hash"):
        enrich.run(lm, questions(6, "test"), others, tmp_path / "a", **options)
    with pytest.raises(C2CError, match="another exemplars_hash, shots"):
        enrich.run(lm, questions(6, "test"), questions(2, "dev"), tmp_path / "a", **{**options, "shots": 1})


def test_long_subjects_and_subjects_without_exemplars_are_left_out(tmp_path: Path) -> None:
    lm = receiver("qwen3")
    dev = [*questions(2, "dev", ("sums",)), *questions(1, "dev", ("rivers",))]
    summary = enrich.run(lm, questions(4, "test"), dev, tmp_path, shots=2, limit=None, layers=False, max_tokens=2000)
    assert summary["left_out"] == ["rivers"] and summary["all"]["direct"]["questions"] == 4
    assert "reported_on" not in summary
    with pytest.raises(C2CError, match="fewer"):
        enrich.run(lm, questions(4, "test"), dev, tmp_path / "b", shots=2, max_tokens=20)


def test_exemplars_are_not_asked(tmp_path: Path) -> None:
    """One file for both: its first questions are exemplars, and the answer to each stands in the others' front."""
    lm, both = receiver("qwen3"), questions(5, "test", ("sums",))
    kept, exemplars, _ = enrich.fitting(lm, both, both, 2, 2000)
    assert exemplars["sums"] == both[:2] and kept == both[2:]
    with pytest.raises(C2CError, match="exemplars themselves"):
        enrich.fitting(lm, both[:2], both, 2, 2000)


def test_ids_that_come_twice_are_refused(tmp_path: Path) -> None:
    asked = questions(3, "test", ("sums",))
    with pytest.raises(C2CError, match="1 ids twice"):
        enrich.run(receiver("qwen3"), [*asked, asked[1]], questions(2, "dev", ("sums",)), tmp_path / "out", shots=2)
    assert not (tmp_path / "out").exists()


def test_one_question_has_no_other_half(tmp_path: Path) -> None:
    given = receiver("qwen3"), questions(1, "test", ("sums",)), questions(2, "dev", ("sums",)), tmp_path / "out"
    with pytest.raises(C2CError, match="the other; give more questions"):
        enrich.run(*given, shots=2, max_tokens=2000)
    assert not (tmp_path / "out").exists()
    assert enrich.run(*given, shots=2, max_tokens=2000, layers=False)["all"]["direct"]["questions"] == 1


def test_a_subject_s_exemplars_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves ask questions of every subject."""
    seen: list[str] = []
    read = enrich.read_shots
    monkeypatch.setattr(enrich, "read_shots", lambda lm, subject, some: seen.append(subject) or read(lm, subject, some))
    enrich.run(receiver("llama"), questions(4, "test"), questions(2, "dev"), tmp_path, shots=2, limit=8)
    assert sorted(seen) == ["rivers", "sums"]
