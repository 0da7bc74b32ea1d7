"""The teacher follows the student."""

import torch
from torch import nn


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: int | float) -> None:
    """Move every teacher parameter: teacher <- momentum * teacher + (1 - momentum) * student, in place.

    Parameters only: buffers, such as the running statistics of a batch norm, stay the teacher's own. No
    host synchronisation; momentum 1 changes no bit. ValueError if names or shapes differ or a parameter is
    below float32, where steps of 1e-3 would be rounded away. Source: DINO (Caron et al. 2021), section 3.1.
    """
    targets, sources = dict(teacher.named_parameters()), dict(student.named_parameters())
    if targets.keys() != sources.keys():
        raise ValueError(
            f"teacher and student differ in parameters: {sorted(targets.keys() ^ sources.keys())[:5]}"
        )
    for name, target in targets.items():
        if target.shape != sources[name].shape:
            raise ValueError(
                f"{name} is {tuple(target.shape)} in the teacher, {tuple(sources[name].shape)} in the student"
            )
        if torch.finfo(target.dtype).bits < 32:
            raise ValueError(f"{name} of the teacher is {target.dtype}: an average needs float32")
    torch._foreach_lerp_(list(targets.values()), [sources[name] for name in targets], 1.0 - momentum)
