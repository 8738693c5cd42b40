"""The fuser against a plain implementation of the paper's equations, layer by layer and token by token."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from cache2cache.config import FuserConfig, ModelIdentity
from cache2cache.fuser import VARIANTS, C2CFuser, make_fuser
from cache2cache.fuser.c2c import StackedFFN, dropout
from cache2cache.kv import KV

RECEIVER = ModelIdentity(name="receiver", num_layers=4, num_kv_heads=3, head_dim=4)
SHARER = ModelIdentity(name="sharer", num_layers=3, num_kv_heads=2, head_dim=6)


def fuser_of(seed: int = 0, **settings: object) -> C2CFuser:
    torch.manual_seed(seed)
    base = {
        "hidden_dim": 10,
        "intermediate_dim": 14,
        "gate_init": 1.0,
        "dropout": 0.0,
        "receiver": RECEIVER,
        "sharer": SHARER,
    }
    fuser = make_fuser(FuserConfig(**{**base, **settings})).eval()  # type: ignore[arg-type]
    if fuser.config.normalize:
        for name in ("sharer", "receiver"):
            getattr(fuser, f"{name}_mean").normal_(0, 3)
            getattr(fuser, f"{name}_std").uniform_(0.5, 40)
    return fuser


def caches(batch: int = 2, seed: int = 1) -> tuple[KV, KV]:
    generator = torch.Generator().manual_seed(seed)

    def make(model: ModelIdentity, length: int) -> KV:
        shape = (model.num_layers, batch, model.num_kv_heads, length, model.head_dim)
        return KV(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))

    return make(RECEIVER, 7), make(SHARER, 9)


WHERE = torch.tensor([[0, 0, 0, 1, 1], [1, 2, 6, 0, 5], [0, 1, 0, 1, 0], [0, 8, 8, 3, 2]])


def plain(fuser: C2CFuser, receiver: KV, sharer: KV, where: Tensor) -> KV:
    """FORMATS: z = in([sharer ; receiver]) and so on, one layer, kind and token after the other."""
    p = dict(fuser.named_parameters())
    c = fuser.config
    out = KV(receiver.keys.clone(), receiver.values.clone())
    n = len(fuser.receiver_layers)

    def ffn(x: Tensor, name: str, g: int) -> Tensor:
        normed = x / torch.sqrt((x * x).mean() + 1e-6) * p[f"{name}.norm"][g, 0]
        return x + (torch.nn.functional.gelu(normed @ p[f"{name}.w1.weight"][g])) @ p[f"{name}.w2.weight"][g]

    for (i, (t_layer, s_layer)), (kind, name) in product(enumerate(c.layer_map), enumerate(("keys", "values"))):
        g = i + kind * n
        if c.gating and fuser.gate_logit[g] <= 0:
            continue
        for row, t, other, s in where.T.tolist():
            x = getattr(sharer, name)[s_layer, other, :, s].flatten()
            r = getattr(receiver, name)[t_layer, row, :, t].flatten()
            before = r
            if c.normalize:
                x = (x - fuser.sharer_mean[g, 0]) / fuser.sharer_std[g, 0]
                r = (r - fuser.receiver_mean[g, 0]) / fuser.receiver_std[g, 0]
            if c.variant == "c2c-c":
                for k in (1, 2, 3):
                    x = x @ p[f"sharer_mlp{k}.weight"][g] + p[f"sharer_mlp{k}.bias"][g, 0]
                    x = torch.nn.functional.gelu(x) if k < 3 else x
            weight = torch.cat([p["in_sharer.weight"][g], p["in_receiver.weight"][g]])
            z = ffn(torch.cat([x, r]) @ weight + p["in_sharer.bias"][g, 0], "mlp1", g)
            projected = z
            for j in range(c.num_layers - 2):
                projected = ffn(projected, f"proj_mlp2.{j}", g)
            projected = projected @ p["proj_out.weight"][g] + p["proj_out.bias"][g, 0]
            if c.normalize:
                projected = projected * fuser.receiver_std[g, 0] + (0 if c.residual else fuser.receiver_mean[g, 0])
            if c.weighting:
                head = ffn(z, "scalar_mlp2", g) @ p["scalar_head.weight"][g] + p["scalar_head.bias"][g, 0]
                projected = projected * head.sigmoid().repeat_interleave(RECEIVER.head_dim)
            fused = before + projected if c.residual else projected
            getattr(out, name)[t_layer, row, :, t] = fused.view(RECEIVER.num_kv_heads, RECEIVER.head_dim)
    return out


SETTINGS = [
    {},
    {"layer_map": "last_aligned", "num_layers": 4},
    {"layer_map": "k_nearest", "normalize": True},
    {"weighting": False},
    {"gating": False},
    {"gating": False, "residual": False, "weighting": False, "normalize": True},
    {"gating": False, "residual": False, "normalize": True},
    {"variant": "c2c-c"},
    {"variant": "c2c-c", "normalize": True, "num_layers": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_the_equations(settings: dict[str, object]) -> None:
    fuser = fuser_of(**settings)
    receiver, sharer = caches()
    expected = plain(fuser, receiver, sharer, WHERE)
    with torch.no_grad():
        fused = fuser(receiver, sharer, WHERE)
    torch.testing.assert_close(fused.keys, expected.keys, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(fused.values, expected.values, atol=2e-4, rtol=1e-4)
    assert not torch.equal(fused.keys, receiver.keys)


@pytest.mark.parametrize("settings", [{}, {"normalize": True}, {"variant": "c2c-c", "normalize": True}], ids=str)
def test_some_gates_closed(settings: dict[str, object]) -> None:
    fuser = fuser_of(**settings)
    receiver, sharer = caches()
    with torch.no_grad():
        fuser.gate_logit.copy_(torch.tensor([0.5, -1.0, 0.0, -1.0, 2.0, -3.0]))  # keys of layer 1, values of layer 2
    fused = fuser(receiver, sharer, WHERE)
    expected = plain(fuser, receiver, sharer, WHERE)
    torch.testing.assert_close(fused.keys, expected.keys, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(fused.values, expected.values, atol=2e-4, rtol=1e-4)
    assert fuser.sharer_depth == 2 and fuser.sharer_reads == 2
    lower = KV(sharer.keys[:2], sharer.values[:2])  # the layers above are not asked for
    assert torch.equal(fuser(receiver, lower, WHERE).keys, fused.keys)


def test_closed_gates_are_the_identity() -> None:
    fuser = fuser_of(gate_init=0.0)  # as published: an untrained fuser changes nothing
    receiver, sharer = caches()
    fused = fuser(receiver, sharer, WHERE)
    assert torch.equal(fused.keys, receiver.keys) and torch.equal(fused.values, receiver.values)
    assert fuser.sharer_depth == 0


def test_only_the_named_positions_change() -> None:
    fuser, (receiver, sharer) = fuser_of(), caches()
    fused = fuser(receiver, sharer, WHERE)
    changed = (fused.keys != receiver.keys).any(0).any(1).any(-1)
    assert sorted(map(tuple, changed.nonzero().tolist())) == sorted(map(tuple, WHERE[:2].T.tolist()))
    assert torch.equal(fused.keys[0], receiver.keys[0])  # terminal: the lowest receiver layer has no partner


def test_weights_changed_after_a_first_use_count() -> None:
    fuser, (receiver, sharer) = fuser_of(normalize=True), caches()
    fuser(receiver, sharer, WHERE)
    with torch.no_grad():
        fuser.proj_out.weight.add_(0.5)
        fuser.receiver_std.mul_(2)
    expected = plain(fuser, receiver, sharer, WHERE)
    torch.testing.assert_close(fuser(receiver, sharer, WHERE).keys, expected.keys, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"normalize": True}, {"variant": "c2c-c"}], ids=str)
def test_gradients_agree_with_finite_differences(settings: dict[str, object]) -> None:
    fuser = (
        fuser_of(gate_noise="none", initial_temperature=0.7, hidden_dim=4, intermediate_dim=5, **settings)
        .double()
        .train()
    )
    receiver, sharer = (KV(kv.keys.double(), kv.values.double()) for kv in caches())
    names, parameters = zip(*fuser.named_parameters(), strict=True)
    probe = torch.randn(2, *receiver.keys.shape, dtype=torch.double)

    def loss() -> Tensor:
        fused = fuser(receiver, sharer, WHERE)
        return (probe[0] * fused.keys.sin()).sum() + (probe[1] * fused.values.sin()).sum()

    gradients = torch.autograd.grad(loss(), parameters)
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        direction = torch.randn_like(parameter)
        step = 1e-6
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            above = loss()
            parameter.add_(direction, alpha=-2 * step)
            below = loss()
            parameter.add_(direction, alpha=step)
        expected = (above - below) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(expected.item(), rel=2e-5, abs=1e-7), name
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("residual", [True, False])
def test_gradients_of_an_earlier_sharer(residual: bool) -> None:
    """The second one adds to what the first made, or puts its own in its place: at some of its positions."""
    first, second = (
        fuser_of(residual=r, gating=False, hidden_dim=4, intermediate_dim=5).double().train() for r in (True, residual)
    )
    receiver, sharer = (KV(kv.keys.double(), kv.values.double()) for kv in caches())
    half = WHERE[:, ::2]
    probe = torch.randn_like(receiver.keys)

    def loss() -> Tensor:
        fused = first(receiver, sharer, WHERE)
        return (probe * second(receiver, sharer, half, out=fused).keys.sin()).sum()

    weight = first.proj_out.weight
    (gradient,) = torch.autograd.grad(loss(), [weight])
    direction = torch.randn_like(weight)
    found = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            weight.add_(direction, alpha=step)
            found.append(loss().item())
    assert (gradient * direction).sum().item() == pytest.approx((found[0] - found[1]) / 2e-6, rel=2e-5)
    assert gradient.abs().sum() > 0


def test_zero_init_starts_from_the_receiver_and_still_learns() -> None:
    fuser = fuser_of(zero_init=True, gate_noise="none").train()
    receiver, sharer = caches()
    fused = fuser(receiver, sharer, WHERE)
    torch.testing.assert_close(fused.keys, receiver.keys)
    fused.keys.square().sum().backward()
    assert fuser.proj_out.weight.grad is not None and fuser.proj_out.weight.grad.abs().sum() > 0


def test_gate_noise() -> None:
    """The share of draws that open a gate: sigmoid(logit) with logistic noise, more with one-sided Gumbel."""
    n = 40_000
    for kind, logit, expected in (
        ("logistic", 0.0, 0.5),
        ("logistic", 1.0, 1 / (1 + math.exp(-1))),
        ("gumbel", 0.0, 1 - math.exp(-1)),  # P(Gumbel > 0)
    ):
        fuser = fuser_of(gate_noise=kind, gate_init=logit, final_temperature=1e-4).train()
        fuser.set_progress(10**6)
        gates = fuser._gate(torch.zeros(6, n // 6, 1))
        assert gates.shape == (6, n // 6, RECEIVER.num_kv_heads)
        assert (gates > 0.5).float().mean().item() == pytest.approx(expected, abs=0.01)


def test_the_temperature_is_annealed_geometrically() -> None:
    fuser = fuser_of(initial_temperature=1.0, final_temperature=0.01, anneal_steps=100)
    for step, expected in ((0, 1.0), (50, 0.1), (100, 0.01), (500, 0.01)):
        fuser.set_progress(step)
        assert fuser.temperature.item() == pytest.approx(expected, rel=1e-5)


def test_dropout_only_in_training() -> None:
    fuser, (receiver, sharer) = fuser_of(dropout=0.5), caches()
    assert torch.equal(fuser(receiver, sharer, WHERE).keys, fuser(receiver, sharer, WHERE).keys)
    fuser.train()
    assert not torch.equal(fuser(receiver, sharer, WHERE).keys, fuser(receiver, sharer, WHERE).keys)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_block_drops_out(variant: str) -> None:
    fuser = make_fuser(FuserConfig(receiver=RECEIVER, sharer=SHARER, variant=variant, dropout=0.25, num_layers=4))
    blocks = [module for module in fuser.modules() if isinstance(module, StackedFFN)]
    assert len(blocks) == (0 if variant == "ridge" else 4)  # mlp1, two of proj_mlp2, scalar_mlp2
    for block in blocks:
        x = torch.randn(len(block.w1.weight), 200, block.w1.weight.shape[1])
        assert (block.train().inner(x) == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
        assert not (block.eval().inner(x) == 0).any()


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    x = torch.full((7, 101, 129), 2.0).requires_grad_()  # no multiple of four
    dropped = dropout(x, 0.1)
    gone = dropped == 0
    for draws in (gone.flatten(), *(gone.flatten()[n::4] for n in range(4)), gone[:, :, -1]):
        assert draws.float().mean().item() == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / draws.numel()))
    assert (dropped[~gone] / 2).unique().item() == pytest.approx(1 / 0.9, rel=1e-4)
    dropped.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, dropped.detach() / 2)
    torch.manual_seed(3)
    once = dropout(x, 0.1)
    torch.manual_seed(3)
    assert torch.equal(once, dropout(x, 0.1)) and not torch.equal(once, dropout(x, 0.1))
    assert dropout(x, 0.999_999).isfinite().all()  # nearer to 1 than a 16th bit tells


def test_published_size() -> None:
    """The parameter count of a published fuser: Qwen3-0.6B <- Qwen2.5-0.5B-Instruct, 477,848,056 (gates and all)."""
    receiver = ModelIdentity(name="Qwen3-0.6B", num_layers=28, num_kv_heads=8, head_dim=128)
    sharer = ModelIdentity(name="Qwen2.5-0.5B-Instruct", num_layers=24, num_kv_heads=2, head_dim=64)
    with torch.device("meta"):
        fuser = make_fuser(FuserConfig(layer_map="last_aligned", receiver=receiver, sharer=sharer))
    assert sum(p.numel() for p in fuser.parameters()) == 477_848_056


def test_every_variant_is_built_by_name() -> None:
    for name, kind in VARIANTS.items():
        assert type(fuser_of(variant=name)) is kind


def test_a_batch_of_rows_and_a_cache_to_add_to() -> None:
    """Views with gaps are read as they are, and changes are added to what `out` holds, not to what was read."""
    fuser, (receiver, sharer) = fuser_of(), caches(batch=3)
    rows, other = slice(0, 3, 2), caches(batch=2, seed=5)[0]
    lean = fuser(KV(receiver.keys[:, ::2].clone(), receiver.values[:, ::2].clone()), sharer.rows(rows), WHERE)
    out = KV(other.keys.clone(), other.values.clone())
    assert fuser(receiver.rows(rows), sharer.rows(rows), WHERE, out) is out
    for name in ("keys", "values"):
        change = getattr(lean, name) - getattr(receiver.rows(rows), name)
        torch.testing.assert_close(getattr(out, name) - getattr(other, name), change, atol=1e-5, rtol=1e-4)


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    fuser, (receiver, sharer) = fuser_of(normalize=True), caches()
    with torch.no_grad():
        whole = fuser(receiver, sharer, WHERE)
        monkeypatch.setattr("cache2cache.fuser.c2c.CHUNK", 2)
        pieces = fuser(receiver, sharer, WHERE)
    torch.testing.assert_close(pieces.keys, whole.keys)
    torch.testing.assert_close(pieces.values, whole.values)
    assert not torch.equal(whole.keys, receiver.keys)
