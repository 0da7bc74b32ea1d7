"""Collectives alone and between two gloo processes."""

import sys

import pytest
import torch

from glsd.cluster import dist
from glsd.errors import UserError
from tests.helpers.ranks import run_ranks


def test_alone_everything_is_the_identity():
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    tensor = torch.arange(3.0)
    for function in (dist.all_reduce_sum, dist.all_reduce_mean, dist.all_reduce_max, dist.gather_rows):
        assert torch.equal(function(tensor), tensor)
    assert dist.gather_objects("a") == ["a"]
    assert dist.broadcast_object("a") == "a"
    dist.barrier()
    dist.leave()
    dist.raise_together(None)
    with pytest.raises(UserError, match="mistake"):
        dist.raise_together(UserError("mistake"))


@pytest.mark.slow
def test_two_ranks(tmp_path):
    outputs = run_ranks(
        """
        tensor = (torch.arange(6.0, dtype=torch.float64).reshape(2, 3) * (rank + 1)).T  # not contiguous
        tensor.requires_grad_()
        before = tensor.detach().clone()
        base = torch.arange(6.0, dtype=torch.float64).reshape(2, 3).T
        assert torch.equal(dist.all_reduce_sum(tensor), 3 * base)
        assert torch.equal(dist.all_reduce_mean(tensor), 1.5 * base)
        assert torch.equal(dist.all_reduce_max(tensor), 2 * base)
        assert torch.equal(tensor, before), "the input must stay as it was"
        assert dist.all_reduce_sum(torch.tensor([1, 2])).tolist() == [2, 4]

        rows = torch.full((rank * 2 + 1, 2), float(rank), requires_grad=True)  # 1 row, 3 rows
        assert dist.gather_rows(rows)[:, 0].tolist() == [0.0, 1.0, 1.0, 1.0]
        assert dist.gather_rows(torch.zeros(0 if rank else 2, 3, dtype=torch.int64)).shape == (2, 3)
        assert dist.gather_rows(torch.zeros(0, 3)).shape == (0, 3)
        dist.PIECE_BYTES = 17  # two rows of 8 bytes
        assert dist.gather_rows(rows + torch.arange(len(rows))[:, None])[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
        assert dist.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
        assert dist.broadcast_object(f"from {rank}") == "from 0"
        dist.barrier()

        for culprit in (0, 1):
            try:
                dist.raise_together(UserError(f"bad {culprit}") if rank == culprit else None)
            except UserError as error:
                print(error)
        """,
        tmp_path,
    )
    assert outputs == ["bad 0\nbad 1\n"] * 2


@pytest.mark.slow
def test_ddp_processes_end_with_exit_code_zero_every_time(tmp_path):
    for _ in range(3):
        run_ranks(
            """
            from torch.nn.parallel import DistributedDataParallel
            model = DistributedDataParallel(torch.nn.Linear(64, 64))
            for _ in range(3):
                model(torch.ones(2, 64)).sum().backward()
            """,
            tmp_path,
            python=sys.executable,  # which is torn down at the end: there it happened
        )
