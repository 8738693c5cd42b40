"""The pair on four families of tiny random models with unequal shapes: exactness of everything the seam promises."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessorList,
    Phi3Config,
    Phi3ForCausalLM,
    StoppingCriteria,
    TextStreamer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cache2cache import C2C, C2CError, FuserConfig, load_lm
from cache2cache.decode import generate
from cache2cache.evaluation.writing import write_on
from cache2cache.kv import prefill_prompts
from cache2cache.models import LM
from cache2cache.pair import FOREIGN, PromptIds, foreign
from tiny import FAMILIES, TOKENIZER_OF, spaced_tokenizer, tiny_model, tiny_tokenizer

OPTIONS: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You are helpful."},
        {"role": "user", "content": "水是生命之源。 What is water?"},
        {"role": "assistant", "content": "It boils."},
        {"role": "user", "content": "Why?"},
    ],
    [{"role": "user", "content": "Plants"}],
]
# Every family is once the receiver and once the sharer.
PAIRS = list(pairwise([*FAMILIES, FAMILIES[0]]))


def lm_of(family: str, seed: int = 0, **overrides: Any) -> LM:
    return load_lm(tiny_model(family, seed, **overrides), tokenizer=tiny_tokenizer(TOKENIZER_OF[family]))


def pair_of(receiver: str, *sharers: str, mode: str = "parallel", **settings: Any) -> C2C:
    torch.manual_seed(0)
    config = FuserConfig(**{"hidden_dim": 16, "intermediate_dim": 12, "gate_init": 1.0, **settings})
    others = [lm_of(family, seed=7 + i) for i, family in enumerate(sharers)]
    return C2C.from_models(lm_of(receiver), others, config, mode=mode)  # type: ignore[arg-type]


def alike(*, more: Sequence[tuple[str, str]] = (), **settings: Any) -> C2C:
    """Two models of one vocabulary and unlike templates, as Qwen3 and Qwen2.5 are; `more`: families and token maps of
    further sharers."""
    torch.manual_seed(0)
    common = {"hidden_dim": 16, "intermediate_dim": 12, "gate_init": 1.0}
    sharer = lm_of("qwen2", 7, vocab_size=264)
    sharer.tokenizer.chat_template = "Some words before: " + sharer.tokenizer.chat_template  # type: ignore[union-attr, operator]
    sharers = [sharer, *(lm_of(family) for family, _ in more)]
    configs = [FuserConfig(**common, **settings), *(FuserConfig(**common, token_map=name) for _, name in more)]  # type: ignore[arg-type]
    return C2C.from_models(lm_of("qwen3"), sharers, configs)


def in_bfloat16(pair: C2C) -> C2C:
    for lm in (pair.receiver, *pair.sharers):
        lm.model.to(torch.bfloat16)  # type: ignore[arg-type]
    return pair


def alone(lm: LM, chat: list[dict[str, str]]) -> torch.Tensor:
    """What stock transformers does with the chat."""
    ids = lm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)  # type: ignore[union-attr]
    return lm.model.generate(**ids, pad_token_id=0, **OPTIONS)


@pytest.mark.parametrize(("receiver", "sharer"), PAIRS)
def test_closed_gates_are_the_receiver(receiver: str, sharer: str) -> None:
    pair = pair_of(receiver, sharer, gate_init=0.0)
    for chat in CHATS:
        if receiver == "llama" and chat[0]["role"] == "system":
            continue  # the tiny template trims; covered by the alignment tests
        expected = alone(pair.receiver, chat)
        assert torch.equal(pair.generate(chat, **OPTIONS), expected)
        out = pair.generate(chat, output_logits=True, return_dict_in_generate=True, **OPTIONS)
        plain = pair.receiver.model(expected).logits[0, -8:-1]
        torch.testing.assert_close(torch.cat(out.logits), plain.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("receiver", "sharer"), PAIRS)
def test_bfloat16(receiver: str, sharer: str) -> None:
    """Closed gates are the receiver, and open ones give float32's fused cache up to rounding."""
    closed = in_bfloat16(pair_of(receiver, sharer, gate_init=0.0))
    fused = closed.prefill(CHATS[::2])
    plain = prefill_prompts(closed.receiver, [closed.encode(chat).receiver for chat in CHATS[::2]])
    assert fused.kv.keys.dtype == torch.bfloat16
    assert torch.equal(fused.kv.keys, plain.kv.keys) and torch.equal(fused.kv.values, plain.kv.values)
    assert torch.equal(closed.generate(fused, **OPTIONS), generate(closed.receiver, plain, **OPTIONS))

    exact = pair_of(receiver, sharer).prefill(CHATS[2])
    opened = in_bfloat16(pair_of(receiver, sharer)).prefill(CHATS[2])
    clean = prefill_prompts(pair_of(receiver, sharer).receiver, exact.input_ids.tolist())
    for kind in ("keys", "values"):
        got, wanted, unfused = (getattr(x.kv, kind).float() for x in (opened, exact, clean))
        assert 5 * (got - wanted).norm() < (wanted - unfused).norm()  # False for what is no number


