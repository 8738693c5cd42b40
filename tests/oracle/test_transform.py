"""Transformation: identical models, known maps, and the figures on clouds that are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cache2cache.errors import C2CError
from cache2cache.models.load import LM, load_lm
from cache2cache.oracle import clouds, transform
from cache2cache.pair import C2C
from cache2cache.tasks.base import Question
from tiny import TOKENIZER_OF, tiny_model, tiny_tokenizer


def lm(family: str, seed: int = 0) -> LM:
    return load_lm(tiny_model(family, seed), tiny_tokenizer(TOKENIZER_OF[family]))


def questions(count: int, words: str) -> list[Question]:
    return [
        Question(f"{words}-{i}", f"Which {words} is {i * 7 % 31} or {i}?", (f"{i}", "water", words, f"no {i}"), i % 4)
        for i in range(count)
    ]


TRAIN, TEST = questions(24, "river"), questions(6, "mountain")
QUICK = {"epochs": 3, "hidden_dim": 96, "batch_size": 64, "tsne_samples": 20, "perplexity": 5.0}


@pytest.mark.parametrize(("family", "key_space"), [("qwen3", "unrotated"), ("gemma3", "rotated")])
def test_identical_models_are_recovered_and_answer_alike(family: str, key_space: str, tmp_path: Path) -> None:
    model = lm(family)
    found = transform.run(model, model, TRAIN, TEST, tmp_path, key_space=key_space, **QUICK)
    for layer in found["layers"]:
        for kind in ("keys", "values"):
            assert layer[kind]["mlp"]["r2"] > 0.99 and layer[kind]["ridge"]["r2"] > 0.99
            assert layer[kind]["mean"]["r2"] <= 0
            assert layer[kind]["mlp"]["cosine"] > 0.99 > layer[kind]["mean"]["cosine"]
            rank = layer[kind]["rank"]
            assert rank["mlp"] == pytest.approx(rank["receiver"], rel=0.05)
        assert layer["attention_error"]["mlp"] < 0.1 < layer["attention_error"]["mean"]
    answers = found["answers"]
    assert answers["mlp"]["accuracy"] == answers["receiver"]["accuracy"] == answers["sharer"]["accuracy"]
    assert answers["mlp"]["against_receiver"]["p"] == 1
    assert found["mapped"] == 1


def test_a_random_start_learns(tmp_path: Path) -> None:
    """Two models that differ: the loss falls, and what is learned beats the mean."""
    few = transform.run(lm("qwen3"), lm("qwen2"), TRAIN, TEST, tmp_path / "a", start="random", **QUICK)
    more = transform.run(
        lm("qwen3"), lm("qwen2"), TRAIN, TEST, tmp_path / "b", start="random", **{**QUICK, "epochs": 30}
    )
    assert more["loss"] < 0.8 * few["loss"]
    assert more["average"]["mlp"]["values_r2"] > 0.1


def fitted(tmp_path: Path, receiver: str = "qwen3", sharer: str = "llama") -> tuple[C2C, transform.MLPFuser, tuple]:
    pair = C2C.from_models(lm(receiver), lm(sharer), transform.FuserConfig(variant="ridge"))
    pieces = transform.collect(pair, TRAIN, tmp_path, 8, 0)
    ridge = pair.fusers[0]
    ridge.fit(pieces[:-4], pieces[-4:])
    x, y = (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
    mlp = transform.MLPFuser(ridge.config.model_copy(update={"hidden_dim": 80}))
    mlp.measure(x, y)
    return pair, mlp, (x, y)


def test_the_mlp_starts_as_ridge_and_both_are_what_the_cache_gets(tmp_path: Path) -> None:
    pair, mlp, (x, y) = fitted(tmp_path)
    ridge = pair.fusers[0]
    mlp.start_from(ridge)
    with torch.no_grad():
        torch.testing.assert_close(mlp.change(x, y), ridge.change(x, y), atol=1e-3, rtol=1e-3)
    both = transform.read_both(pair, transform.encode(pair, TEST[0]))
    fused = C2C(pair.receiver, pair.sharers, [mlp.eval()]).fuse([both.prompt], clean=both.clean)
    inputs = mlp.inputs(both.clean.kv, both.sharer, both.where)
    expected = (mlp.change(*inputs) + inputs[1]).unflatten(-1, (2, 16))
    layers, places = mlp.receiver_layers, both.where[1]
    got = fused.kv.values[layers][:, 0][:, :, places].transpose(1, 2)
    torch.testing.assert_close(got, expected[len(layers) :], atol=1e-4, rtol=1e-4)


def test_what_is_tested_on_is_content(tmp_path: Path) -> None:
    """A template in front of the question is the same in every prompt, and would be known by heart."""
    pair, _, _ = fitted(tmp_path)
    both = transform.read_both(pair, transform.encode(pair, TEST[0]))
    content = [i for i, t in enumerate(both.where[1].tolist()) if both.prompt.content[t]]
    assert 0 < len(content) < both.where.shape[1]
    expected = pair.fusers[0].inputs(both.clean.kv, both.sharer, both.where[:, content])
    for mine, theirs in zip(transform.sample(pair, both, 10**6, "s", content=True), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert transform.sample(pair, both, 10**6, "s")[0].shape[1] == both.where.shape[1]


def test_too_narrow_for_a_linear_start(tmp_path: Path) -> None:
    pair, mlp, _ = fitted(tmp_path)
    narrow = transform.MLPFuser(mlp.config.model_copy(update={"hidden_dim": 63}))
    with pytest.raises(C2CError, match="at least 64"):
        narrow.start_from(pair.fusers[0])


def test_training_resumes_where_it_was(tmp_path: Path) -> None:
    options = {"batch_size": 64, "seed": 3}
    results = []
    for stops in ([4], [2, 4]):
        torch.manual_seed(0)
        _, mlp, (x, y) = fitted(tmp_path / "caches")
        path = tmp_path / f"{len(stops)}.safetensors"
        for stop in stops:
            if stop < 4:  # killed after two epochs of four
                with pytest.raises(KeyboardInterrupt):
                    transform.train_mlp(mlp, x.clone(), y.clone(), path, epochs=4, progress=killer(stop), **options)
                torch.manual_seed(1)
                _, mlp, _ = fitted(tmp_path / "caches")
                continue
            transform.train_mlp(mlp, x.clone(), y.clone(), path, epochs=4, **options)
        results.append(mlp.layer2.weight.detach().clone())
    torch.testing.assert_close(results[0], results[1])


def killer(after: int):
    done = 0

    def progress(epochs: int) -> None:
        nonlocal done
        done += epochs
        if done == after:
            raise KeyboardInterrupt

    return progress


def test_a_killed_run_goes_on_and_a_finished_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = lm("qwen3"), lm("llama")
    whole = transform.run(*models, TRAIN, TEST, tmp_path / "whole", **QUICK)
    answer, asked = transform.answer, []

    def dies(pairs, question, both):
        asked.append(question.id)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return answer(pairs, question, both)

    monkeypatch.setattr(transform, "answer", dies)
    with pytest.raises(KeyboardInterrupt):
        transform.run(*models, TRAIN, TEST, tmp_path / "killed", **QUICK)
    assert not (tmp_path / "killed" / "result.json").exists()
    again = transform.run(*models, TRAIN, TEST, tmp_path / "killed", **QUICK)
    assert len(asked) == 4 + 3, "three answers were kept"
    assert again["layers"] == whole["layers"] and again["answers"] == whole["answers"]
    monkeypatch.setattr(transform, "collect", None)
    assert transform.run(*models, TRAIN, TEST, tmp_path / "killed", **QUICK) == again
    assert not (tmp_path / "killed" / "work").exists()


def test_chosen_layers(tmp_path: Path) -> None:
    found = transform.run(lm("qwen3"), lm("llama"), TRAIN, TEST, tmp_path, layers=[3], **QUICK)
    assert [(x["receiver_layer"], x["sharer_layer"]) for x in found["layers"]] == [(3, 2)]
    assert found["tsne"]["layer"] == 3 and len(found["tsne"]["points"]["transformed"]) == 20
    for wrong in ([0], [3, 3], []):
        with pytest.raises(C2CError, match="1 to 3"):
            transform.chosen_layers([(1, 0), (2, 1), (3, 2)], wrong)


def test_a_perplexity_for_more_positions_than_short_prompts_have(tmp_path: Path) -> None:
    """That is known behind everything else; the run ends with the highest one that there can be, and says so."""
    several = {**QUICK, "tsne_samples": 400, "test_positions": 400, "perplexity": 1000.0}
    found = transform.run(lm("qwen3"), lm("llama"), TRAIN, TEST[:1], tmp_path, layers=[3], **several)
    assert found["tsne"]["perplexity"] == 3 * found["tsne"]["samples"] - 1 < 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": TEST}, "16 or more"),
        ({"test": TRAIN[:2]}, "both trained and tested"),
        ({"start": "warm"}, "ridge or random"),
        ({"tsne_layer": 0}, "choose one"),
        ({"hidden_dim": 63}, "at least 64"),
        ({"test": TEST[:1], "test_positions": 1}, "4 or more"),
        ({"test": [*TEST, TEST[0]]}, "1 ids twice, such as mountain-0"),
    ],
)
def test_bad_input(changes: dict, message: str, tmp_path: Path) -> None:
    given = {"train": TRAIN, "test": TEST, "layers": [2, 3], **QUICK, **changes}
    with pytest.raises(C2CError, match=message):
        transform.run(lm("qwen3"), lm("llama"), given.pop("train"), given.pop("test"), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


# ---- figures --------------------------------------------------------------------------------------------------------


def normal(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_overlap_tells_a_sub_region_from_elsewhere() -> None:
    reference = normal(400, 3, 0)
    same = clouds.overlap(normal(400, 3, 1), reference)
    part = clouds.overlap(normal(400, 3, 1) * 0.2, reference)
    away = clouds.overlap(normal(400, 3, 1) + 20, reference)
    assert same["precision"] > 0.9 and same["coverage"] > 0.9
    assert part["precision"] > 0.95 and part["coverage"] < 0.5
    assert away == {"precision": 0.0, "coverage": 0.0}


def test_neighbours() -> None:
    own, others = normal(200, 4, 0), normal(200, 4, 1) + 10
    assert clouds.neighbour_share(normal(50, 4, 2), own, others) == 1
    assert clouds.neighbour_share(normal(50, 4, 2) + 10, own, others) == 0
    assert clouds.neighbour_share(normal(50, 4, 2), own, normal(200, 4, 3)) == pytest.approx(0.5, abs=0.1)


def test_one_space_pads_and_scales() -> None:
    wide, narrow = normal(50, 6, 0) * 100, normal(50, 4, 1) * 7
    reference, other = clouds.in_one_space(narrow, wide)
    assert reference.shape == other.shape == (50, 6)
    torch.testing.assert_close(reference[:, :4].std(0), torch.ones(4))
    assert reference[:, 4:].abs().max() == 0 and other[:, 4:].std(0).max() < 2


def test_fit_figures_of_known_errors() -> None:
    y = normal(1000, 2, 0)[None] * torch.tensor([10.0, 1.0])
    mean = y.mean(1, keepdim=True)
    assert transform.fit_figures(y, y, mean) == {"r2": [1.0], "r2_channels": [1.0], "cosine": [1.0]}
    assert transform.fit_figures(y, mean.expand_as(y), mean)["r2"] == [0.0]
    half = torch.stack([y[..., 0], mean[..., 1].expand_as(y[..., 1])], dim=-1)  # the large channel alone is right
    found = transform.fit_figures(y, half, mean)
    assert found["r2"][0] == pytest.approx(100 / 101, abs=0.01) and found["r2_channels"] == [0.5]
