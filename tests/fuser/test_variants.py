"""The variants besides the published fuser: what they compute, and what all of them share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cache2cache import C2CError
from cache2cache.config import FuserConfig, ModelIdentity
from cache2cache.fuser import VARIANTS, C2CFuser, RidgeFuser, checkpoint, make_fuser
from cache2cache.fuser.ridge import Moments
from cache2cache.kv import KV
from fuser.test_fuser import RECEIVER, WHERE, caches, fuser_of


def opened(variant: str, **settings: object) -> C2CFuser:
    """An open fuser of a variant; a ridge fuser with a random map."""
    if variant != "ridge":
        return fuser_of(variant=variant, **settings)
    fuser = fuser_of(variant=variant, **{"blend": 0.7, **settings})
    torch.nn.init.normal_(fuser.proj_out.weight)
    torch.nn.init.normal_(fuser.proj_out.bias)
    torch.nn.init.constant_(fuser.blend, fuser.config.blend)
    return fuser


# ---- bottleneck -----------------------------------------------------------------------------------------------------


def plain(fuser: C2CFuser, receiver: KV, sharer: KV) -> KV:
    """The equations, one layer and position after the other."""
    p, c, heads, n = dict(fuser.named_parameters()), fuser.config, RECEIVER.num_kv_heads, len(fuser.receiver_layers)
    out = KV(receiver.keys.clone(), receiver.values.clone())

    def ffn(x: Tensor, name: str, g: int) -> Tensor:
        normed = x / torch.sqrt((x * x).mean() + 1e-6) * p[f"{name}.norm"][g, 0]
        return x + F.gelu(normed @ p[f"{name}.w1.weight"][g]) @ p[f"{name}.w2.weight"][g]

    for g, (t_layer, s_layer) in enumerate(c.layer_map):
        for row, t, other, s in WHERE.T.tolist():
            x = torch.cat([getattr(sharer, k)[s_layer, other, :, s].flatten() for k in ("keys", "values")])
            r = torch.cat([getattr(receiver, k)[t_layer, row, :, t].flatten() for k in ("keys", "values")])
            if c.normalize:
                x = (x - fuser.sharer_mean[g, 0]) / fuser.sharer_std[g, 0]
                r = (r - fuser.receiver_mean[g, 0]) / fuser.receiver_std[g, 0]
            z = x @ p["in_sharer.weight"][g] + r @ p["in_receiver.weight"][g] + p["in_sharer.bias"][g, 0]
            z = ffn(z, "mlp1", g)
            y = z
            for j in range(c.num_layers - 2):
                y = ffn(y, f"proj_mlp2.{j}", g)
            y = y @ p["proj_out.weight"][g] + p["proj_out.bias"][g, 0]
            if c.normalize:
                y = y * fuser.receiver_std[g, 0] + (0 if c.residual else fuser.receiver_mean[g, 0])
            if c.weighting:
                head = ffn(z, "scalar_mlp2", g) @ p["scalar_head.weight"][g] + p["scalar_head.bias"][g, 0]
                y = y * head.sigmoid().repeat_interleave(RECEIVER.head_dim)
            for k, (kind, part) in enumerate(zip(("keys", "values"), y.chunk(2), strict=True)):
                if c.gating and fuser.gate_logit[k * n + g] <= 0:
                    continue
                before = getattr(receiver, kind)[t_layer, row, :, t]
                getattr(out, kind)[t_layer, row, :, t] = part.view(heads, -1) + (before if c.residual else 0)
    return out


SWITCHES = [
    {},
    {"normalize": True},
    {"normalize": True, "num_layers": 4, "layer_map": "last_aligned"},
    {"weighting": False},
    {"gating": False, "num_layers": 2},
    {"gating": False, "residual": False, "normalize": True},
    {"gating": False, "residual": False, "weighting": False},
]


@pytest.mark.parametrize("settings", SWITCHES, ids=str)
def test_bottleneck_equals_the_equations(settings: dict[str, object]) -> None:
    fuser, (receiver, sharer) = fuser_of(variant="bottleneck", **settings), caches()
    if fuser.config.gating:
        with torch.no_grad():  # a layer with both kinds open, with one, with none
            logits = torch.linspace(-1, 1, len(fuser.gate_logit))
            fuser.gate_logit.copy_(logits.view(2, -1).flip(0).flatten())
            fuser.gate_logit[0], fuser.gate_logit[-1] = 1.0, 1.0
    expected = plain(fuser, receiver, sharer)
    with torch.no_grad():
        fused = fuser(receiver, sharer, WHERE)
    torch.testing.assert_close(fused.keys, expected.keys, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(fused.values, expected.values, atol=2e-4, rtol=1e-4)
    assert not torch.equal(fused.keys, receiver.keys) and not torch.equal(fused.values, receiver.values)


@pytest.mark.parametrize(
    ("receiver", "sharer"),
    [
        (("Qwen3-0.6B", 28, 8, 128), ("Qwen2.5-0.5B-Instruct", 24, 2, 64)),
        (("SmolLM2-135M", 30, 3, 64), ("Qwen2.5-Coder-1.5B", 28, 2, 128)),
    ],
    ids=lambda model: model[0],
)
def test_bottleneck_is_twenty_times_smaller(
    receiver: tuple[str, int, int, int], sharer: tuple[str, int, int, int]
) -> None:
    fields = ("name", "num_layers", "num_kv_heads", "head_dim")
    models = {
        role: ModelIdentity(**dict(zip(fields, model, strict=True)))
        for role, model in (("receiver", receiver), ("sharer", sharer))
    }

    def count(**settings: object) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in make_fuser(FuserConfig(**models, **settings)).parameters())

    for layers in ("terminal", "last_aligned"):
        assert 20 * count(variant="bottleneck", layer_map=layers) < count(layer_map=layers)
    assert count(variant="bottleneck", hidden_dim=256) > count(variant="bottleneck")  # what the user sets counts


# ---- every variant --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"normalize": True}, {"weighting": False}], ids=str)
def test_bottleneck_gradients_agree_with_finite_differences(settings: dict[str, object]) -> None:
    more = {"gate_noise": "none", "initial_temperature": 0.7, "hidden_dim": 4, "intermediate_dim": 5}
    fuser = fuser_of(variant="bottleneck", **more, **settings).double().train()
    receiver, sharer = (KV(kv.keys.double(), kv.values.double()) for kv in caches())
    names, parameters = zip(*fuser.named_parameters(), strict=True)
    probe = torch.randn(2, *receiver.keys.shape, dtype=torch.double)

    def loss() -> Tensor:
        fused = fuser(receiver, sharer, WHERE)
        return (probe[0] * fused.keys.sin()).sum() + (probe[1] * fused.values.sin()).sum()

    for name, parameter, gradient in zip(names, parameters, torch.autograd.grad(loss(), parameters), strict=True):
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter.add_(direction, alpha=1e-6)
            above = loss()
            parameter.add_(direction, alpha=-2e-6)
            below = loss()
            parameter.add_(direction, alpha=1e-6)
        expected = ((above - below) / 2e-6).item()
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=2e-5, abs=1e-7), name
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load(variant: str, tmp_path: Path) -> None:
    fuser, (receiver, sharer) = opened(variant), caches()
    checkpoint.save(fuser, tmp_path)
    again = checkpoint.load(tmp_path)
    assert type(again) is type(fuser) and again.config == fuser.config
    one, other = fuser(receiver, sharer, WHERE), again(receiver, sharer, WHERE)
    assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
    assert not torch.equal(one.keys, receiver.keys)


@pytest.mark.parametrize("variant", VARIANTS)
def test_closed_is_the_receiver(variant: str) -> None:
    fuser, (receiver, sharer) = (
        fuser_of(variant=variant, **({} if variant == "ridge" else {"gate_init": 0.0})),
        caches(),
    )
    fused = fuser(receiver, sharer, WHERE)
    assert torch.equal(fused.keys, receiver.keys) and torch.equal(fused.values, receiver.values)
    assert fuser.sharer_depth == fuser.sharer_reads == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_computes_what_inference_does(variant: str) -> None:
    """With hard gates: all modules at once in the one, the open ones with folded weights in the other."""
    settings = {} if variant == "ridge" else {"normalize": True, "gate_noise": "none", "gate_init": 5.0}
    fuser, (receiver, sharer) = opened(variant, **settings), caches()
    fuser.set_progress(10**6)
    if fuser.config.gating:
        with torch.no_grad():
            fuser.gate_logit[::2] = -5.0
    one = fuser(receiver, sharer, WHERE)
    other = fuser.train()(receiver, sharer, WHERE)
    torch.testing.assert_close(other.keys, one.keys, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other.values, one.values, atol=1e-4, rtol=1e-4)


# ---- ridge ----------------------------------------------------------------------------------------------------------


def linear_data(fuser: RidgeFuser, n: int, seed: int, noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sharer's cache as a known linear map of the receiver's, with large means as keys have; the map back."""
    s, t = fuser.proj_out.weight.shape[1:]
    random = torch.Generator().manual_seed(0)  # the same map for every seed of the data
    back = torch.randn(fuser.groups, s, t, generator=random) / 3
    shift = 20 * torch.randn(fuser.groups, 1, t, generator=random)
    random.manual_seed(seed)
    x = torch.randn(fuser.groups, n, s, generator=random) * torch.linspace(0.1, 3, s) + 10
    y = x @ back + shift
    return x, y + noise * torch.randn(y.shape, generator=random), back, shift


