"""How a training process joins the others."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from glsd.runtime import dist


def start(precision: str, script: str) -> Accelerator:
    """Join the other ranks; only the student is given to accelerate, never the teacher or the loader.

    precision: 'no' or 'bf16'; script: named in the launch line that an error proposes. Raises UserError if the launcher
    was asked for several processes but each runs alone.
    """
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision=precision, kwargs_handlers=[ddp]
    )
    dist.check_world(accelerator.num_processes, script)
    return accelerator
