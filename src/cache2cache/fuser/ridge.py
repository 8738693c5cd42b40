"""A linear map from the sharer's cache to the receiver's, fitted in closed form: no gradients, one pass over the data.

Keys are predicted from keys and values from values, all heads of a layer at once, and the prediction takes the place of
what the receiver holds:

    fused = receiver + blend * (W x + c - receiver)

W and c are the ridge regression of the receiver's cache on the sharer's, at the positions that are fused. What the
receiver's own cache says is not among the inputs: it is the target, and would explain itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import C2CError
from .c2c import KINDS, C2CFuser, StackedFFN, StackedLinear

# Penalties tried, in units of the mean variance of a sharer channel.
PENALTIES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
Pairs = Iterable[tuple[Tensor, Tensor]]


@runtime_checkable
class Fitted(Protocol):
    """A fuser that is fitted and not trained, see `RidgeFuser.fit`."""

    def fit(self, train: Pairs, holdout: Pairs) -> list[dict[str, float | str | int]]: ...


class RidgeFuser(C2CFuser):
    """Until it is fitted it changes nothing.

    Attributes:
        proj_out: (G, S, T), the map.
        blend: (G, 1, 1), zero before the fit and the configured one afterwards.
    """

    defaults = {"gating": False, "weighting": False, "dropout": 0.0}  # noqa: RUF012

    def _build(self, s: int, t: int) -> None:
        c = self.config
        asked = [name for name in ("gating", "weighting", "normalize") if getattr(c, name)]
        if asked or not c.residual:
            raise C2CError(
                f"a ridge fuser is a plain linear map that replaces the receiver's cache by {c.blend:g}; leave out "
                + (", ".join(asked) or "residual: false")
            )
        self.proj_out = StackedLinear(self.groups, s, t, zero=True)
        self.blend = nn.Parameter(torch.zeros(self.groups, 1, 1), requires_grad=False)

    @property
    def open_gates(self) -> Tensor:
        return self.blend.flatten() > 0

    def change(self, sharer: Tensor, receiver: Tensor) -> Tensor:
        return self.blend * (self.proj_out(sharer) - receiver)

    @torch.no_grad()
    def fit(self, train: Pairs, holdout: Pairs) -> list[dict[str, float | str | int]]:
        """Set the map from what `inputs` gives, read once and piece by piece: only sums over positions are kept.

        Args:
            train: sharer's (G, N, S) and receiver's (G, N, T), N as it comes.
            holdout: as `train`, of other prompts; the penalty of each layer and kind is the one that predicts these
                best.

        Returns:
            Per kind and receiver layer its penalty and R², the share of the variance on the hold-out that is predicted.
        """
        seen, watched = Moments.of(train), Moments.of(holdout)
        weight, bias, penalty, r2 = solve(seen, watched)
        self.proj_out.weight.copy_(weight)
        assert self.proj_out.bias is not None
        self.proj_out.bias.copy_(bias)
        self.blend.fill_(self.config.blend)
        layers = self.receiver_layers.tolist()
        return [
            {"kind": kind, "layer": layer, "penalty": penalty[g].item(), "r2": r2[g].item()}
            for g, (kind, layer) in enumerate((kind, layer) for kind in KINDS for layer in layers)
        ]


@dataclass
class Moments:
    """Sums over positions, in float64, from which a linear regression and its error follow.

    Attributes:
        n: positions.
        x (G, 1, S), y (G, 1, T): sums. xx (G, S, S), xy (G, S, T): sums of products. yy (G, 1, T): sums of squares.
    """

    n: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, pairs: Pairs) -> Moments:
        """The sums over all pieces (G, N, S) and (G, N, T) of a stream."""
        total: Moments | None = None
        for x, y in pairs:
            x, y = x.double(), y.double()
            part = (x.sum(1, True), y.sum(1, True), x.mT @ x, x.mT @ y, y.square().sum(1, True))
            if total is None:
                total = cls(x.shape[1], *part)
            else:
                total.n += x.shape[1]
                for whole, more in zip((total.x, total.y, total.xx, total.xy, total.yy), part, strict=True):
                    whole += more
        if total is None or total.n < 2:
            raise C2CError(
                f"{0 if total is None else total.n} positions to fit a ridge fuser on or to choose its penalty with; "
                "give more data, and a hold-out"
            )
        return total

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Covariances times n: xx, xy, and the total variance of y, without a copy of the data."""
        return (
            self.xx - self.x.mT @ self.x / self.n,
            self.xy - self.x.mT @ self.y / self.n,
            (self.yy - self.y.square() / self.n).sum((1, 2)),
        )

    def scaled(self, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> Moments:
        """The sums of (x - mean) / std and (y - mean) / std, whose means and deviations are given, (G, 1, S) and
        (G, 1, T)."""
        (p, s), (q, t) = ((mean.double(), std.double()) for mean, std in (x, y))
        n = self.n
        xx = self.xx - p.mT @ self.x - self.x.mT @ p + n * p.mT @ p
        xy = self.xy - p.mT @ self.y - self.x.mT @ q + n * p.mT @ q
        yy = self.yy - 2 * q * self.y + n * q.square()
        return Moments(n, (self.x - n * p) / s, (self.y - n * q) / t, xx / (s.mT * s), xy / (s.mT * t), yy / t.square())


def solve(train: Moments, holdout: Moments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ridge regression of each module, with the penalty that is best on the hold-out.

    Returns:
        Weight (G, S, T), bias (G, 1, T), penalty (G,) and R² on the hold-out (G,), all float64.
    """
    xx, xy, _ = train.centred()
    size, vectors = torch.linalg.eigh(xx)
    size, rotated = size.clamp(min=0)[..., None], vectors.mT @ xy
    unit = size.mean(1, keepdim=True).clamp(min=1e-30)
    x_mean, y_mean = train.x / train.n, train.y / train.n
    held_xx, held_xy, held_yy = holdout.centred()
    best: list[Tensor] = []
    for penalty in PENALTIES:
        weight = vectors @ (rotated / (size + penalty * unit))
        bias = y_mean - x_mean @ weight
        # The squared error: that of the centred numbers, and n times the square of the mean error.
        error = held_yy - 2 * (weight * held_xy).sum((1, 2)) + (weight * (held_xx @ weight)).sum((1, 2))
        error = error + ((holdout.y - holdout.x @ weight) / holdout.n - bias).square().sum((1, 2)) * holdout.n
        found = [weight, bias, torch.full_like(error, penalty), 1 - error / held_yy.clamp(min=1e-30)]
        if not best:
            best = found
            continue
        better = found[3] > best[3]
        for old, new in zip(best, found, strict=True):
            old[better] = new[better]
    return best[0], best[1], best[2], best[3]


@torch.no_grad()
def start_from_ridge(fuser: C2CFuser, train: Moments, holdout: Moments, share: float = 1.0) -> None:
    """Let an untrained fuser's projection start as the best linear map of its hidden size.

    In the units that the fuser computes in, projected = blend * (W x + c - y), with W and c the ridge regression of the
    receiver's y on the sharer's x. [W; -1] has the receiver's rank; its largest singular directions, as many as the
    hidden layer holds, go into the first and last layer, and the blocks between them start as identities. Weights and
    gates are left as they are.

    Args:
        fuser: with in_sharer, in_receiver, proj_out and residual blocks, as `C2CFuser` and the bottleneck have them.
        train, holdout: of what `inputs` gives, as for `RidgeFuser.fit`.
        share: of the way that `blend` says; less than all where several fusers' changes are summed.
    """
    if fuser.config.normalize:
        units = (fuser.sharer_mean, fuser.sharer_std), (fuser.receiver_mean, fuser.receiver_std)
        train, holdout = train.scaled(*units), holdout.scaled(*units)
    weight, bias, _, _ = solve(train, holdout)
    minus = -torch.eye(weight.shape[2], dtype=weight.dtype, device=weight.device).expand(len(weight), -1, -1)
    left, size, right = torch.linalg.svd(torch.cat([weight, minus], dim=1), full_matrices=False)
    rank = min(size.shape[1], fuser.config.hidden_dim)
    root = size[:, :rank].sqrt()
    entry, out = left[..., :rank] * root[:, None], root[..., None] * right[:, :rank]
    s = weight.shape[1]
    assert fuser.in_sharer.bias is not None and fuser.proj_out.bias is not None
    fuser.in_sharer.weight[..., :rank].copy_(entry[:, :s])
    fuser.in_receiver.weight[..., :rank].copy_(entry[:, s:])
    fuser.in_sharer.bias.zero_()
    fuser.proj_out.weight.zero_()
    fuser.proj_out.weight[:, :rank].copy_(share * fuser.config.blend * out)
    fuser.proj_out.bias.copy_(share * fuser.config.blend * bias)
    for block in (fuser.mlp1, *fuser.proj_mlp2):
        assert isinstance(block, StackedFFN)
        block.w2.weight.zero_()
