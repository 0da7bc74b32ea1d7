"""What the forward of self-distillation takes: boxes stay on the host, whatever wraps the module."""

import torch
from torch.distributed.utils import _recursive_to

from glsd.batches import CropBatch
from glsd.pretrain.objective import Pixels


def test_boxes_stay_on_the_host():
    """CropBatch.to sends crops only, and DDP, which moves the tensors of a tuple to its device, leaves Pixels alone."""
    crops, boxes = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.float64)
    batch = CropBatch(
        global_crops=crops,
        local_crops=crops,
        global_boxes=boxes,
        local_boxes=boxes,
        global_photometric=torch.zeros(4, 8),
        local_photometric=torch.zeros(4, 8),
        indices=torch.zeros(2, dtype=torch.int64),
        keys=("a", "b"),
    ).to(torch.device("meta"))
    kinds = {name: value.device.type for name, value in vars(batch).items() if torch.is_tensor(value)}
    on_host = {name for name, kind in kinds.items() if kind == "cpu"}
    assert on_host == {"global_boxes", "local_boxes", "global_photometric", "local_photometric"}

    pixels = Pixels(
        global_crops=crops.float(), local_crops=crops.float(), global_boxes=boxes, local_boxes=boxes
    )
    (moved,) = _recursive_to(  # type: ignore[call-overload]
        pixels, torch.device("meta"), use_side_stream_for_tensor_copies=False
    )
    assert moved is pixels
    ((moved_boxes,),) = _recursive_to((boxes,), torch.device("meta"), use_side_stream_for_tensor_copies=False)
    assert moved_boxes.is_meta  # what would happen to a tuple
