"""Models and a fuser of known behaviour, so that what every method and control must answer follows by hand.

A model is a Llama of one layer whose attention is uniform and whose values are nothing but marks: a character of
`marks` anywhere in the prompt makes it believe in the option A, B, C or D. It answers with what it believes in most,
or, without a mark, finds all letters alike, which makes A the choice. In words it says one `says` and stops.

The fuser adds the sharer's values to the receiver's, `scale` times: a sharer's belief outweighs the receiver's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cache2cache import C2C, FuserConfig, load_lm
from cache2cache.models import LM
from cache2cache.tasks import Question
from tiny import tiny_tokenizer

LETTERS, RECEIVER, SHARER, SECOND = "ABCD", "#$%&", "{}[]", "~^@`"
WIDTH, SPOKEN = 16, 8


def scripted_lm(marks: str, says: str = LETTERS, name: str = "scripted") -> LM:
    """A model that believes what `marks` mark, and says `says` for A, B, C and D."""
    tokenizer = tiny_tokenizer("bytes")
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        vocab_size=264, max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name_, weight in model.named_parameters():
        weight.fill_(1.0 if "norm" in name_ else 0.0)
    layer = model.model.layers[0]
    layer.self_attn.v_proj.weight[:4, :4] = torch.eye(4)
    layer.self_attn.o_proj.weight.copy_(torch.eye(WIDTH))
    for option, (mark, letter, word) in enumerate(zip(marks, LETTERS, says, strict=True)):
        model.model.embed_tokens.weight[_id(mark), option] = 1
        # Whatever it says, it says it once: behind it comes the end.
        for spoken in {letter, word}:
            model.model.embed_tokens.weight[_id(spoken), SPOKEN] = 1
            model.lm_head.weight[_id(spoken), option] = 5 if spoken == letter == word else 4 + 2 * (spoken == word)
    model.lm_head.weight[tokenizer.eos_token_id, SPOKEN] = 5
    return load_lm(model, tokenizer=tokenizer)


def _id(character: str) -> int:
    (found,) = tiny_tokenizer("bytes")(character, add_special_tokens=False)["input_ids"]
    return int(found)


def scripted_pair(*sharers: LM, scales: Sequence[float] = (5.0,), receiver: LM | None = None) -> C2C:
    """A receiver that reads RECEIVER, and fusers that add the sharers' values."""
    config = FuserConfig(hidden_dim=WIDTH, intermediate_dim=2, num_layers=2, weighting=False, gate_init=1.0)
    pair = C2C.from_models(receiver or scripted_lm(RECEIVER), list(sharers) or [scripted_lm(SHARER)], config)
    for fuser, scale in zip(pair.fusers, scales, strict=True):
        for parameter in fuser.parameters():
            parameter.requires_grad_(False)
            if parameter.dim() > 1:
                parameter.zero_()
        fuser.in_sharer.weight.copy_(torch.eye(WIDTH).expand(2, -1, -1))  # type: ignore[union-attr, operator]
        fuser.proj_out.weight[1].copy_(scale * torch.eye(WIDTH))  # type: ignore[union-attr, index]
        for part in (fuser.in_sharer, fuser.proj_out):
            part.bias.zero_()  # type: ignore[union-attr, operator]
    return pair


def marked(beliefs: Sequence[tuple[str, ...]], answers: str) -> list[Question]:
    """Questions of one length: per question what each model believes ("A" to "D", or "" for nothing)."""
    made = []
    for number, (believed, answer) in enumerate(zip(beliefs, answers, strict=True)):
        signs = [
            marks[LETTERS.index(letter)] if letter else " "
            for marks, letter in zip((RECEIVER, SHARER, SECOND), believed, strict=False)
        ]
        text = f"q{number} {''.join(signs)}"
        made.append(Question(f"q{number}", text, ("w", "x", "y", "z"), LETTERS.index(answer)))
    return made
