"""Whether one cloud of vectors lies in another: figures that don't depend on the eye, and the map that does."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..errors import C2CError

NEIGHBOURS = 10


def in_one_space(reference: Tensor, *clouds: Tensor) -> list[Tensor]:
    """Clouds (N_i, D_i) of unequal width in one space, the reference first: narrower ones get zeros behind, and every
    channel is in units of the reference's deviation, so that a few large channels don't decide alone."""
    width = max(cloud.shape[1] for cloud in (reference, *clouds))
    padded = [torch.nn.functional.pad(cloud.float(), (0, width - cloud.shape[1])) for cloud in (reference, *clouds)]
    scale, every = padded[0].std(0), torch.cat(padded).std(0)
    scale = scale.where(scale > 1e-6, every).clamp_min(1e-6)  # where the reference has no width, that of all points
    return [cloud / scale for cloud in padded]


def neighbour_share(query: Tensor, own: Tensor, others: Tensor, k: int = NEIGHBOURS) -> float:
    """Of the k nearest neighbours of each query (N, D), among `own` and `others`, the share that is of `own`."""
    points = torch.cat([own, others])
    k = min(k, len(points))
    nearest = torch.cdist(query, points).topk(k, largest=False).indices
    return (nearest < len(own)).float().mean().item()


def radii(points: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """How far each point's k-th nearest neighbour among the others is, (N,)."""
    if len(points) < 2:
        raise C2CError(f"{len(points)} points have no neighbours; give more questions or positions")
    return torch.cdist(points, points).topk(min(k, len(points) - 1) + 1, largest=False).values[:, -1]


def overlap(points: Tensor, reference: Tensor, k: int = NEIGHBOURS) -> dict[str, float]:
    """How a cloud (N, D) lies in a reference (M, D), each point of which has a ball up to its k-th neighbour.

    precision: the share of the points that lie in some ball: are they where the reference is?
    coverage: the share of the balls that hold a point: is the cloud everywhere where the reference is?
    High precision and low coverage is a sub-region (Kynkäänniemi et al., 2019; Naeem et al., 2020).
    """
    inside = torch.cdist(points, reference) <= radii(reference, k)
    return {"precision": inside.any(1).float().mean().item(), "coverage": inside.any(0).float().mean().item()}


def check(points: int, perplexity: float) -> None:
    """Raise a C2CError where t-SNE can't be made of that many points, before hours of work."""
    if find_spec("sklearn") is None:
        raise C2CError("t-SNE needs scikit-learn; install it with: pip install 'cache2cache[plots]'")
    if perplexity >= points:
        raise C2CError(
            f"a perplexity of {perplexity:g} takes more than the {points} points there are; give a lower one"
        )


def tsne(clouds: dict[str, Tensor], perplexity: float, seed: int) -> dict[str, list[list[float]]]:
    """A map of all points in two dimensions, by cloud (scikit-learn); the first cloud is the reference."""
    from sklearn.manifold import TSNE

    points = torch.cat(in_one_space(*clouds.values())).numpy()
    placed: Any = TSNE(perplexity=perplexity, random_state=seed, init="pca").fit_transform(points)
    parts = torch.from_numpy(placed).split([len(cloud) for cloud in clouds.values()])
    return {name: [[round(x, 3) for x in p] for p in part.tolist()] for name, part in zip(clouds, parts, strict=True)}
