"""RankMe follows its equation."""

import math

import numpy as np
import pytest
import torch

from glsd.metrics.effective_rank import rankme


def literal_rankme(features: np.ndarray) -> float:
    values = np.linalg.svd(features, compute_uv=False)
    p = values / np.abs(values).sum() + 1e-7
    return float(np.exp(-np.sum(p * np.log(p))))


def test_rankme_equals_its_equation():
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert rankme(features) == pytest.approx(literal_rankme(features.double().numpy()), rel=1e-10)


def test_rankme_counts_directions():
    q, _ = torch.linalg.qr(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).double())
    for rank in (1, 4, 16):
        # The equation's 1e-7 per direction keeps it a little off the whole number.
        assert rankme((q[:, :rank] @ torch.eye(rank, 16, dtype=torch.float64)) * 7) == pytest.approx(
            rank, rel=1e-4
        )


def test_rankme_of_constant_zero_and_bad_features():
    assert rankme(torch.ones(20, 5)) == pytest.approx(1.0, abs=1e-4)
    assert rankme(torch.zeros(20, 5)) == pytest.approx(1.0, abs=1e-4)
    assert math.isnan(rankme(torch.full((4, 2), math.nan)))