@pytest.mark.parametrize(("receiver", "sharer"), PAIRS)
def test_open_gates_are_not(receiver: str, sharer: str) -> None:
    pair = pair_of(receiver, sharer)
    fused = pair.prefill(CHATS[1])
    clean = pair_of(receiver, sharer, gate_init=0.0).prefill(CHATS[1])
    assert fused.fused_positions[0] > 20 and 0.1 < fused.coverage[0][0] < 1
    assert not torch.allclose(fused.kv.values, clean.kv.values, atol=1e-2)


@pytest.mark.parametrize(("receiver", "sharer"), PAIRS)
def test_batch_equals_one_by_one(receiver: str, sharer: str) -> None:
    pair = pair_of(receiver, sharer)
    fused = pair.prefill(CHATS)
    together = pair.generate(fused, **OPTIONS)[:, fused.input_ids.shape[1] :]
    scores = pair.score(CHATS, [[" A", " Paris"]] * 3)
    for row, chat in enumerate(CHATS):
        single = pair.prefill(chat)
        length = single.kv.length
        torch.testing.assert_close(fused.kv.keys[:, row, :, -length:], single.kv.keys[:, 0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(fused.kv.values[:, row, :, -length:], single.kv.values[:, 0], atol=1e-4, rtol=1e-4)
        assert torch.equal(pair.generate(chat, **OPTIONS)[0, length + 1 :], together[row])
        for a, b in zip(pair.score(chat, [" A", " Paris"]), scores[row], strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3) and a.num_tokens == b.num_tokens
    assert fused.bytes_passed == sum(pair.prefill(chat).bytes_passed for chat in CHATS)


@pytest.mark.parametrize(("receiver", "sharer"), PAIRS)
def test_stream_equals_generate(receiver: str, sharer: str) -> None:
    pair = pair_of(receiver, sharer)
    for chat in CHATS:
        fused = pair.prefill(chat)
        chunks = list(pair.stream(fused, **OPTIONS))
        expected = pair.generate(chat, **OPTIONS)[0, fused.input_ids.shape[1] :]
        assert [c.token for c in chunks if c.token is not None] == expected.tolist()
        text = pair.chat(chat, **OPTIONS)
        if "\ufffd" not in text or receiver != "gemma3":  # invalid bytes change how the valid ones before them decode
            assert "".join(c.text for c in chunks) == text


@pytest.mark.parametrize("more", [(), [("llama", "span")]], ids=str)
def test_by_the_map_same_all_read_the_receivers_tokens(more: list[tuple[str, str]]) -> None:
    """Every position but the last is fused, template and all, as published without alignment."""
    pair, usual = alike(token_map="same", more=more), alike()
    for chat in CHATS:
        prompt = pair.encode(chat, prefix="naive")
        assert list(prompt.sharers[0]) == list(prompt.receiver) and prompt.coverage[0] == 1
        assert list(prompt.maps[0]) == list(range(len(prompt.receiver)))
        assert usual.encode(chat).sharers[0] != list(prompt.receiver)
        if more:
            assert prompt.maps[1] == pair_of("qwen3", "llama").encode(chat, prefix="naive").maps[0]
        else:
            given, rendered = pair.prefill(list(prompt.receiver)), pair.prefill(chat, prefix="naive")
            assert torch.equal(rendered.kv.keys, given.kv.keys) and torch.equal(rendered.kv.values, given.kv.values)
            assert rendered.fused_positions == [len(prompt.receiver) - 1]


def test_the_map_same_beside_a_published_one_counts_its_padding() -> None:
    """There is one row of positions for the receiver, and both read its tokens at these."""
    pair = alike(token_map="same", more=[("llama", "first")])
    prompt = pair.encode(CHATS[0])
    assert prompt.positions is not None and prompt.sharer_positions[0] == prompt.positions
    assert pair.chat(CHATS[0], **OPTIONS)


def test_the_map_same_is_for_models_of_one_vocabulary() -> None:
    with pytest.raises(C2CError, match=r"map same .* reads the receiver's token ids, of which \d+% are other tokens"):
        pair_of("llama", "qwen3", token_map="same")
    pair = alike(token_map="same")
    pair.sharers[0] = lm_of("qwen2", vocab_size=100)  # fewer rows than its tokenizer has tokens
    with pytest.raises(C2CError, match=r"token map same .*reads the receiver's token ids, but it has only 100 of them"):
        pair.prefill(CHATS[1])


def test_token_ids_are_for_models_that_read_them_alike() -> None:
    pair = pair_of("llama", "qwen3")
    for ids in (pair.encode(CHATS[1]).receiver, torch.tensor([[5, 6, 7]])):
        with pytest.raises(C2CError, match=r"has another tokenizer than .*; give the prompt as text or messages"):
            pair.prefill(ids)
    few = alike()  # one vocabulary, as good as: Qwen3 has a few tokens more than Qwen2.5
    few.sharers[0].need_tokenizer().add_tokens(["<one>"])
    assert 0 < foreign(few.sharers[0], few.receiver) < FOREIGN
    ids = few.encode("What is water?").receiver
    assert torch.equal(few.prefill(ids).kv.keys, few.prefill(np.array(ids)).kv.keys)


def test_a_text_is_what_a_user_says() -> None:
    """To `chat`; `generate` goes on with it."""
    pair = pair_of("llama", "qwen3")
    texts = ["What is water?", "Why?"]
    said = [pair.chat([{"role": "user", "content": text}], **OPTIONS) for text in texts]
    assert pair.chat(texts[0], **OPTIONS) == said[0] and pair.chat(texts, **OPTIONS) == said
    assert pair.generate(texts[0], **OPTIONS).shape[1] < pair.generate([CHATS[0]], **OPTIONS).shape[1]


def test_characters_of_several_tokens_are_streamed_whole() -> None:
    pair = pair_of("qwen3", "llama", gate_init=0.0)
    script = iter("水 é🙂".encode())
    tokenizer = pair.receiver.tokenizer
    byte_ids = {byte: tokenizer.convert_tokens_to_ids(c) for byte, c in bytes_to_unicode().items()}  # type: ignore[union-attr]

    def force(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:] = -float("inf")
        scores[:, byte_ids[next(script)]] = 0
        return scores

    options = {"max_new_tokens": 10, "do_sample": False, "logits_processor": LogitsProcessorList([force])}
    assert [c.text for c in pair.stream(CHATS[0], **options)] == ["", "", "水", " ", "", "é", "", "", "", "🙂"]


@pytest.mark.parametrize(("receiver", "sharer"), PAIRS)
def test_save_and_load_are_identical(receiver: str, sharer: str, tmp_path: Path) -> None:
    pair = pair_of(receiver, sharer, variant="c2c-c", layer_map="k_nearest")
    pair.save_pretrained(tmp_path / "fuser")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the same weights: nothing to warn of
        again = C2C.from_pretrained(tmp_path / "fuser", receiver=pair.receiver, sharers=pair.sharers)
    for chat in CHATS:
        a, b = pair.prefill(chat), again.prefill(chat)
        assert torch.equal(a.kv.keys, b.kv.keys) and torch.equal(a.kv.values, b.kv.values)
        assert torch.equal(pair.generate(a, **OPTIONS), again.generate(b, **OPTIONS))


def test_a_model_that_is_given_is_frozen_and_put_into_evaluation_mode() -> None:
    """PEFT returns models that are trained; with their dropout every score would be another."""
    model = tiny_model("llama").train().requires_grad_(True)
    lm = LM(model, tiny_tokenizer("words"), "given")
    assert not lm.model.training and not any(p.requires_grad for p in lm.model.parameters())


def test_a_fuser_of_a_later_format_is_refused(tmp_path: Path) -> None:
    pair = pair_of("llama", "qwen3")
    pair.save_pretrained(tmp_path / "fuser")
    file = tmp_path / "fuser" / "config.json"
    file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(C2CError, match=r"has fuser format 2, this version reads 1; update cache2cache"):
        C2C.from_pretrained(tmp_path / "fuser", receiver=pair.receiver, sharers=pair.sharers)


def test_continuations_are_no_text() -> None:
    pair = pair_of("llama", "qwen3")
    for prompts, continuations in ((CHATS[0], " A"), (CHATS[:2], [" A", " B"])):
        with pytest.raises(C2CError, match=r"continuations are a list of texts .*not a text; put it into a list"):
            pair.score(prompts, continuations)


def test_score_is_the_log_likelihood_of_stock_transformers() -> None:
    pair = pair_of("qwen3", "llama", gate_init=0.0)
    model, tokenizer = pair.receiver.model, pair.receiver.tokenizer
    scores = pair.score(CHATS[0], [" Paris", " A", "北"], prefix="The answer is")
    text = tokenizer.apply_chat_template(CHATS[0], tokenize=False, add_generation_prompt=True) + "The answer is"  # type: ignore[union-attr]
    ids = tokenizer(text, add_special_tokens=False).input_ids  # type: ignore[misc]
    for continuation, got in zip([" Paris", " A", "北"], scores, strict=True):
        more = tokenizer(continuation, add_special_tokens=False).input_ids  # type: ignore[misc]
        logprobs = model(torch.tensor([ids + more])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(more)[:, None]).sum().item()
        assert got.logprob == pytest.approx(expected, abs=1e-4)
        assert got.num_tokens == len(more)
        assert got.is_greedy == (logprobs.argmax(-1).tolist() == more)
    greedy = pair.generate(CHATS[0], prefix="The answer is", **OPTIONS)[0, len(ids) :].tolist()
    assert pair.score(CHATS[0], [greedy], prefix="The answer is")[0].is_greedy


def test_two_threads_share_a_pair() -> None:
    pair = pair_of("gemma3", "qwen2")
    expected = [pair.generate(chat, **OPTIONS) for chat in CHATS]
    got: dict[int, list[torch.Tensor]] = {}

    def work(number: int) -> None:
        got[number] = [pair.generate(chat, **OPTIONS) for _ in range(3) for chat in CHATS]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results in got.values():
        assert all(torch.equal(a, b) for a, b in zip(results, expected * 3, strict=True))


def test_closing_a_stream_stops_the_model() -> None:
    pair = pair_of("llama", "qwen3")
    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    threads = threading.active_count()
    hook = pair.receiver.model.register_forward_hook(count)
    chunks = pair.stream(CHATS[0], max_new_tokens=1500, do_sample=False, eos_token_id=None)
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    hook.remove()
    assert steps < 400 and threading.active_count() <= threads


def test_an_error_while_streaming_reaches_the_reader() -> None:
    pair = pair_of("llama", "qwen3")
    with pytest.raises(ValueError, match="model_kwargs"):
        list(pair.stream(CHATS[0], no_such_option=1))


def test_the_options_of_generate_pass_through() -> None:
    pair = pair_of("llama", "qwen3")
    fused = pair.prefill(CHATS[:2])
    torch.manual_seed(3)
    sampled = pair.generate(fused, do_sample=True, top_p=0.9, max_new_tokens=5, eos_token_id=None)
    torch.manual_seed(3)
    again = pair.receiver.model.generate(
        **fused.inputs(), do_sample=True, top_p=0.9, max_new_tokens=5, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(sampled, again)


def test_beams_on_a_clean_cache_are_those_of_stock_transformers() -> None:
    pair = pair_of("llama", "qwen3", gate_init=0.0)
    fused = pair.prefill(CHATS[:1] + CHATS[2:])
    options = {**OPTIONS, "num_beams": 3, "num_return_sequences": 2, "pad_token_id": 0}
    expected = pair.receiver.model.generate(input_ids=fused.input_ids, attention_mask=fused.attention_mask, **options)
    assert expected.shape[0] == 4
    assert torch.equal(pair.generate(fused, **options), expected)


# ---- ids, several sharers, what is and isn't computed ---------------------------------------------------------------


def test_token_ids_need_no_tokenizer() -> None:
    torch.manual_seed(0)
    config = FuserConfig(hidden_dim=8, intermediate_dim=8, gate_init=1.0)
    pair = C2C.from_models(tiny_model("qwen3"), tiny_model("qwen2", 5), config)
    ids = torch.randint(5, 200, (2, 9))
    batch = pair.generate(ids, **OPTIONS)
    for row in range(2):
        assert torch.equal(pair.generate(ids[row], **OPTIONS)[0], batch[row])
        assert torch.equal(pair.generate(ids[row].tolist(), **OPTIONS)[0], batch[row])
    alike = PromptIds(ids[0].tolist(), [ids[0].tolist()], [range(9)])
    assert torch.equal(pair.generate(alike, **OPTIONS)[0], batch[0])
    with pytest.raises(C2CError, match="no tokenizer"):
        pair.prefill("text")


def test_positions_without_a_partner_stay_as_they_are() -> None:
    pair = pair_of("llama", "qwen3")
    prompt = PromptIds([9, 10, 11, 12, 13], [[20, 21, 22]], [[-1, 0, -1, 2, 2]])
    clean = pair_of("llama", "qwen3", gate_init=0.0).prefill(prompt)
    fused = pair.prefill(prompt)
    same = [torch.equal(fused.kv.keys[:, :, :, t], clean.kv.keys[:, :, :, t]) for t in range(4)]
    assert same == [True, False, True, False]
    assert fused.fused_positions == [2]


def test_the_sharer_reads_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of("llama", "qwen2")  # 3 layers read the sharer's upper 3 of 5
    fuser = pair.fusers[0]
    with torch.no_grad():
        fuser.gate_logit.copy_(torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, -1.0]))  # keys of 0 and 1, values of 0
    seen: list[tuple[int, ...]] = []
    for index, layer in enumerate(pair.sharers[0].decoder.layers):
        layer.register_forward_pre_hook(lambda m, a, i=index: seen.append((i, a[0].shape[1])))
    prompt = PromptIds([9, 10, 11, 12], [[20, 21, 22, 23, 24]], [[0, 1, 1, 4]])
    fused = pair.prefill(prompt)
    assert seen == [(i, 2) for i in range(4)]  # sharer layers 0 to 3, and only the two tokens that are mapped
    kind_layers, width, floats, tokens = 3, 12, 4, 2
    assert fused.bytes_passed == kind_layers * width * floats * tokens
    with torch.no_grad():
        fuser.gate_logit.fill_(-1)
    seen.clear()
    pair.prefill(prompt)
    assert seen == []


def test_no_lm_head_before_the_last_position() -> None:
    pair = pair_of("qwen3", "llama")
    shapes: list[int] = []
    pair.receiver.model.lm_head.register_forward_pre_hook(lambda m, a: shapes.append(a[0].shape[1]))
    pair.sharers[0].model.lm_head.register_forward_pre_hook(lambda m, a: shapes.append(-1))
    pair.generate(CHATS[1], **OPTIONS)
    assert shapes == [1] * 7


def test_parallel_sharers_commute_and_sequential_ones_do_not() -> None:
    def answer(order: list[int], mode: str) -> torch.Tensor:
        pair = pair_of("llama", "qwen3", "gemma3", mode=mode)
        turned = C2C(pair.receiver, [pair.sharers[i] for i in order], [pair.fusers[i] for i in order], mode=mode)  # type: ignore[arg-type,misc]
        return turned.prefill(CHATS[1]).kv.keys

    torch.testing.assert_close(answer([0, 1], "parallel"), answer([1, 0], "parallel"), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(answer([0, 1], "sequential"), answer([1, 0], "sequential"), atol=1e-3)


def test_parallel_changes_are_summed() -> None:
    pair = pair_of("llama", "qwen3", "gemma3")
    both = pair.prefill(CHATS[0]).kv
    single = [C2C(pair.receiver, [pair.sharers[i]], [pair.fusers[i]]).prefill(CHATS[0]).kv for i in range(2)]  # type: ignore[list-item]
    clean = pair_of("llama", "qwen3", gate_init=0.0).prefill(CHATS[0]).kv
    torch.testing.assert_close(
        both.values - clean.values, sum(s.values - clean.values for s in single), atol=1e-5, rtol=1e-5
    )  # type: ignore[arg-type]


def test_prompts_beyond_gemmas_window() -> None:
    for receiver, sharer in (("gemma3", "llama"), ("llama", "gemma3")):
        chat = [{"role": "user", "content": "Plants make food from sunlight, water and air. " * 4}]
        closed = pair_of(receiver, sharer, gate_init=0.0)
        assert torch.equal(closed.generate(chat, **OPTIONS), alone(closed.receiver, chat))
        assert pair_of(receiver, sharer).prefill(chat).fused_positions[0] > 25  # the window is 8


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_of_decoding_is_that_of_the_receiver(family: str, options: dict[str, Any]) -> None:
    """Closed gates and a fixed seed: the same as `generate` without any cache given."""
    pair = pair_of(family, "qwen3", gate_init=0.0)
    kwargs = {**OPTIONS, **options}
    for chat in CHATS[::2]:
        ids = pair.prefill(chat).input_ids
        torch.manual_seed(5)
        fused = pair.generate(chat, **kwargs)
        torch.manual_seed(5)
        plain = pair.receiver.model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **kwargs)  # type: ignore[operator]
        assert torch.equal(fused, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_gives_the_same_answers(family: str) -> None:
    """Sampled, beams, left padding, prompts beyond Gemma's window of 8, one of a single token, room for more."""
    pair = pair_of(family, "qwen3")
    batch = pair.prefill([CHATS[1], CHATS[2]]) if family != "llama" else pair.prefill([CHATS[0], CHATS[2]])
    assert not batch.attention_mask.all()
    for fused in (batch, pair.prefill(PromptIds([9], [[20]], [[0]]))):
        for options in ({}, {"max_cache_len": 300}, {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 3}):
            answers = []
            for cache in ({}, {"cache_implementation": "static"}):
                torch.manual_seed(5)
                answers.append(pair.generate(fused, **{**OPTIONS, **options, **cache}))
            assert torch.equal(*answers)


def counting() -> tuple[Any, list[torch.fx.GraphModule]]:
    """A backend of `torch.compile` that needs no C++ compiler: it keeps the graphs it is given and runs them as is."""
    torch.compiler.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    return backend, graphs


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_on_a_static_cache_are_one_compiled_graph(family: str) -> None:
    """The same one for another prompt, if there is room for both, padded or not."""
    pair = pair_of(family, "qwen3")
    backend, graphs = counting()
    config = CompileConfig(backend=backend, mode=None, fullgraph=True)  # type: ignore[arg-type]
    config._compile_all_devices = True
    static = {"cache_implementation": "static", "max_cache_len": 200, "compile_config": config}
    for chats in ([CHATS[0], CHATS[2]], [CHATS[2], CHATS[2]]):
        fused = pair.prefill(chats)
        assert torch.equal(pair.generate(fused, **static, **OPTIONS), pair.generate(fused, **OPTIONS))
        assert len(graphs) == 1


def test_a_compiled_receiver_gives_the_same_answers() -> None:
    """`torch.compile` by hand, with the cache that grows: generate, stream, score."""
    pair = pair_of("llama", "qwen3")
    fused = pair.prefill(CHATS[0])

    def answers() -> Any:
        scores = pair.score(fused, [["a", "bc"]])[0]
        return pair.generate(fused, **OPTIONS), list(pair.stream(fused, **OPTIONS)), [s.logprob for s in scores]  # type: ignore[union-attr]

    tokens, chunks, logprobs = answers()
    backend, graphs = counting()
    pair.receiver.model.forward = torch.compile(pair.receiver.model.forward, backend=backend)  # type: ignore[method-assign]
    again = answers()
    assert graphs
    assert torch.equal(again[0], tokens) and again[1] == chunks and again[2] == pytest.approx(logprobs, abs=1e-4)


def test_settings_for_a_static_cache_may_come_in_a_configuration() -> None:
    pair = pair_of("llama", "qwen3")
    given = GenerationConfig(cache_implementation="static", **OPTIONS)
    assert torch.equal(pair.generate(CHATS[0], generation_config=given), pair.generate(CHATS[0], **OPTIONS))
    assert given.cache_implementation == "static" and given.pad_token_id is None  # stays as it was


def test_the_cache_that_gemmas_own_settings_ask_for_is_no_obstacle() -> None:
    pair = pair_of("gemma3", "qwen3")
    expected = pair.generate(CHATS[0], **OPTIONS)
    pair.receiver.model.generation_config.cache_implementation = "hybrid"  # type: ignore[union-attr]
    assert torch.equal(pair.generate(CHATS[0], **OPTIONS), expected)


def test_a_stream_from_a_static_cache_is_refused() -> None:
    with pytest.raises(C2CError, match="use generate with a streamer"):
        next(pair_of("llama", "qwen3").stream(CHATS[0], cache_implementation="static", **OPTIONS))


# ---- wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty"),
        ([], "no prompts"),
        ([{"role": "user", "content": ""}], "empty"),
        ([{"role": "user"}], "content"),
        (torch.empty(0, dtype=torch.long), "non-empty"),
        ([5, 100_000], "token id 100000 is outside the vocabulary"),
        (PromptIds([5, 6], [[7]], [[0, 1]]), "doesn't fit 2 receiver tokens and 1 sharer"),
        (PromptIds([5, 6], [], []), "the pair has 1"),
        ("caf\udce9", "behind 'caf' stands a byte, or half a character, that isn't UTF-8"),
        ([{"role": "user", "content": "caf\udce9 au lait"}], "isn't UTF-8; save or send it as UTF-8"),
    ],
)
def test_wrong_prompts(prompt: Any, words: str) -> None:
    with pytest.raises(C2CError, match=words):
        pair_of("qwen3", "qwen2").prefill(prompt)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"assistant_model": tiny_model("llama")}, "assistant_model .* reads the whole prompt again"),
        ({"assistant_early_exit": 1}, "assistant_early_exit .* reads the whole prompt again"),
        ({"token_healing": True}, "token_healing .* makes other tokens of the prompt's end"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens .* reads the whole prompt again"),
        ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)}, "reads the whole prompt again"),
        ({"use_cache": False}, "use_cache .* reads the whole prompt again"),
        ({"cache_implementation": "offloaded"}, "it is there already"),
        ({"cache_implementation": "static"}, "say how long the answer may get"),
        ({"attention_mask": torch.ones(1, 9)}, "attention_mask comes from the prompt; leave it out"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_decoding_that_a_given_cache_does_not_allow(options: dict[str, Any], words: str) -> None:
    with pytest.raises(C2CError, match=words):
        pair_of("llama", "qwen3").generate(CHATS[0], **options)


def test_a_prompt_or_answer_beyond_the_context() -> None:
    torch.manual_seed(0)
    config = FuserConfig(hidden_dim=8, intermediate_dim=8)
    pair = C2C.from_models(
        lm_of("qwen3", max_position_embeddings=40), lm_of("qwen2", max_position_embeddings=70), config
    )
    with pytest.raises(C2CError, match=r"context of .*, 40 tokens"):
        pair.chat(CHATS[0], **OPTIONS)  # one token a byte
    with pytest.raises(C2CError, match="30 prompt tokens and 20 new ones"):
        pair.generate(list(range(30)), max_new_tokens=20)


def test_a_fuser_for_other_shapes_or_weights(tmp_path: Path) -> None:
    pair = pair_of("llama", "qwen3")
    pair.save_pretrained(tmp_path)
    with pytest.raises(C2CError, match=r"3 layers, 3 KV heads of 8\), but .* has 5 layers, 1 KV heads of 12"):
        C2C.from_pretrained(tmp_path, receiver=lm_of("qwen2"), sharers=pair.sharers)
    with pytest.warns(UserWarning, match="trained for sharer .* with weights .* has weights"):
        C2C.from_pretrained(tmp_path, receiver=pair.receiver, sharers=lm_of("qwen3", seed=99))


def test_one_fuser_and_several_are_not_put_into_one_folder(tmp_path: Path) -> None:
    """Which of them `from_pretrained` reads would be anybody's guess."""
    one, two = pair_of("llama", "qwen3"), pair_of("llama", "qwen3", "qwen2")
    for first, second, words in ((one, two, "holds one fuser"), (two, one, "holds several fusers")):
        folder = tmp_path / words
        first.save_pretrained(folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(C2CError, match=rf"{words}, and would hold .* besides; choose another folder"):
            second.save_pretrained(folder)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        first.save_pretrained(folder)  # itself again


def test_a_model_saved_by_a_training_without_caches_answers() -> None:
    """`use_cache: false` of its settings is for training; asked for, it is refused as ever."""
    pair = pair_of("llama", "qwen3")
    expected = pair.chat(CHATS[0], **OPTIONS)
    settings = pair.receiver.model.generation_config
    settings.use_cache = False
    assert pair.chat(CHATS[0], **OPTIONS) == expected
    for asked in ({"use_cache": False}, {"generation_config": copy.deepcopy(settings)}):
        with pytest.raises(C2CError, match="use_cache doesn't go with a prefilled cache"):
            pair.chat(CHATS[0], max_new_tokens=2, **asked)


@pytest.mark.parametrize("kind", ["prepend", "first", "always"])
def test_a_continuation_has_no_space_that_its_tokenizer_puts_before_texts(kind: str) -> None:
    """As SentencePiece's do: behind a prompt " A" is one token, as in the whole text."""
    lm = lm_of("gemma3")
    plain = {text: lm.continuation_ids(text) for text in (" A", "A", "The river", "\n\nA")}
    spaced = spaced_tokenizer(kind)
    other = LM(lm.model, spaced, "spaced")
    assert spaced("A", add_special_tokens=False)["input_ids"] != plain["A"]
    for text in (" A", "A", "The river"):
        behind = spaced(f"The\n{text}", add_special_tokens=False)["input_ids"]
        made = other.continuation_ids(text)
        assert made == plain[text] and behind[-len(made) :] == made


def test_an_answer_behind_a_text_begins_with_its_space() -> None:
    """SentencePiece's decoders drop the space that a text begins with: of a chat's answer, not of what goes on."""
    pair = pair_of("gemma3", "llama")
    (space,) = pair.receiver.continuation_ids(" A")
    spaced = LM(pair.receiver.model, spaced_tokenizer("first", pair.receiver.need_tokenizer().chat_template), "spaced")
    pair = C2C(spaced, pair.sharers, pair.fusers)
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "sequence_bias": [[[space], 1e4]]}

    def streamed(prompt: Any, **more: Any) -> str:
        return "".join(chunk.text for chunk in pair.stream(prompt, **more, **options))

    assert pair.chat(CHATS[0], **options) == streamed(CHATS[0]) == "A A"
    assert pair.chat([CHATS[0]], prefix="It is", **options) == [" A A"] == [streamed(CHATS[0], prefix="It is")]
    assert streamed("Plants need") == " A A"
    for prompt, begun, expected in ((CHATS[0], "", "A A"), (CHATS[0], "It is", " A A"), ("Plants need", "", " A A")):
        assert streamed(pair.prefill(prompt, prefix=begun)) == expected
        assert streamed(pair.prefill(prompt, prefix=begun, keep=True), fuse_response=True) == expected


def test_an_answer_ends_where_the_template_ends_it() -> None:
    """Base models may come with a template, and settings that know the end of a text alone."""
    pair = pair_of("qwen3", "llama")
    lm = pair.receiver
    tokenizer = lm.need_tokenizer()
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    lm.model.generation_config.eos_token_id = eos
    assert lm.end_tokens == {end, eos}
    prompt = len(pair.encode(CHATS[0]).receiver)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "sequence_bias": [[[end], 1e4]]}
    assert pair.generate(CHATS[0], **options)[0, prompt:].tolist() == [end]
    assert next(chunk.token for chunk in pair.stream(CHATS[0], **options)) == end
    settings = copy.deepcopy(lm.model.generation_config)
    settings.update(**options)
    assert pair.generate(CHATS[0], generation_config=settings).shape[1] == prompt + 4  # which names one
    settings.eos_token_id = None
    assert pair.generate(CHATS[0], generation_config=settings).shape[1] == prompt + 1
    for named in (eos, None):
        assert pair.generate(CHATS[0], eos_token_id=named, **options)[0, prompt:].tolist() == [end] * 4
    (made,) = write_on(lm, pair.prefill(CHATS[0]), [4], sequence_bias=options["sequence_bias"])
    assert made.ended and not made.ids


