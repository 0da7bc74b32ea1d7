"""What the forward of self-distillation takes: boxes stay on the host, the match is moved with the crops."""

import torch
from torch.distributed.utils import _recursive_to

from glsd.batches import CropBatch
from glsd.geometry import geometric_match


def test_what_moves_to_the_device():
    """CropBatch.to sends crops and match; DDP, which moves the tensors of a tuple to its device, leaves a Match alone."""
    crops, boxes = torch.zeros(2, 2, 3, 8, 8, dtype=torch.uint8), torch.rand(2, 2, 4, dtype=torch.float64)
    match = geometric_match([boxes, boxes], [8, 8], stride=4, hinge=True, hinge_factor=1.0)
    batch = CropBatch(
        global_crops=crops,
        local_crops=crops,
        global_boxes=boxes,
        local_boxes=boxes,
        global_photometric=torch.zeros(2, 2, 8),
        local_photometric=torch.zeros(2, 2, 8),
        match=match,
        indices=torch.zeros(2, dtype=torch.int64),
        keys=("a", "b"),
    ).to(torch.device("meta"))
    kinds = {name: value.device.type for name, value in vars(batch).items() if torch.is_tensor(value)}
    on_host = {name for name, kind in kinds.items() if kind == "cpu"}
    assert on_host == {"global_boxes", "local_boxes", "global_photometric", "local_photometric"}
    assert batch.match is not None
    assert batch.match.needed is not None
    assert batch.match.index.is_meta
    assert batch.match.weight.is_meta
    assert all(tensor.is_meta for tensor in batch.match.needed[:3])

    (moved,) = _recursive_to(  # type: ignore[call-overload]
        match, torch.device("meta"), use_side_stream_for_tensor_copies=False
    )
    assert moved is match