def test_ridge_recovers_a_linear_map() -> None:
    fuser = fuser_of(variant="ridge")
    assert isinstance(fuser, RidgeFuser)
    x, y, back, shift = linear_data(fuser, 400, 1)
    held = linear_data(fuser, 100, 2)[:2]
    rows = fuser.fit([(x, y)], [held])
    assert [(r["kind"], r["layer"]) for r in rows] == [(k, n) for k in ("keys", "values") for n in (1, 2, 3)]
    assert all(r["r2"] > 0.999 for r in rows)
    torch.testing.assert_close(fuser.proj_out.weight.detach(), back, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(fuser.proj_out.bias.detach(), shift, atol=2e-2, rtol=1e-3)
    torch.testing.assert_close(held[1] + fuser.change(*held), held[1], atol=1e-2, rtol=1e-3)  # blend 1: the prediction
    assert fuser.open_gates.all()


def test_ridge_r2_and_penalty_are_those_of_the_data() -> None:
    """Against a direct computation with all of the data at hand."""
    fuser = fuser_of(variant="ridge")
    assert isinstance(fuser, RidgeFuser)
    x, y, *_ = linear_data(fuser, 14, 1, noise=8.0)  # hardly more positions than channels: a penalty pays
    held_x, held_y, *_ = linear_data(fuser, 300, 2, noise=8.0)
    rows = fuser.fit([(x, y)], [(held_x, held_y)])
    predicted = fuser.proj_out(held_x)
    error = (held_y - predicted).square().sum((1, 2))
    total = (held_y - held_y.mean(1, keepdim=True)).square().sum((1, 2))
    torch.testing.assert_close(torch.tensor([r["r2"] for r in rows]), 1 - error / total, atol=1e-4, rtol=1e-4)
    assert max(r["penalty"] for r in rows) > 1e-2
    g, penalty = 2, rows[2]["penalty"]
    a, b = (z[g].double() - z[g].double().mean(0) for z in (x, y))
    size = (a.T @ a).trace() / a.shape[1]
    expected = torch.linalg.solve(a.T @ a + penalty * size * torch.eye(a.shape[1], dtype=torch.double), a.T @ b)
    torch.testing.assert_close(fuser.proj_out.weight[g].detach(), expected.float(), atol=1e-4, rtol=1e-4)


def test_ridge_fitted_in_pieces_is_fitted_in_one_go() -> None:
    whole, pieces = fuser_of(variant="ridge"), fuser_of(variant="ridge")
    x, y, *_ = linear_data(whole, 100, 1, noise=2.0)
    held = linear_data(whole, 50, 2, noise=2.0)[:2]
    one = whole.fit([(x, y)], [held])
    cuts = [1, 30, 69]
    streamed = zip(x.split(cuts, 1), y.split(cuts, 1), strict=True)
    other = pieces.fit(streamed, iter([(held[0][:, :20], held[1][:, :20]), (held[0][:, 20:], held[1][:, 20:])]))
    torch.testing.assert_close(pieces.proj_out.weight, whole.proj_out.weight, atol=1e-6, rtol=1e-6)
    assert [r["r2"] for r in other] == pytest.approx([r["r2"] for r in one], abs=1e-9)


def test_sums_of_scaled_numbers_follow_from_those_of_the_plain_ones() -> None:
    """Also for key channels whose mean is a hundred times their deviation."""
    torch.manual_seed(0)
    x, y = torch.randn(3, 50, 4, dtype=torch.double) + 100, 5 * torch.randn(3, 50, 2, dtype=torch.double) - 20
    by_x, by_y = ((z.mean(1, keepdim=True) + 0.1, z.std(1, keepdim=True) + 0.2) for z in (x, y))
    scaled = [((z - mean) / std) for z, (mean, std) in ((x, by_x), (y, by_y))]
    found, expected = Moments.of([(x, y)]).scaled(by_x, by_y), Moments.of([(scaled[0], scaled[1])])
    assert found.n == expected.n
    for name in ("x", "y", "xx", "xy", "yy"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-8, rtol=1e-8)


def test_ridge_says_what_it_cannot_do() -> None:
    for settings in ({"gating": True}, {"weighting": True}, {"normalize": True}):
        with pytest.raises(C2CError, match=f"plain linear map .* leave out {next(iter(settings))}"):
            fuser_of(variant="ridge", **settings)
    with pytest.raises(C2CError, match="0 positions to fit"):
        Moments.of([])