def test_unknown_names() -> None:
    with pytest.raises(C2CError, match="unknown fuser variant 'c3c'; expected one of c2c, c2c-c"):
        pair_of("llama", "qwen3", variant="c3c")
    with pytest.raises(C2CError, match="unknown fusion mode"):
        pair_of("llama", "qwen3", mode="both")
    with pytest.raises(C2CError, match="2 sharers"):
        C2C.from_models(lm_of("llama"), [lm_of("qwen3"), lm_of("qwen2")], [FuserConfig()])


class _After(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.ones(len(input_ids), dtype=torch.bool)


def test_criteria_as_transformers_takes_them() -> None:
    pair = pair_of("qwen3", "qwen2")
    length = pair.prefill(CHATS[1]).kv.length + 1
    for given, new in ((None, 6), (_After(), 1), ([_After()], 1)):
        made = pair.generate(CHATS[1], do_sample=False, max_new_tokens=6, min_new_tokens=6, stopping_criteria=given)
        assert made.shape[1] == length + new
        chunks = pair.stream(CHATS[1], do_sample=False, max_new_tokens=6, min_new_tokens=6, stopping_criteria=given)
        assert sum(chunk.token is not None for chunk in chunks) == new
    with pytest.raises(C2CError, match="use generate with a streamer"):
        next(pair.stream(CHATS[1], streamer=TextStreamer(pair.receiver.need_tokenizer())))


def test_wrong_options_are_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pair = pair_of("llama", "qwen3")
    pair.save_pretrained(tmp_path, dtype="bfloat16")
    monkeypatch.setattr("cache2cache.pair.load_lm", lambda *a, **k: pytest.fail("loaded"))
    for make in (C2C.from_pretrained, partial(C2C.from_models, pair.receiver, pair.sharers)):
        for name, words in (
            ("sharer", "did you mean sharers"), ("torch_dtype", "did you mean dtype"), ("device_map", "ModelSpec"),
            ("token", "beside its arguments it takes"),
        ):  # fmt: skip
            with pytest.raises(C2CError, match=f"has no option '{name}'; .*{words}"):
                make(**{name: "auto"})
    with pytest.raises(C2CError, match="a fuser's configuration is a FuserConfig, not str"):
        C2C.from_models(pair.receiver, pair.sharers, {"hidden_dim": 16})  # type: ignore[arg-type]
    with pytest.raises(C2CError, match="unknown dtype 'bf16'; expected bfloat16"):
        pair.save_pretrained(tmp_path, dtype="bf16")
    with pytest.raises(C2CError, match="chat takes messages; a fused cache is answered by generate or stream"):
        pair.chat(pair.prefill(CHATS[1]))  # type: ignore[arg-type]


def test_a_model_of_another_kind_is_named(tmp_path: Path) -> None:
    pair = pair_of("llama", "qwen3")
    pair.save_pretrained(tmp_path)
    with pytest.raises(C2CError, match="a Linear is no model that can be loaded; expected a name"):
        C2C.from_pretrained(tmp_path, receiver=torch.nn.Linear(2, 2), sharers=pair.sharers)  # type: ignore[arg-type]


def test_what_a_fuser_was_trained_on_goes_with_it(tmp_path: Path) -> None:
    pair = pair_of("llama", "qwen3")
    pair.save_pretrained(tmp_path / "first")
    (tmp_path / "first" / "training_ids.txt").write_text("own:1\nown:2\n")
    again = C2C.from_pretrained(tmp_path / "first", receiver=pair.receiver, sharers=pair.sharers)
    again.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "training_ids.txt").read_text() == "own:1\nown:2\n"
    pair_of("llama", "qwen3").save_pretrained(tmp_path / "second")  # an untrained one in its place
    assert not (tmp_path / "second" / "training_ids.txt").exists()


