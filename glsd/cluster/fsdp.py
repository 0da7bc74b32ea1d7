"""Training state in parts (torch's FSDP2): of every parameter, gradient and moment each rank keeps 1/R of the rows.

Forward and backward pass see whole parameters, block by block, gathered just in time. Everything else (clipping, optimizer,
teacher) works on plain tensors, this rank's rows, by ``own_parameters``. All functions take a plain module as well, of which
a rank owns everything; what gathers is a collective call for a module in parts: every rank makes it.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from glsd.cluster import dist
from glsd.cluster.dist import collective

Module = TypeVar("Module", bound=nn.Module)

# What gradients travel in, by optim.grad_compression; None = as they are.
REDUCED: dict[str, torch.dtype | None] = {"no": None, "bf16": torch.bfloat16}


def shard(root: nn.Module, blocks: Iterable[nn.Module], *, grad_compression: str = "no") -> None:
    """Cut the parameters of ``root`` into one part a rank, in place; not alone, where there is nothing to cut.

    blocks: modules inside root whose parameters are gathered for their own forward and backward passes and given back
    after each; the parameters outside of blocks are gathered by a forward of root and stay until its backward pass has
    ended, or that of ``without_gradients``. grad_compression: a key of REDUCED. The modules are on the device already.
    """
    if dist.world_size() == 1:
        return
    device = next(root.parameters()).device
    mesh = init_device_mesh(device.type, (dist.world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=REDUCED[grad_compression], cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


@contextlib.contextmanager
def without_gradients(root: nn.Module) -> Iterator[None]:
    """Run forwards of ``root`` without any gradient; its whole parameters, if it was in parts, are let go of at the end."""
    parted = root if isinstance(root, FSDPModule) else None
    with torch.no_grad() if parted else torch.inference_mode():  # which cannot gather parts
        yield
    if parted:
        parted.reshard()  # without a backward pass they would stay, and go stale


def synchronize_gradients(root: nn.Module, wanted: bool) -> None:
    """Say whether the next backward passes add up the gradients of all ranks, or keep this rank's whole ones for later."""
    if isinstance(root, FSDPModule):
        root.set_requires_gradient_sync(wanted)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return what this rank owns of each parameter, by name: the parameter itself, or its rows as a plain one, which may be
    none (the memory is shared: what changes here is what the next forward sees)."""
    return {
        name: nn.Parameter(_rows(parameter), requires_grad=parameter.requires_grad)
        if isinstance(parameter, DTensor)
        else parameter
        for name, parameter in module.named_parameters()
    }


def hand_over_gradients(module: nn.Module, own: Mapping[str, nn.Parameter]) -> None:
    """Move the gradients of a module in parts to its ``own_parameters``."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            own[name].grad = None if parameter.grad is None else _rows(parameter.grad)
            parameter.grad = None


def gather_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with whole tensors: rank 0's in host memory, gathered one after the other; the others' is empty.

    Of a plain module it is its state dict, on every rank.
    """
    state = module.state_dict()
    if not in_parts(module):
        return state
    return _of_main({name: _to_main(tensor) for name, tensor in state.items()})


def load_state(module: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Fill module from a state dict with whole tensors, of which each rank takes its rows; names and shapes must fit."""
    if not in_parts(module):
        module.load_state_dict(dict(whole))
        return
    with torch.no_grad():
        for name, target in module.state_dict().items():
            if isinstance(target, DTensor):
                _rows(target).copy_(rows_of(whole[name], target))
            else:
                target.copy_(whole[name])


def gather_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Any]:
    """Return the optimizer's state dict with whole moments, as gather_state does; its groups hold ``names`` of module's
    parameters."""
    packed = optimizer.state_dict()
    if not in_parts(module):
        return packed
    state = {}
    for number, (values, parameter) in _moments(packed, module).items():
        gathered = {
            key: _to_main(_whole(value, parameter)) if value.shape == _rows(parameter).shape else value.cpu()
            for key, value in values.items()
        }
        state[number] = _of_main(gathered)
    return {**packed, "state": state}


def load_optimizer(optimizer: torch.optim.Optimizer, packed: Mapping[str, Any], module: nn.Module) -> None:
    """Fill the optimizer from a state dict with whole moments, of which each rank takes its rows."""
    state = dict(packed["state"])
    if in_parts(module):
        for number, (values, parameter) in _moments(packed, module).items():
            state[number] = {
                key: rows_of(value, parameter).clone() if value.shape == parameter.shape else value
                for key, value in values.items()
            }
    optimizer.load_state_dict({**packed, "state": state})


def _moments(packed: Mapping[str, Any], module: nn.Module) -> dict[int, tuple[dict[str, Tensor], DTensor]]:
    """Return what an optimizer's state dict holds for each parameter, with the parameter, by its number there."""
    named: dict[str, Any] = dict(module.named_parameters())
    numbered = (
        pair for group in packed["param_groups"] for pair in zip(group["params"], group["names"], strict=True)
    )
    return {
        number: (packed["state"][number], named[name])
        for number, name in numbered
        if number in packed["state"]
    }


def blueprint(module: Module) -> Module:
    """Return a copy without the numbers (parameters on the meta device): take it before the module is cut into parts."""
    without = {id(p): nn.Parameter(p.to("meta"), requires_grad=p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, without)


def filled(plan: Module, module: Module) -> Module:
    """Return a plain copy of a module in parts, made after its ``blueprint``: whole on every rank, for uses that differ
    between ranks."""
    whole = {name: _here(tensor) for name, tensor in module.state_dict().items()}
    made = copy.deepcopy(plan)
    made.load_state_dict(whole, assign=True)
    return made


def in_parts(module: nn.Module) -> bool:
    """Tell whether ``shard`` has cut this module's parameters."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def rows_of(whole: Tensor, like: DTensor) -> Tensor:
    """Return the rows that this rank keeps: torch gives every rank as many, rounded up, and the last ones what is left."""
    each = -(-len(whole) // dist.world_size())
    rows = whole[dist.rank() * each : (dist.rank() + 1) * each]
    if rows.shape != _rows(like).shape:
        raise RuntimeError(
            f"torch keeps {tuple(_rows(like).shape)} of {tuple(like.shape)} here, not {tuple(rows.shape)}"
        )
    return rows


def _rows(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _full(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _whole(rows: Tensor, like: DTensor) -> DTensor:
    """See rows as this rank's part of a tensor of the shape of ``like``."""
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@collective
def _here(tensor: Tensor) -> Tensor:
    whole = _full(tensor)
    if whole.is_cuda:
        torch.cuda.synchronize()  # who waits for ever does so here
    return whole


@collective
def _to_main(tensor: Tensor) -> Tensor | None:
    """Return the whole tensor in rank 0's host memory, None on the others, which hold it for a moment."""
    whole = _full(tensor)
    if not dist.is_main():
        return None
    host = whole.cpu()  # maybe a view into padded memory, which would be written as well
    return host if host.untyped_storage().nbytes() == host.nbytes else host.clone()


def _of_main(named: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in named.items() if tensor is not None}
