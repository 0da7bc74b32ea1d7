"""Which parameters decay."""

from collections.abc import Iterable
from typing import Any

from torch.nn import Parameter


def param_groups(named_parameters: Iterable[tuple[str, Parameter]]) -> list[dict[str, Any]]:
    """Return two optimizer groups: weight matrices and the like, which decay, and biases and vectors, which
    do not.

    Each group has ``params``, ``names`` (same order) and ``decays`` (bool); the second also
    ``weight_decay`` 0, while the first takes the optimizer's value or a schedule's. Whatever has two
    dimensions or more and is not a bias decays, position embedding and class token included; parameters
    that need no gradient are left out; one that comes twice (a shared head) is taken once. Source: DINO
    (Caron et al. 2021), GLSD (arXiv 2207.14676).
    """
    decay: dict[str, Any] = {"params": [], "names": [], "decays": True}
    no_decay: dict[str, Any] = {"params": [], "names": [], "decays": False, "weight_decay": 0.0}
    seen: set[int] = set()
    for name, parameter in named_parameters:
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        is_bias = name.rsplit(".", 1)[-1] == "bias"
        group = no_decay if is_bias or parameter.ndim < 2 else decay
        group["params"].append(parameter)
        group["names"].append(name)
    return [decay, no_decay]
