"""On a GPU: the same numbers as on the CPU, whatever is where. Skipped, with the reason, where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cache2cache import C2C, FuserConfig, load_lm
from cache2cache.config import LoraSpec
from cache2cache.decode import generate
from cache2cache.fuser import C2CFuser
from cache2cache.kv import Prefilled, prefill_prompts
from cache2cache.models import LM
from cache2cache.training.items import Item, prepare
from cache2cache.training.loop import Trainer
from cache2cache.training.objective import FuserObjective, response_loss
from cache2cache.training.single import Alone, SingleObjective
from cache2cache.transfer import from_bytes, to_bytes
from tiny import FAMILIES, TOKENIZER_OF, tiny_model, tiny_tokenizer
from training.runs import config_of, write_rows

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two CUDA devices")

OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
CHATS = [
    [{"role": "user", "content": "What is the capital of France? The capital of France is"}],
    [{"role": "user", "content": "Plants"}],
]


def lm_of(family: str, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> LM:
    model = tiny_model(family, seed).to(device, dtype)
    return load_lm(model, tokenizer=tiny_tokenizer(TOKENIZER_OF[family]))


def pair_of(
    receiver: str, sharer: str, devices: tuple[str, str], dtype: torch.dtype = torch.float32, **settings: Any
) -> C2C:
    torch.manual_seed(0)
    config = FuserConfig(**{"hidden_dim": 16, "intermediate_dim": 12, "gate_init": 1.0, **settings})
    mine, other = lm_of(receiver, devices[0], dtype), lm_of(sharer, devices[1], dtype, seed=7)
    return C2C.from_models(mine, other, config)


def assert_near(found: Prefilled, expected: Prefilled, tolerance: float) -> None:
    """Equal up to `tolerance` times the size of the expected numbers, at all tokens.

    Padding before them sees nothing, and what attention makes of that is up to its kernel.
    """
    real = expected.attention_mask[:, : expected.kv.length].bool().cpu()
    for a, b in ((found.kv.keys, expected.kv.keys), (found.kv.values, expected.kv.values)):
        a, b = (x.cpu().float().permute(1, 3, 0, 2, 4)[real] for x in (a, b))
        assert a.isfinite().all() and (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize(
    "devices", [(GPU, GPU), (GPU, "cpu"), ("cpu", GPU), pytest.param((f"{GPU}:0", f"{GPU}:1"), marks=two_gpus)], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_that_of_the_cpu(family: str, devices: tuple[str, str]) -> None:
    here, there = pair_of(family, "qwen3", ("cpu", "cpu")), pair_of(family, "qwen3", devices)
    fused, expected = there.prefill(CHATS), here.prefill(CHATS)
    assert fused.kv.keys.device.type == torch.device(devices[0]).type
    assert_near(fused, expected, 1e-4)
    scores, wanted = (pair.score(cache, [["ab", "c"]] * 2) for pair, cache in ((there, fused), (here, expected)))
    for group, others in zip(scores, wanted, strict=True):
        assert [s.logprob for s in group] == pytest.approx([s.logprob for s in others], abs=1e-2)  # type: ignore[union-attr]


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family: str) -> None:
    pair = pair_of(family, "qwen3", (GPU, GPU), torch.bfloat16)
    fused = pair.prefill(CHATS)
    assert fused.kv.keys.dtype == torch.bfloat16
    assert_near(fused, pair_of(family, "qwen3", (GPU, GPU)).prefill(CHATS), 0.1)
    answer = pair.generate(fused, **OPTIONS)
    assert answer.shape == (2, fused.input_ids.shape[1] + 8) and answer.device.type == torch.device(GPU).type
    chunks = pair.stream(CHATS[0], **OPTIONS)
    tokens = [chunk.token for chunk in chunks if chunk.token is not None]  # the last may be text alone
    assert tokens == pair.generate(CHATS[0], **OPTIONS)[0, -8:].tolist()

    closed = pair_of(family, "qwen3", (GPU, GPU), torch.bfloat16, gate_init=0.0)
    plain = prefill_prompts(closed.receiver, [closed.encode(chat).receiver for chat in CHATS])
    assert torch.equal(closed.prefill(CHATS).kv.keys, plain.kv.keys)
    assert torch.equal(closed.generate(CHATS, **OPTIONS), generate(closed.receiver, plain, **OPTIONS))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_whose_steps_transformers_compiles(family: str) -> None:
    pair = pair_of(family, "qwen3", (GPU, GPU))
    fused = pair.prefill(CHATS)
    expected = pair.generate(fused, **OPTIONS)
    torch.compiler.reset()
    for settings in ({"disable_compile": True}, {}, {}):  # compiled, and run again on another cache
        assert torch.equal(pair.generate(fused, cache_implementation="static", **settings, **OPTIONS), expected)


@pytest.mark.parametrize("device", [GPU, "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_cache_travels(dtype: torch.dtype, device: str) -> None:
    pair = pair_of("llama", "qwen3", (GPU, GPU), dtype)
    fused = pair.prefill(CHATS[0])
    back = from_bytes(to_bytes(fused, pair.receiver), lm_of("llama", device, dtype))
    assert back.kv.keys.device.type == torch.device(device).type
    assert torch.equal(back.kv.keys.cpu(), fused.kv.keys.cpu())
    assert torch.equal(back.kv.values.cpu(), fused.kv.values.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step(dtype: torch.dtype) -> None:
    """Models in either type, without autocast: loss and gradients are those of float32 on the CPU."""

    def step(device: str, dtype: torch.dtype) -> tuple[float, C2CFuser]:
        pair = pair_of("llama", "qwen3", (device, device), dtype, gate_init=0.5, dropout=0.0, gate_noise="none")
        fuser = pair.fusers[0]
        assert isinstance(fuser, C2CFuser)
        fuser.train().requires_grad_(True)
        items = [Item(str(i), pair.encode(chat), [40 + i, 50, 60][i:]) for i, chat in enumerate(CHATS)]
        loss, _ = response_loss(pair, items, None)
        loss.backward()
        return loss.item(), fuser

    loss, fuser = step(GPU, dtype)
    wanted, plain = step("cpu", torch.float32)
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    assert loss == pytest.approx(wanted, rel=tolerance)
    for parameter, expected in zip(fuser.parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None and expected.grad is not None
        error = (parameter.grad.cpu() - expected.grad).norm()
        assert error <= 5 * tolerance * expected.grad.norm()  # False for what is no number


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapters_gradients(family: str, dtype: torch.dtype) -> None:
    """Prompts of unlike lengths, from which gradients flow too: none may be lost in padding that sees nothing."""
    pytest.importorskip("peft")

    def step(device: str, dtype: torch.dtype) -> tuple[float, list[torch.Tensor]]:
        torch.manual_seed(0)
        lm = lm_of(family, device, dtype)
        objective = SingleObjective(lm, LoraSpec(rank=4))
        items = [Item(str(i), Alone(lm).encode(chat), [40 + i, 50, 60][i:]) for i, chat in enumerate(CHATS)]
        loss, _ = objective(items, "sum")
        loss.backward()
        return loss.item(), [p.grad.cpu().float() for p in objective.trained.parameters() if p.grad is not None]

    loss, gradients = step(GPU, dtype)
    wanted, expected = step("cpu", torch.float32)
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    assert loss == pytest.approx(wanted, rel=tolerance) and len(gradients) == len(expected) > 0
    for a, b in zip(gradients, expected, strict=True):
        assert a.isfinite().all() and (a - b).norm() <= 5 * tolerance * b.norm().clamp(min=1e-3)


def test_training_computes_in_bfloat16_and_goes_on_where_it_was(tmp_path: Path) -> None:
    """Noise and dropout are drawn on the GPU: a run that goes on draws what it would have drawn."""
    write_rows(tmp_path / "rows.jsonl")
    weights = []
    for name, cuts in (("whole", []), ("cut", [5])):
        while True:
            config = config_of(tmp_path, output=tmp_path / name)
            pair = pair_of("llama", "qwen3", (GPU, GPU), torch.bfloat16, dropout=0.1, normalize=True)
            trainer = Trainer(pair, config, None, prepare(pair, config))
            assert isinstance(trainer.objective, FuserObjective) and trainer.objective.in_half

            def cut(record: dict[str, Any], cuts: list[int] = cuts) -> None:
                if cuts and record["step"] == cuts[0]:
                    cuts.pop()
                    raise KeyboardInterrupt

            try:
                trainer.run(cut)
                break
            except KeyboardInterrupt:
                torch.rand(3, device=GPU)
        assert all(p.dtype == torch.float32 for p in trainer.trained.parameters())
        weights.append(torch.cat([p.detach().flatten() for p in trainer.trained.parameters()]).cpu())
    assert (weights[0] - weights[1]).norm() <= 1e-3 * weights[0].norm()
