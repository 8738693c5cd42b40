"""Losses behind a frozen head, some tokens at a time, are those of all logits, and so are their gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cache2cache.kv import KV, Prefilled, prefill_prompts
from cache2cache.models.load import LM
from cache2cache.training import loss
from cache2cache.training.loss import expected, loss_of, response_losses, token_losses
from tiny import FAMILIES, tiny_model

TARGET = torch.tensor([[3, 4, 5, 6, 7], [8, 9, -100, -100, -100], [10, 11, 12, -100, -100]])


def start_of(lm: LM) -> tuple[Prefilled, list[Tensor]]:
    """Prompts of unlike lengths, and the tensors that gradients are asked for: their keys and values."""
    start = prefill_prompts(lm, [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]])
    leaves = [x.clone().requires_grad_() for x in (start.kv.keys, start.kv.values)]
    return replace(start, kv=KV(*leaves)), leaves


def gradients(lm: LM, whole: bool, per: str = "example") -> tuple[Tensor, Tensor, list[Tensor]]:
    start, leaves = start_of(lm)
    nll, likeliest = token_losses(expected(lm, start, TARGET), TARGET) if whole else response_losses(lm, start, TARGET)
    total, greedy = loss_of(nll, likeliest, TARGET, per)
    return total.detach(), greedy, list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("per", ["token", "example", "sum"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_all_logits(family: str, per: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM(tiny_model(family), None, family)
    assert lm.has_plain_head
    monkeypatch.setattr(loss, "LOGITS", 3 * lm.vocab_size)  # three tokens at a time, the last ones fewer
    with monkeypatch.context() as patch:
        patch.setattr(loss, "expected", lambda *_: pytest.fail("all logits were made"))
        total, greedy, found = gradients(lm, False, per)
    all_total, all_greedy, all_found = gradients(lm, True, per)
    torch.testing.assert_close(total, all_total)
    assert greedy.equal(all_greedy)
    for ours, theirs in zip(found, all_found, strict=True):
        assert theirs.abs().max() > 1e-4
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_greedy_rows() -> None:
    """Targets that are the likeliest tokens, in one row but for its last."""
    lm = LM(tiny_model("llama"), None, "llama")
    start, _ = start_of(lm)
    target = TARGET.clone()
    for place in range(5):
        with torch.no_grad():
            likeliest = expected(lm, start, target).argmax(-1)[:, place]
        target[:, place] = torch.where(TARGET[:, place] >= 0, likeliest, -100)
    target[0, 4] = (target[0, 4] + 1) % lm.vocab_size
    nll, right = response_losses(lm, start, target)
    assert loss_of(nll, right, target, "sum")[1].tolist() == [False, True, True]
    assert nll[TARGET < 0].eq(0).all()


def test_bfloat16() -> None:
    lm = LM(tiny_model("qwen3").to(torch.bfloat16), None, "qwen3")
    assert lm.has_plain_head
    (total, _, found), (all_total, _, all_found) = gradients(lm, False), gradients(lm, True)
    torch.testing.assert_close(total, all_total, atol=0, rtol=1e-2)
    for ours, theirs in zip(found, all_found, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).float().norm() < 0.03 * theirs.float().norm()


def test_nothing_of_the_size_of_all_logits_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM(tiny_model("gemma3"), None, "gemma3")
    assert lm.has_plain_head
    monkeypatch.setattr(loss, "LOGITS", lm.vocab_size)

    def largest(whole: bool) -> int:
        sizes: list[int] = []
        weights = {p.data_ptr() for p in lm.model.parameters()}

        def keep(x: Tensor) -> Tensor:
            if x.data_ptr() not in weights:
                sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            gradients(lm, whole)
        return max(sizes)

    assert largest(True) >= TARGET.numel() * lm.vocab_size > 5 * largest(False)


@pytest.mark.parametrize("change", ["cap", "hook", "head"])
def test_other_heads_give_all_logits(change: str) -> None:
    """A soft cap, an offloaded head and a head of another kind: what the whole model says counts."""
    settings: dict[str, Any] = {"final_logit_softcapping": 3.0} if change == "cap" else {}
    lm = LM(tiny_model("gemma3", **settings), None, "gemma3")
    head = lm.model.get_output_embeddings()
    if change == "hook":
        head._hf_hook = object()
    if change == "head":
        lm.model.set_output_embeddings(torch.nn.Sequential(head))
    assert not lm.has_plain_head
    (total, greedy, found), (all_total, all_greedy, all_found) = gradients(lm, False), gradients(lm, True)
    assert total.equal(all_total) and greedy.equal(all_greedy)
    assert all(ours.equal(theirs) for ours, theirs in zip(found, all_found, strict=True))


def test_a_head_with_a_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*size, generator=generator) for size in ((7, 6), (11, 6), (11,)))
    hidden.requires_grad_()
    target = torch.tensor([0, 10, 3, 3, 5, 1, 2])
    nll, _ = loss._BehindFrozenHead.apply(hidden, weight, bias, target)
    scale = torch.rand(7, generator=generator)
    (found,) = torch.autograd.grad((nll * scale).sum(), hidden)
    plain = torch.nn.functional.cross_entropy(hidden @ weight.T + bias, target, reduction="none")
    torch.testing.assert_close(nll, plain)
    torch.testing.assert_close(found, torch.autograd.grad((plain * scale).sum(), hidden)[0])
