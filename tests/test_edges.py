"""At the edges of a pair: models of other kinds, rows without a pad token, several answers, short sharers."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GPT2Config, GPT2LMHeadModel

from cache2cache import C2C, C2CError, FuserConfig, load_lm
from cache2cache.fuser.c2c import StackedFFN
from test_pair import CHATS, OPTIONS, lm_of, pair_of
from tiny import tiny_tokenizer

SMALL = FuserConfig(hidden_dim=8, intermediate_dim=8)


def test_answers_that_have_ended_are_filled_with_what_is_skipped() -> None:
    """As Llama 3, which names no pad token and has text at id 0."""
    pair = pair_of("llama", "qwen3")
    receiver, tokenizer = pair.receiver, pair.receiver.need_tokenizer()
    prompt = pair.encode(CHATS[0]).receiver
    third = int(pair.generate(CHATS[0], **OPTIONS)[0, len(prompt) + 2])
    for source in (receiver.model.generation_config, receiver.model.config):
        source.pad_token_id = None
        source.eos_token_id = [tokenizer.eos_token_id, third]
    tokenizer.pad_token = None
    assert receiver.pad_token_id == tokenizer.eos_token_id
    options = {"max_new_tokens": 7, "do_sample": False}
    tokens = pair.generate(CHATS[:2], **options)[0].tolist()
    answer = tokens[len(tokens) - 7 :]
    assert answer[2] == third and answer[3:] == [tokenizer.eos_token_id] * 4
    assert pair.chat(CHATS[:2], **options)[0] == pair.chat(CHATS[0], **options)


def test_float16_holds_the_squares_of_long_vectors() -> None:
    torch.manual_seed(0)
    block = StackedFFN(1, 64, 64, 0.0).eval()
    for parameter in block.parameters():
        if parameter.dim() > 1 and parameter.shape[1] > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(1, 5, 64)
    x = 400 * x / x.norm(dim=-1, keepdim=True)
    expected = block(x) - x
    half = block.half()
    assert expected.norm() > 0.1
    torch.testing.assert_close((half(x.half()).float() - x.half().float()), expected, atol=0.3, rtol=0.1)
    assert half.inner(x.half()).abs().max() > 0


def test_several_answers_to_a_chat() -> None:
    pair = pair_of("llama", "qwen3")
    options = {"num_return_sequences": 2, "do_sample": True, "temperature": 3.0, "max_new_tokens": 5}
    torch.manual_seed(0)
    single = pair.chat(CHATS[0], **options)
    assert isinstance(single, list) and len(single) == 2 and single[0] != single[1]
    both = pair.chat(CHATS[:2], **options)
    assert [len(answers) for answers in both] == [2, 2]
    plain = pair.chat(CHATS[0], **OPTIONS)
    assert pair.chat(CHATS[0], return_dict_in_generate=True, output_logits=True, **OPTIONS) == plain
    with pytest.raises(C2CError, match="stream gives one answer"):
        next(pair.stream(CHATS[0], **options))


def test_what_is_scored() -> None:
    pair = pair_of("qwen3", "qwen2")
    ids = torch.tensor([[4, 5, 6, 7], [8, 9, 4, 5]])
    scores = pair.score(ids, [[[4]], [[5], [6]]])
    assert [len(row) for row in scores] == [1, 2]  # type: ignore[arg-type]
    assert pair.score(ids[1], [[5], [6]]) == [pytest.approx(score) for score in scores[1]] or len(scores[1]) == 2  # type: ignore[arg-type]
    for nothing in ([], [[]]):
        with pytest.raises(C2CError, match="at least one token per continuation"):
            pair.score(CHATS[0] if not nothing else [CHATS[0]], nothing)


def test_a_sharer_that_is_not_selected_refuses_no_prompt() -> None:
    pair = pair_of("llama", "qwen3")
    pair.sharers[0].model.config.max_position_embeddings = 16
    with pytest.raises(C2CError, match="don't fit the context of"):
        pair.prefill(CHATS[1])
    fused = pair.prefill(CHATS[1], sharer_mask=0)
    assert fused.bytes_passed == 0


def test_a_weight_that_is_replaced_counts_at_once() -> None:
    pair = pair_of("llama", "qwen3")
    keys = []
    for scale in (1.0, 2.0, 4.0):
        fuser = pair.fusers[0]
        fuser.proj_out.weight = torch.nn.Parameter(scale * torch.ones_like(fuser.proj_out.weight), requires_grad=False)  # type: ignore[union-attr]
        keys.append(pair.prefill(CHATS[0]).kv.keys)
    assert not torch.equal(keys[0], keys[1]) and not torch.equal(keys[1], keys[2])
    with torch.inference_mode():
        made = pair_of("llama", "qwen3")
        assert made.prefill(CHATS[0]).kv.keys.isfinite().all()


def test_models_that_cannot_be_fused_are_refused_in_words() -> None:
    tokenizer = tiny_tokenizer("bytes")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=300)).eval()
    with pytest.raises(C2CError, match=r"\(gpt2\) has its layers elsewhere than in `layers`"):
        C2C.from_models(load_lm(gpt2, tokenizer=tokenizer), lm_of("llama"), SMALL)
    latent = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            hidden_size=16, intermediate_size=8, moe_intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, q_lora_rank=4, kv_lora_rank=4, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
            n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, vocab_size=300, first_k_dense_replace=1,
        )
    ).eval()  # fmt: skip
    with pytest.raises(C2CError, match="keeps compressed keys and values"):
        C2C.from_models(lm_of("llama"), load_lm(latent, tokenizer=tokenizer), SMALL)
