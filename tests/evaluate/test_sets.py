"""Every image exactly once, in the order of the data set, alone and on two ranks."""

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from glsd.batches import LabeledBatch
from glsd.errors import UserError
from glsd.evaluate.sets import embed

CPU = torch.device("cpu")


def forward(images):
    """A stand-in for a backbone whose feature tells which image it saw."""
    return images.mean(dim=(2, 3)) @ torch.eye(3)


def batch(indices):
    index = torch.tensor(indices)
    images = index.float().reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    return LabeledBatch(images=images, labels=index % 5, indices=index)


def test_sorts_by_index_and_drops_padding():
    found = embed(forward, [batch([4, 0, 2]), batch([3, -1]), batch([1, -1])], device=CPU)
    assert found.indices.tolist() == [0, 1, 2, 3, 4]
    assert found.features[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert found.labels.tolist() == [0, 1, 2, 3, 4]
    assert found.features.shape == (5, 3)


def test_indices_of_a_subset_keep_their_gaps():
    assert embed(forward, [batch([90, 30, 60])], device=CPU).indices.tolist() == [30, 60, 90]


def test_features_have_no_gradient_and_are_float32_under_autocast():
    layer = torch.nn.Linear(3, 3)
    found = embed(lambda x: layer(x.mean(dim=(2, 3))), [batch([0, 1])], device=CPU, precision="bf16")
    exact = embed(lambda x: layer(x.mean(dim=(2, 3))), [batch([0, 1])], device=CPU)
    assert not found.features.requires_grad
    assert found.features.dtype == torch.float32
    assert not torch.equal(found.features, exact.features)
    torch.testing.assert_close(found.features, exact.features, rtol=0.02, atol=0.02)


def test_an_image_that_comes_twice_is_a_bug_and_none_at_all_a_mistake():
    with pytest.raises(RuntimeError, match="1 images twice, the first is number 2"):
        embed(forward, [batch([0, 2]), batch([2, 1])], device=CPU)
    with pytest.raises(UserError, match="no images"):
        embed(forward, [], device=CPU)


def rank_main(rank, store, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = [[[0, 2], [4, -1]], [[1, 3], [-1, -1]]][rank]
    found = embed(forward, [batch(indices) for indices in mine], device=CPU)
    torch.save(tuple(found), f"{out}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_both_get_what_one_gets(tmp_path):
    torch.multiprocessing.spawn(rank_main, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    alone = embed(forward, [batch([0, 1, 2, 3, 4])], device=CPU)
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
