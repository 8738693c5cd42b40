"""Next-token losses of responses, without the logits of a whole batch where the LM head is a plain product.

The head is frozen, so the gradient of a token's loss with regard to its hidden state is known as soon as its logits
are: they are made some tokens at a time and let go again. For SmolLM2's 49,152 words logits, their logarithms and their
gradients would be 590 KB a token in float32, for Gemma's 262,144 3 MB.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kv import CACHE, Prefilled, positions_of
from ..models.load import LM
from .sharding import is_sharded

LOGITS = 2**24  # numbers made at once


def response_losses(lm: LM, prompt: Prefilled, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token of `target`, read behind its prompt: the negative log-likelihood (B, R), float32 and zero where
    there is none, and whether it was the likeliest one (B, R), bool."""
    if is_sharded(lm) or not lm.has_plain_head:
        return token_losses(expected(lm, prompt, target), target)
    hidden = lm.decoder(**response_inputs(prompt, target)).last_hidden_state
    head, real = lm.model.get_output_embeddings(), target >= 0
    assert isinstance(head, nn.Linear)
    found = _BehindFrozenHead.apply(hidden[real], head.weight, head.bias, target[real])
    nll, likeliest = (x.new_zeros(target.shape).index_put((real,), x) for x in found)
    return nll, likeliest


def token_losses(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """As `response_losses`, from logits (B, R, V)."""
    logits = logits.float()
    nll = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="none")
    return nll.view_as(target), logits.argmax(-1) == target


def loss_of(nll: Tensor, likeliest: Tensor, target: Tensor, per: str) -> tuple[Tensor, Tensor]:
    """The loss () of the tokens' losses (B, R), averaged as `TrainConfig.loss` says, and which rows' tokens were all
    the likeliest ones, (B,) bool."""
    real = target >= 0
    greedy = (likeliest | ~real).all(1)
    if per == "token":
        return nll.sum() / real.sum(), greedy
    if per == "sum":
        return nll.sum(1).mean(), greedy
    return (nll.sum(1) / real.sum(1)).mean(), greedy


def expected(lm: LM, prompt: Prefilled, target: Tensor) -> Tensor:
    """What a model expects at each token of `target` (B, R), having read the prompt and the tokens before: its logits
    (B, R, V)."""
    logits: Tensor = lm.model(**response_inputs(prompt, target)).logits
    return logits


def response_inputs(prompt: Prefilled, target: Tensor) -> dict[str, Any]:
    """What a model is called with to read the last prompt token and then the response but its last token; positions
    behind a response's end see nothing."""
    mask = torch.cat([prompt.attention_mask, (target[:, :-1] >= 0).long()], dim=1)
    return {
        "input_ids": torch.cat([prompt.input_ids[:, -1:], target[:, :-1].clamp(min=0)], dim=1),
        "attention_mask": mask,
        "position_ids": positions_of(mask)[:, -target.shape[1] :],
        "use_cache": True,
        CACHE: prompt.kv.to_cache(),
    }


class _BehindFrozenHead(torch.autograd.Function):
    """Hidden states (N, D), the head's weight (V, D) and bias (V) or None, and targets (N) to losses (N) and whether
    each target is the likeliest token (N)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
        losses, likeliest, gradients = [], [], []
        size = max(1, LOGITS // len(weight))
        for h, t in zip(hidden.split(size), target[:, None].split(size), strict=True):
            logits = F.linear(h, weight, bias).float()
            best = logits.argmax(-1, keepdim=True)
            highest, wanted = logits.gather(1, best), logits.gather(1, t)
            exps = logits.sub_(highest).exp_()  # the one pass of exponentials that loss and gradient have in common
            total = exps.sum(-1, keepdim=True)
            losses.append(highest + total.log() - wanted)
            likeliest.append(best == t)
            if ctx.needs_input_grad[0]:
                gradient = exps.div_(total)  # softmax, less one at the target
                gradient.scatter_add_(1, t, torch.full_like(total, -1.0))
                gradients.append(gradient.to(weight.dtype) @ weight)
        found = torch.cat(likeliest).squeeze(1)
        ctx.mark_non_differentiable(found)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses).squeeze(1), found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (by_hidden,) = ctx.saved_tensors
        return (by_hidden * gradients[0][:, None]).to(by_hidden.dtype), None, None, None