def test_fewer_fusers_are_not_put_among_more(tmp_path: Path) -> None:
    pair_of("llama", "qwen3", "qwen2", "qwen3").save_pretrained(tmp_path)
    with pytest.raises(C2CError, match="holds 3 fusers, 2 of which would be new ones; choose another folder"):
        pair_of("llama", "qwen3", "qwen2").save_pretrained(tmp_path)


def test_fusers_that_replace_are_not_summed() -> None:
    with pytest.raises(C2CError, match="several fusers' changes are summed, and one with residual: false replaces"):
        pair_of("llama", "qwen3", "qwen2", residual=False, gating=False)
    pair = pair_of("llama", "qwen3", "qwen2", residual=False, gating=False, mode="sequential")
    pair.prefill(CHATS[0])
    with pytest.raises(C2CError, match="residual: false replaces"):
        pair.prefill(CHATS[0], mode="parallel")


def test_one_fuser_is_not_two_pairs_whose_models_turn_keys_otherwise() -> None:
    pair = pair_of("llama", "qwen3", key_space="unrotated")
    C2C(pair.receiver, pair.sharers, list(pair.fusers))  # type: ignore[arg-type]
    other = lm_of("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    with pytest.raises(C2CError, match="another pair's, whose models turn keys in another way"):
        C2C(other, pair.sharers, list(pair.fusers))  # type: ignore[arg-type]


def test_a_pair_computes_as_it_answers() -> None:
    """Not with the noise and dropout of a fuser that is being trained."""
    pair = pair_of("llama", "qwen3", dropout=0.5)
    fuser = pair.fusers[0].train()
    again = C2C(pair.receiver, pair.sharers, [fuser])  # type: ignore[list-item]
    assert torch.equal(again.prefill(CHATS[0]).kv.keys, again.prefill(CHATS[0]).kv.keys)


def test_changed_weights_are_used() -> None:
    pair = pair_of("llama", "qwen3", normalize=True)
    fuser = pair.fusers[0]
    before = pair.prefill(CHATS[0]).kv.keys
    fuser.proj_out.bias.data.add_(1.0)  # which torch doesn't count as a change
    fuser.eval()
    changed = pair.prefill(CHATS[0]).kv.keys
    assert not torch.equal(before, changed)
    with torch.inference_mode():
        made = copy.deepcopy(fuser)
        pair.fusers[0] = made
        made.proj_out.bias.add_(1.0)
        once = pair.prefill(CHATS[0]).kv.keys.clone()
        made.proj_out.bias.add_(1.0)
        assert not torch.equal(once, pair.prefill(CHATS[0]).kv.keys)


def test_choices_that_cannot_be() -> None:
    pair = pair_of("qwen3", "qwen2")
    for mask in ([0.9], "1", [None]):
        with pytest.raises(C2CError, match=r"sharer mask .* doesn't fit"):
            pair.prefill(CHATS[0], sharer_mask=mask)
    assert pair.prefill(CHATS[0], sharer_mask=np.int64(0)).fused_positions == [0]
    length = len(pair.encode(CHATS[0]).receiver)
    for positions in ("front:inf", None, [3] * length, 4):
        with pytest.raises(C2CError, match="positions"):
            pair.prefill(CHATS[0], positions=positions)
    for wrong in ([[100_000]], [[-1]]):
        with pytest.raises(C2CError, match=r"continuations hold the token id .*has \d+, from 0 on"):
            pair.score(CHATS[0], wrong)


def test_two_sets_of_rotary_factors_end_the_context_where_the_second_begins() -> None:
    """Phi-3 and its like: beyond, transformers reads everything again, without what was fused."""
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, original_max_position_embeddings=64, pad_token_id=0,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
                         "long_factor": [4.0] * 4, "original_max_position_embeddings": 64},
    )  # fmt: skip
    lm = load_lm(Phi3ForCausalLM(config).eval(), tiny_tokenizer("bytes"))
    assert lm.context_length == 64
    pair = C2C.from_models(lm, lm_of("qwen3"), FuserConfig(hidden_dim=8, intermediate_dim=8))
    pair.generate("a" * 40, **OPTIONS)
    with pytest.raises(C2CError, match=r"context of .*, 64 tokens"):
        pair.generate("a" * 58, max_new_tokens=16)
