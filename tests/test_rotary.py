"""The rotary embedding taken off and put back: exactly, where the models put it on, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cache2cache import C2CError
from cache2cache.kv import CACHE, KV, pad_left, prefill
from cache2cache.pair import PromptIds, where_to_fuse
from cache2cache.rotary import Rotary
from cache2cache.training.objective import response_loss
from tiny import FAMILIES
from training.runs import CHATS, items_of, lm_of, pair_of

SHARER_OF = dict(zip(FAMILIES, [*FAMILIES[1:], FAMILIES[0]], strict=True))
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 5e4,
}  # fmt: skip
MODELS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"rope_parameters": LLAMA3}),
    ("qwen2", {"rope_parameters": YARN}),
    ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
]


@pytest.mark.parametrize(("family", "settings"), MODELS, ids=str)
def test_keys_without_rotary_do_not_know_their_position(family: str, settings: dict[str, Any]) -> None:
    """Attention sees differences of positions only, so shifting a whole prompt changes nothing else of a key."""
    lm = lm_of(family, **settings)
    rotary = Rotary.of(lm)
    ids = torch.randint(6, lm.vocab_size, (1, 7), generator=torch.Generator().manual_seed(1))
    layers = torch.arange(lm.num_layers)
    freed = []
    for shift in (0, 3, 50):
        cache = KV.from_cache(lm.model(ids, position_ids=torch.arange(7)[None] + shift)[CACHE])
        keys = cache.keys[:, 0].transpose(1, 2)  # (L, N, H, D)
        free = rotary.turn(keys, layers, torch.arange(7) + shift, back=True)
        torch.testing.assert_close(rotary.turn(free, layers, torch.arange(7) + shift), keys, atol=1e-5, rtol=1e-5)
        assert (free - keys).abs().max() > 0.1
        freed.append(free)
    for free in freed[1:]:
        torch.testing.assert_close(free, freed[0], atol=2e-4, rtol=1e-3)


def test_gemma_has_two_bases() -> None:
    rotary = Rotary.of(lm_of("gemma3"))
    assert torch.equal(rotary.inv_freq[0], rotary.inv_freq[1])
    assert not torch.allclose(rotary.inv_freq[0], rotary.inv_freq[2])


def test_what_is_not_understood_is_refused() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(C2CError, match="is dynamic: its frequencies depend on the prompt's length"):
        Rotary.of(lm_of("llama", rope_parameters=dynamic))
    lm = lm_of("llama")
    lm.decoder.rotary_emb.forward = lambda x, position_ids: (  # something else than its frequencies say
        torch.ones(*position_ids.shape, 8) * position_ids.add(1)[..., None],
        torch.zeros(*position_ids.shape, 8),
    )
    with pytest.raises(C2CError, match=r"layer 0, don't follow its rotary embedding .* use key_space rotated"):
        Rotary.of(lm)
    from transformers import OPTConfig, OPTForCausalLM

    from cache2cache import load_lm

    shape = {"hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    tiny = OPTForCausalLM(OPTConfig(vocab_size=200, **shape))
    with pytest.raises(C2CError, match="has no rotary embedding"):
        Rotary.of(load_lm(tiny))


@pytest.mark.parametrize("receiver", FAMILIES)
def test_pair_with_unrotated_keys(receiver: str) -> None:
    """A batch of unequal prompts is each prompt alone, training is inference, and closed gates are the receiver."""
    sharer = SHARER_OF[receiver]
    settings: dict[str, Any] = {"key_space": "unrotated", "gating": False, "dropout": 0.0}
    pair = pair_of(receiver, sharer, **settings)
    chats = [[{"role": "user", "content": chat}] for chat in CHATS]
    batch = pair.prefill(chats)
    other = pair_of(receiver, sharer, **settings | {"key_space": "rotated"}).prefill(chats)
    torch.testing.assert_close(other.kv.values, batch.kv.values)
    assert (other.kv.keys - batch.kv.keys).abs().max() > 0.05
    for row, chat in enumerate(chats):
        alone = pair.prefill(chat).kv
        ours = batch.kv.rows(slice(row, row + 1))
        torch.testing.assert_close(ours.keys[:, :, :, -alone.length :], alone.keys, atol=2e-4, rtol=1e-3)
    items = items_of(pair)
    pair.fusers.train()
    loss, _ = response_loss(pair, items, None)
    pair.fusers.eval()
    scores = [pair.score(i.prompt, [i.response])[0].logprob for i in items]
    assert loss.item() == pytest.approx(-sum(scores) / sum(len(i.response) for i in items), rel=1e-4)
    closed = pair_of(receiver, sharer, key_space="unrotated", gate_init=0.0).prefill(chats)
    ids, mask = pad_left([p.receiver for p in map(pair.encode, chats)], pair.receiver.pad_token_id, "cpu")
    assert torch.equal(closed.kv.keys, prefill(pair.receiver, ids[:, :-1], mask[:, :-1]).keys)


@pytest.mark.parametrize("variant", ["c2c", "bottleneck"])
def test_a_shift_of_all_positions_turns_the_fused_keys_alone(variant: str) -> None:
    """The change is computed from what keys say, not where they are: later positions get the same change, turned."""
    pair = pair_of(variant=variant, key_space="unrotated", gating=False, dropout=0.0)
    fuser, (mine, theirs) = pair.fusers[0], (pair.receiver, pair.sharers[0])
    ids = torch.tensor([[7, 8, 9, 10]])
    changes = []
    for a, b in ((0, 0), (5, 5), (40, 3)):
        ours, others = (
            KV.from_cache(lm.model(ids, position_ids=torch.arange(4)[None] + shift)[CACHE])
            for lm, shift in ((mine, a), (theirs, b))
        )
        slots = torch.arange(4)
        zeros = torch.zeros_like(slots)
        where = torch.stack([zeros, slots, zeros, slots, slots + a, slots + b])
        change = fuser(ours, others, where).keys - ours.keys
        assert change.abs().max() > 0.05
        layers = torch.arange(mine.num_layers)
        changes.append(Rotary.of(mine).turn(change[:, 0].transpose(1, 2), layers, slots + a, back=True))
    for change in changes[1:]:
        torch.testing.assert_close(change, changes[0], atol=5e-4, rtol=1e-3)


def test_a_fuser_without_its_models_says_so() -> None:
    pair = pair_of("llama", "llama", key_space="unrotated", gating=False)
    fuser = pair.fusers[0]
    kv = KV.from_cache(pair.receiver.model(torch.tensor([[7, 8]]))[CACHE])
    with pytest.raises(C2CError, match="`where` has 4 rows; unrotated keys need 6"):
        fuser(kv, kv, torch.zeros(4, 1, dtype=torch.long))
    fuser.rotary = None
    with pytest.raises(C2CError, match="doesn't know the models' rotary embeddings; use it in a C2C pair"):
        pair.prefill(CHATS[0])


def test_each_token_is_turned_at_its_own_position() -> None:
    """The receiver's by the receiver's position ids, the sharer's by the sharer's, padding or not."""
    prompt = PromptIds([9] * 5, [[20, 21, 22]], [[-1, 0, -1, 2, 2]])
    where, read = where_to_fuse([prompt], 0, 6, 4, [3])  # two positions and one of padding in front
    assert where.tolist() == [[0, 0], [3, 5], [0, 0], [1, 3], [1, 3], [0, 2]] and read == 2
    moved = PromptIds(
        [9] * 5, [[20, 21, 22]], [[-1, 0, -1, 2, 2]], positions=[0, 4, 5, 6, 7], sharer_positions=[[1, 2, 9]]
    )
    where, _ = where_to_fuse([moved], 0, 4, 3, [3])
    assert where[4:].tolist() == [[4, 6], [1, 9]]
