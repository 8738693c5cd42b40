"""Effective rank against known spectra."""

from __future__ import annotations

import math

import pytest
import torch

from cache2cache.analysis.effective_rank import effective_rank, gram, singular_values


def matrix(values: list[float], rows: int = 50, seed: int = 0) -> torch.Tensor:
    """A matrix (rows, len(values)) with these singular values."""
    generator = torch.Generator().manual_seed(seed)

    def basis(size: int) -> torch.Tensor:
        square = torch.randn(size, size, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(square).Q

    left, right = basis(rows)[:, : len(values)], basis(len(values))
    return left * torch.tensor(values, dtype=torch.float64) @ right


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ([3.0] * 8, 8.0),
        ([3.0] * 5 + [0.0] * 3, 5.0),
        ([7.0] + [0.0] * 9, 1.0),
        ([2.0, 1.0, 1.0], math.exp(0.5 * math.log(2) + 0.5 * math.log(4))),
        ([1e6, 1e6, 1.0], 2.0 + 1.5e-5),
    ],
)
def test_known_spectra(values, rank):
    got = effective_rank(gram(matrix(values))).item()
    assert got == pytest.approx(rank, abs=1e-4)


def test_geometric_spectrum():
    values = [0.7**k for k in range(20)]
    share = torch.tensor(values, dtype=torch.float64)
    share /= share.sum()
    expected = torch.distributions.Categorical(share).entropy().exp().item()
    assert effective_rank(gram(matrix(values))).item() == pytest.approx(expected, abs=1e-4)


def test_many_zero_directions_count_nothing():
    rows = matrix([5.0, 5.0, 5.0]).float() @ torch.eye(3, 1024)
    assert effective_rank(gram(rows)).item() == pytest.approx(3.0, abs=1e-4)


def test_pieces_are_the_whole_and_scale_does_not_matter():
    rows = torch.randn(2, 90, 12, generator=torch.Generator().manual_seed(1))
    pieces = sum(gram(piece) for piece in rows.split(17, dim=1))
    whole = effective_rank(gram(rows))
    assert whole.shape == (2,)
    torch.testing.assert_close(effective_rank(pieces), whole)
    torch.testing.assert_close(effective_rank(gram(rows * 1e3)), whole)
    torch.testing.assert_close(singular_values(pieces), torch.linalg.svdvals(rows.double()).flip(-1))


def test_nothing_has_rank_zero():
    assert effective_rank(torch.zeros(4, 4)).item() == 0.0
