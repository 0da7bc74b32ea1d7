"""The EMA center, and Sinkhorn-Knopp in its textbook form."""

import math

import pytest
import torch

from glsd.losses import center as module
from glsd.losses.center import ema_center, sinkhorn_center


def textbook_sinkhorn(logits, temp, iterations):
    """Scale columns to rows/k and rows to 1 in turn, on the matrix itself."""
    q = torch.exp(logits / temp)
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True) * (len(q) / q.shape[1])
        q = q / q.sum(1, keepdim=True)
    return q


def center_of(logits, **options):
    """With one prototype along every axis a vector is its own logits."""
    return sinkhorn_center(logits, torch.eye(logits.shape[1], dtype=logits.dtype), **options)


def logits_of(r=12, k=5, seed=0):
    return torch.randn(r, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_ema_center():
    center, mean = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0])
    torch.testing.assert_close(ema_center(center, mean, 0.9), torch.tensor([1.2, -1.4]))
    assert torch.equal(center, torch.tensor([1.0, -2.0]))


def test_ema_center_keeps_float32_from_half_precision_means():
    assert ema_center(torch.zeros(2), torch.ones(2, dtype=torch.bfloat16), 0.9).dtype == torch.float32
    assert ema_center(torch.zeros(2).double(), torch.ones(2), 0.9).dtype == torch.float64


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_is_the_textbook_one(iterations):
    logits = logits_of()
    center = center_of(logits, teacher_temp=0.3, iterations=iterations)
    got = torch.softmax((logits - center) / 0.3, 1)
    torch.testing.assert_close(got, textbook_sinkhorn(logits, 0.3, iterations), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("rows", [1, 5, 12])
def test_sinkhorn_a_few_rows_at_a_time(monkeypatch, rows):
    """Twelve rows in chunks, the last one shorter, and real prototypes."""
    vectors, prototypes = logits_of(12, 3), logits_of(5, 3, seed=1)
    whole = sinkhorn_center(vectors, prototypes, teacher_temp=0.3, iterations=3)
    monkeypatch.setattr(module, "SINKHORN_BUDGET", rows * module.COPIES * 8 * 5)
    parts = sinkhorn_center(vectors, prototypes, teacher_temp=0.3, iterations=3)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(whole, center_of(vectors @ prototypes.T, teacher_temp=0.3, iterations=3))


def test_sinkhorn_uses_all_prototypes_alike():
    logits = logits_of() + torch.tensor([5.0, 0, 0, 0, 0])  # everything prefers prototype 0
    probabilities = torch.softmax((logits - center_of(logits, teacher_temp=0.5, iterations=200)) / 0.5, 1)
    torch.testing.assert_close(
        probabilities.sum(0), torch.full((5,), 12 / 5, dtype=torch.float64), rtol=1e-8, atol=0
    )


def test_sinkhorn_fixed_point_of_a_balanced_matrix_is_zero():
    """A matrix whose softmax is balanced already needs no center: all entries of the center are equal."""
    center = center_of(torch.eye(4).double(), teacher_temp=0.2, iterations=3)
    torch.testing.assert_close(center, center[:1].expand(4))


def test_sinkhorn_survives_small_temperatures_in_float32():
    """exp(1 / 0.005) overflows float32; the log domain does not."""
    logits = torch.nn.functional.normalize(logits_of(64, 32), dim=1)
    narrow = center_of(logits.float(), teacher_temp=0.005, iterations=3)
    wide = center_of(logits, teacher_temp=0.005, iterations=3)
    assert math.isfinite(narrow.abs().max())
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=1e-5)


def test_sinkhorn_permutes_with_prototypes_and_not_with_rows():
    logits = logits_of()
    center = center_of(logits, teacher_temp=0.3, iterations=3)
    rows, columns = torch.randperm(12), torch.randperm(5)
    torch.testing.assert_close(center_of(logits[rows], teacher_temp=0.3, iterations=3), center)
    torch.testing.assert_close(center_of(logits[:, columns], teacher_temp=0.3, iterations=3), center[columns])


def _rank(rank, folder, logits, results):
    import torch.distributed as torch_dist

    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    share = logits[:5] if rank == 0 else logits[5:]  # unequal numbers of rows
    results[rank] = center_of(share, teacher_temp=0.3, iterations=3)
    torch_dist.barrier()
    torch_dist.destroy_process_group()


@pytest.mark.slow
def test_sinkhorn_over_two_ranks_is_that_of_all_rows(tmp_path):
    logits = logits_of()
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_rank, (str(tmp_path), logits, results), nprocs=2)
        expected = center_of(logits, teacher_temp=0.3, iterations=3)
        for rank in range(2):
            torch.testing.assert_close(results[rank], expected)
