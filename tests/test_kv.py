"""Caches: what a model stores comes back stacked, and a cache built back is worth the same."""

from __future__ import annotations

import copy
import random
from itertools import combinations, pairwise

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import DynamicCache, QuantizedCache

from cache2cache.errors import C2CError
from cache2cache.kv import (
    CACHE,
    KV,
    GrowingLayer,
    Read,
    like_lengths,
    pad_left,
    positions_of,
    prefill,
    prefill_prompts,
)
from cache2cache.models import LM, load_lm
from tiny import FAMILIES, tiny_model


def lm_of(family: str, **overrides: object) -> LM:
    return load_lm(tiny_model(family, **overrides))


def rows_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(8, 200, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_is_what_the_model_itself_stores(family: str) -> None:
    lm = lm_of(family)
    ids = torch.tensor(rows_of([23]))  # Gemma's window is 8
    cache = DynamicCache()
    lm.model(input_ids=ids, **{CACHE: cache})
    stored = KV.from_cache(cache)
    read = prefill(lm, ids, torch.ones_like(ids))
    assert read.keys.shape == (lm.num_layers, 1, lm.num_kv_heads, 23, lm.head_dim)
    torch.testing.assert_close(read.keys, stored.keys, atol=1e-6, rtol=0)
    torch.testing.assert_close(read.values, stored.values, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_in_pieces_and_of_lower_layers(family: str) -> None:
    lm = lm_of(family)
    ids, mask = pad_left(rows_of([20, 9, 14]), 0, "cpu")
    whole = prefill(lm, ids, mask)
    pieces = prefill(lm, ids, mask, chunk_tokens=12)
    lower = prefill(lm, ids, mask, num_layers=2)
    real = mask.bool()
    for part, layers in ((pieces, lm.num_layers), (lower, 2)):
        assert part.keys.shape[0] == layers
        for a, b in ((part.keys, whole.keys[:layers]), (part.values, whole.values[:layers])):
            a, b = (x.permute(0, 2, 4, 1, 3)[..., real] for x in (a, b))
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_behind_the_last_keys_nothing_is_computed(family: str) -> None:
    lm = lm_of(family)
    layers, ids = list(lm.decoder.layers), torch.tensor(rows_of([20]))  # type: ignore[arg-type]
    ran: list[int] = []
    for index, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    whole = prefill(lm, ids, torch.ones_like(ids), chunk_tokens=10)
    assert ran == [*range(lm.num_layers - 1)] * 2  # two pieces
    ran.clear()
    ended: list[object] = []
    layers[-1].register_forward_hook(lambda *_: ended.append(_))  # as FSDP and offloading have one
    hooked = prefill(lm, ids, torch.ones_like(ids), chunk_tokens=10)
    assert ran == [*range(lm.num_layers)] * 2 and len(ended) == 2
    assert torch.equal(whole.keys, hooked.keys) and torch.equal(whole.values, hooked.values)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_changes_nothing(family: str) -> None:
    lm = lm_of(family)
    rows = rows_of([5, 17, 11])
    ids, mask = pad_left(rows, 0, "cpu")
    batch = prefill(lm, ids, mask)
    for row, tokens in enumerate(rows):
        alone = prefill(lm, *pad_left([tokens], 0, "cpu"))
        torch.testing.assert_close(batch.keys[:, row, :, -len(tokens) :], alone.keys[:, 0], atol=2e-5, rtol=0)
        torch.testing.assert_close(batch.values[:, row, :, -len(tokens) :], alone.values[:, 0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_unlike_length_are_read_apart(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a length on all of them, below it where that makes fewer positions."""
    lm = lm_of(family)
    rows = rows_of([20, 9, 20, 14])
    ids, mask = pad_left(rows, 0, "cpu")
    past = [None, None, Read(rows[2][:15], prefill(lm, *pad_left([rows[2][:15]], 0, "cpu"))), None]
    together = [prefill(lm, ids, mask, num_layers=n) for n in (2, None)]
    passes: list[tuple[int, ...]] = []
    lm.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    apart = []
    for setting, value, whole, behind in (
        ("_LONG", 10, [(2, 20), (1, 14), (1, 9)], [(1, 20), (1, 14), (2, 9)]),
        ("_WORTH", 6, [(2, 20), (2, 14)], [(2, 20), (2, 9)]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"cache2cache.kv.{setting}", value)
            passes.clear()
            apart += [prefill(lm, ids, mask, num_layers=2, past=()), prefill(lm, ids, mask, past=past)]
        assert passes == whole + behind
    for a, b in zip(apart, 2 * together, strict=True):
        assert a.keys.shape == b.keys.shape
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            x, y = (t.permute(0, 2, 4, 1, 3)[..., mask.bool()] for t in (x, y))
            torch.testing.assert_close(x, y, atol=2e-5, rtol=0)
        assert a.keys.isfinite().all() and a.values.isfinite().all()  # padding too, whose numbers must be some
    for alone in apart[::2]:  # beyond its group's longest row there is nothing
        assert (alone.keys[:, 1, :, :6] == 0).all()
    assert (apart[0].keys[:, 1, :, :11] == 0).all()
    passes.clear()
    seen: list[int] = []
    prefill(lm, ids, mask, on_layer=lambda index, _: seen.append(index))  # who waits for layers gets them in order
    prefill(lm, ids[:1], mask[:1])
    assert passes == [(4, 20), (1, 20)] and seen == [*range(lm.num_layers)]


def test_rows_are_grouped_for_the_fewest_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other way to cut the rows, longest first, has fewer; a row goes into one group."""
    monkeypatch.setattr("cache2cache.kv._WORTH", 25)
    generator = random.Random(0)
    for _ in range(20):
        lengths = [generator.choice([0, 3, 20, 30, 31, 40, 90]) for _ in range(8)]
        groups = like_lengths(lengths)
        assert sorted(row for group in groups for row in group) == list(range(8))
        order = sorted(lengths, reverse=True)
        cuts = [[0, *places, 8] for n in range(8) for places in combinations(range(1, 8), n)]
        costs = [sum((b - a) * order[a] + 25 for a, b in pairwise(cut)) for cut in cuts]
        assert sum(len(group) * max(lengths[row] for row in group) + 25 for group in groups) == min(costs)
    monkeypatch.setattr("cache2cache.kv._LONG", 30)
    assert like_lengths([31, 3, 30, 31, 20, 29]) == [[0, 3], [2], [5, 4], [1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_all_rows_begin_with_is_read_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the layers that are asked for, in pieces, where enough is spared; not where positions are given, or it is
    forbidden, as to a sharded model."""
    lm = lm_of(family)
    start, *rest = rows_of([30, 5, 17, 1, 0])  # the last row is no longer than what is alike
    ids, mask = pad_left([start + row for row in rest], 0, "cpu")
    passes: list[tuple[int, ...]] = []

    def forward(*arguments: object, **named: object) -> object:
        tokens = named["input_ids"]
        assert isinstance(tokens, torch.Tensor)
        passes.append(tuple(tokens.shape))
        return type(lm.decoder).forward(lm.decoder, *arguments, **named)

    monkeypatch.setattr(lm.decoder, "forward", forward)
    places = positions_of(mask)
    whole = prefill(lm, ids, mask, positions=places)
    assert passes == [(4, 47)]
    passes.clear()
    seen: list[int] = []
    once = prefill(lm, ids, mask, on_layer=lambda index, _: seen.append(index))
    assert passes == [(1, 30), (4, 17)] and seen == [*range(lm.num_layers)]
    lower = prefill(lm, ids, mask, num_layers=2)
    for part in (once, lower):
        for a, b in ((part.keys, whole.keys[: len(part.keys)]), (part.values, whole.values[: len(part.keys)])):
            a, b = (x.permute(0, 2, 4, 1, 3)[..., mask.bool()] for x in (a, b))
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    passes.clear()
    prefill(lm, ids[:2], mask[:2])  # which would spare 30 tokens
    assert passes == [(2, 47)]
    passes.clear()
    prefill(lm, *pad_left([start * 3] * 2, 0, "cpu"))
    assert passes == [(1, 90)]
    passes.clear()
    prefill(lm, ids, mask, past=[None] * 4, chunk_tokens=20)
    assert passes == [(1, 20), (1, 10), *[(4, 5)] * 3, (4, 2)]  # no more at once than is allowed
    passes.clear()
    prefill(lm, ids, mask, past=())
    assert passes == [(4, 47)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_built_back_generates_the_same(family: str) -> None:
    lm = lm_of(family)
    rows = rows_of([21, 12])
    prompt = prefill_prompts(lm, rows)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = lm.model.generate(input_ids=prompt.input_ids, attention_mask=prompt.attention_mask, **options)
    assert torch.equal(lm.model.generate(**prompt.inputs(), **options), expected)
    # The prefill can be used again: decoding has not changed it.
    assert torch.equal(lm.model.generate(**prompt.inputs(), **options), expected)


@torch.no_grad()
def test_a_growing_cache_is_written_in_place() -> None:
    generator = torch.Generator().manual_seed(0)
    given = KV(*torch.randn(2, 1, 2, 3, 5, 4, generator=generator))
    kept, ours, stock = given.clone(), given.to_cache(), DynamicCache()
    stock.update(given.keys[0], given.values[0], 0)
    places = []
    for step in range(300):
        new = torch.randn(2, len(stock.layers[0].keys), 3, 1, 4, generator=generator)
        read = [cache.update(*new, 0) for cache in (ours, stock)]
        assert all(torch.equal(a, b) for a, b in zip(*read, strict=True)), step
        places.append(read[0][0].data_ptr())
        if step == 200:  # what beams do, and cropping
            for cache in (ours, stock):
                cache.reorder_cache(torch.tensor([1, 0]))
                cache.batch_repeat_interleave(2)
        if step == 210:
            longer = ours.layers[0].keys
            had = longer.clone()
            for cache in (ours, stock):
                cache.crop(-3)
        if step == 220:
            assert torch.equal(longer, had)  # nobody writes to what was handed out
            before, other = ours.layers[0].keys.clone(), copy.deepcopy(ours)
            other.update(*new, 0)
            assert torch.equal(other.layers[0].keys[:, :, :-1], before) and torch.equal(ours.layers[0].keys, before)
    assert len(set(places)) <= 6 and len(set(places[:129])) == 1
    assert torch.equal(KV.from_cache(ours).keys, KV.from_cache(stock).keys)
    assert torch.equal(given.keys, kept.keys) and torch.equal(given.values, kept.values)


def test_a_growing_cache_is_nothing_in_the_way_of_gradients() -> None:
    keys, values = torch.ones(1, 1, 1, 2, 4, requires_grad=True), torch.ones(1, 1, 1, 2, 4)
    cache = KV(keys, values).to_cache()
    for _ in range(2):
        read, _ = cache.update(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4), 0)
    read.pow(2).sum().backward()
    assert torch.equal(keys.grad, torch.full_like(keys, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_holds_the_same_and_the_prompt_stays_as_it_was(family: str) -> None:
    lm = lm_of(family)
    prompt = prefill_prompts(lm, rows_of([21, 12]))
    cache = prompt.kv.to_static_cache(26)
    before = prompt.kv.keys.clone()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = lm.model.generate(**prompt.inputs(), **options)
    assert torch.equal(lm.model.generate(**{**prompt.inputs(), CACHE: cache}, **options), expected)
    assert torch.equal(lm.model.generate(**prompt.inputs(static_length=30), **options), expected)
    assert torch.equal(prompt.kv.keys, before)
    assert torch.equal(torch.stack([layer.keys[:, :, :20] for layer in cache.layers]), before)
    with pytest.raises(C2CError, match="19 positions can't hold 20"):
        prompt.kv.to_static_cache(19)


def test_prompts_of_one_token_have_an_empty_cache() -> None:
    lm = lm_of("llama")
    prompt = prefill_prompts(lm, [[5]])
    assert prompt.kv.length == 0
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(
        lm.model.generate(**prompt.inputs(), **options), lm.model.generate(torch.tensor([[5]]), **options)
    )


def test_positions_under_left_padding() -> None:
    ids, mask = pad_left([[7, 8, 9], [5]], 0, "cpu")
    assert ids.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions_of(mask).tolist() == [[0, 1, 2], [0, 0, 0]]


def test_a_window_that_has_dropped_positions_is_refused() -> None:
    model = tiny_model("gemma3")
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor(rows_of([20])), **{CACHE: cache})
    with pytest.raises(C2CError, match="kept 7 of 20 positions"):
        KV.from_cache(cache)


def test_a_layer_on_another_device_takes_its_cache_there() -> None:
    """Once, and goes on in it."""
    layer = GrowingLayer(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    new = torch.zeros(1, 2, 1, 4, device="meta")
    with torch.no_grad():
        for length in (4, 5):
            keys, values = layer.update(new, new)
            assert {keys.device.type, values.device.type} == {"meta"} and keys.shape[2] == length


def test_the_lowest_layers_of_a_decoder_with_a_hook() -> None:
    """accelerate's, as of a device_map, runs the forward of all layers."""
    lm = lm_of("llama")
    ids = torch.tensor([[4, 5, 6, 7]])
    expected = prefill(lm, ids, torch.ones_like(ids), num_layers=2)
    add_hook_to_module(lm.decoder, ModelHook())
    found = prefill(lm, ids, torch.ones_like(ids), num_layers=2)
    assert (
        len(found.keys) == 2 and torch.equal(found.keys, expected.keys) and torch.equal(found.values, expected.values)
    )


def test_caches_without_one_key_per_position_are_refused() -> None:
    model = tiny_model("llama")
    try:
        cache = QuantizedCache(backend="quanto", config=model.config)
    except ImportError:
        pytest.skip("no backend for quantised caches is installed")
    with pytest.raises(C2CError, match="Quant"):
        KV.from_cache(cache)


def test_a_prompt_beyond_the_context_is_refused() -> None:
    lm = lm_of("llama", max_position_embeddings=10)
    with pytest.raises(C2CError, match=r"11 tokens .* context is 10"):
        prefill(lm, *pad_left(rows_of([11]), 0, "cpu"))
