"""The teacher follows the student."""

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def ema_update(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], momentum: int | float) -> None:
    """Move every named parameter of the teacher: teacher <- momentum * teacher + (1 - momentum) * student, in place.

    Parameters only: buffers, such as the running statistics of a batch norm, stay the teacher's own. No
    host synchronization; momentum 1 changes no bit. ValueError if names or shapes differ or a parameter is
    below float32, where steps of 1e-3 would be rounded away. Source: DINO (Caron et al. 2021), section 3.1.
    """
    if teacher.keys() != student.keys():
        raise ValueError(
            f"teacher and student differ in parameters: {sorted(teacher.keys() ^ student.keys())[:5]}"
        )
    for name, target in teacher.items():
        if target.shape != student[name].shape:
            raise ValueError(
                f"{name} is {tuple(target.shape)} in the teacher, {tuple(student[name].shape)} in the student"
            )
        if torch.finfo(target.dtype).bits < 32:
            raise ValueError(f"{name} of the teacher is {target.dtype}: an average needs float32")
    torch._foreach_lerp_(list(teacher.values()), [student[name] for name in teacher], 1.0 - momentum)
