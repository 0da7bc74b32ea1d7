"""How a training process joins the others."""

import os
import warnings

import torch
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs

from glsd.cluster import dist
from glsd.cluster.interface import choose_interface

# What travels between ranks, by optim.grad_compression.
HOOKS = {"no": DDPCommunicationHookType.NO, "bf16": DDPCommunicationHookType.BF16}


def start(
    precision: str, script: str, *, static_graph: bool = False, grad_compression: str = "no"
) -> Accelerator:
    """Join the other ranks; only the student is given to accelerate, never the teacher or the loader.

    precision: 'no' or 'bf16'; script: named in the launch line that an error proposes; static_graph: every step uses the
    same parameters in the same way, which DDP learns from the first one; grad_compression: a key of HOOKS. Raises UserError
    if the launcher was asked for several processes but each runs alone.
    """
    choose_interface()
    # glsd.cluster.shutdown says who is lost; NCCL would end the process first, without a word.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    # accelerate knows the argument by its old name only.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    ddp = DistributedDataParallelKwargs(
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
        static_graph=static_graph,
        comm_hook=HOOKS[grad_compression],
    )
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision=precision, kwargs_handlers=[ddp]
    )
    dist.check_world(accelerator.num_processes, script)
    return accelerator
