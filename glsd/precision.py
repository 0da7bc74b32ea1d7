"""Where numbers are rounded: float32 or better by default, matrix products whose operands alone are rounded; none is NaN."""

import os
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from glsd.errors import UserError

Precision = Literal["no", "bf16"]  # float32, or bfloat16 autocast

# Values of ONEDNN_MAX_CPU_ISA, which limits the instructions that products use, without those for bfloat16.
WITHOUT_BF16 = (
    *("SSE41", "AVX", "AVX2", "AVX2_VNNI"),
    *("AVX512_MIC", "AVX512_MIC_4OPS", "AVX512_CORE", "AVX512_CORE_VNNI"),
)


def cpu_multiplies_bf16() -> bool:
    """Tell whether this CPU has instructions for bfloat16 products, and may use them.

    x86 has avx512_bf16 or amx_bf16, Arm has bf16. Other CPUs take four to seventy times as long as in float32.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")
    can = any(found and "bf16" in name for name, found in torch.cpu.get_capabilities().items())
    return can and limit.upper() not in WITHOUT_BF16


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return float32, or the dtype of ``tensor`` if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def widened(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or as it is if its dtype is wider."""
    return tensor.to(wide_dtype(tensor))


def operand_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of operands: autocast's, unless the tensor is wider than float32; without autocast the tensor's own."""
    kind = tensor.device.type
    rounds = torch.is_autocast_enabled(kind) and tensor.dtype.itemsize <= 4
    return torch.get_autocast_dtype(kind) if rounds else tensor.dtype


def operand(tensor: Float[Tensor, "a c"], dtype: torch.dtype) -> Float[Tensor, "a c"]:
    """Round to ``dtype``. CPUs then multiply the rounded numbers in the wide dtype, as tensor cores do."""
    rounded = tensor.to(dtype)
    return rounded if tensor.device.type == "cuda" else rounded.to(tensor.dtype)


def product(
    a: Float[Tensor, "a c"], b: Float[Tensor, "c d"], *, out: Float[Tensor, "a d"] | None = None
) -> Float[Tensor, "a d"]:
    """Return the product of two operands in float32 or better."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype.itemsize < 4 else torch.mm(a, b, out=out)


def add_product(total: Float[Tensor, "a d"], a: Float[Tensor, "a c"], b: Float[Tensor, "c d"]) -> None:
    """Add the product of two operands to ``total`` in place."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += product(a, b)


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError, with ``source`` and the first tensor by name, if a tensor holds NaN or infinity."""
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        first = tensors[bad[0]]
        more = f", and {len(bad) - 1} more such tensors" if len(bad) > 1 else ""
        raise UserError(
            f"{source}: tensor {bad[0]!r} holds NaN or infinity in {int((~first.isfinite()).sum())} of {first.numel()} numbers"
            f"{more}: the run that wrote it diverged or the file is damaged; use another one"
        )
