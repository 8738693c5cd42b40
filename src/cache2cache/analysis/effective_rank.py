"""Effective rank: how many directions a set of vectors really uses.

exp(H(p)) with p the singular values divided by their sum (Roy and Vetterli, 2007): r equal singular values give r. The
vectors are never held together: their Gram matrix is summed piece by piece, and its eigenvalues are the squares of the
singular values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gram(rows: Tensor) -> Tensor:
    """XᵀX in float64, (…, D, D), of rows (…, N, D). Those of several pieces are added to get that of all rows.

    Rows are not centred, as in the paper: a mean that is far from zero is one large singular value.
    """
    rows = rows.double()
    return rows.mT @ rows


def singular_values(grams: Tensor) -> Tensor:
    """The singular values (…, D), ascending, of the matrices with these Gram matrices (…, D, D).

    A square has half the digits: values under about 1e-7 of the largest can't be told from zero and are set to it, as
    a thousand of them would otherwise count as a direction.
    """
    squares = torch.linalg.eigvalsh(grams.double())
    noise = squares[..., -1:] * grams.shape[-1] * torch.finfo(torch.float64).eps
    return squares.where(squares > noise, 0).sqrt()


def effective_rank(grams: Tensor) -> Tensor:
    """The effective ranks (…), float64, of the matrices with these Gram matrices (…, D, D); 0 for an empty one."""
    values = singular_values(grams)
    share = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    entropy = -torch.xlogy(share, share).sum(-1)
    return entropy.exp().where(values.any(-1), 0.0)
