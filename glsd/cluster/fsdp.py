"""Sharded training state (torch's FSDP2): each rank keeps 1/R of the rows of every parameter, gradient and moment.

Forward and backward pass see whole parameters, gathered block by block just in time. Everything else (clipping, optimizer,
teacher) works on plain tensors, this rank's rows: see ``local_parameters``. All functions take a plain module as well, of
which a rank holds everything. Functions that gather are collective calls for a sharded module: every rank makes them.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from glsd.cluster import dist
from glsd.cluster.dist import collective

Module = TypeVar("Module", bound=nn.Module)

# What gradients travel in, by optim.grad_compression; None = as they are.
REDUCED: dict[str, torch.dtype | None] = {"no": None, "bf16": torch.bfloat16}


# Of modules: this rank's part of the parameters. Of sharded ones: a copy without numbers.
_LOCAL: WeakKeyDictionary[nn.Module, dict[str, nn.Parameter]] = WeakKeyDictionary()
_BLUEPRINTS: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def shard(
    root: nn.Module,
    blocks: Iterable[nn.Module],
    *,
    grad_compression: str = "no",
    copied: Iterable[nn.Module] = (),
) -> None:
    """Shard the parameters of ``root`` over all ranks, in place; a single rank keeps everything.

    blocks: modules inside root whose parameters are gathered for their own forward and backward passes and given back
    after each; the parameters outside of blocks are gathered by a forward of root and stay until its backward pass has
    ended, or that of ``without_gradients``. grad_compression: a key of REDUCED. copied: modules inside root of which
    ``whole_copy`` will be asked. The modules are on the device already.
    """
    if dist.world_size() == 1:
        return
    for module in copied:
        without = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in module.parameters()}
        _BLUEPRINTS[module] = copy.deepcopy(module, without)
    device = next(root.parameters()).device
    mesh = init_device_mesh(device.type, (dist.world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=REDUCED[grad_compression], cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


@contextlib.contextmanager
def without_gradients(root: nn.Module) -> Iterator[None]:
    """Run forwards of ``root`` without any gradient; a sharded one lets go of its whole parameters at the end."""
    sharded = root if isinstance(root, FSDPModule) else None
    with torch.no_grad() if sharded else torch.inference_mode():  # which cannot gather shards
        yield
    if sharded:
        sharded.reshard()  # without a backward pass they would stay, and go stale


def gradient_sync(model: nn.Module, wanted: bool) -> contextlib.AbstractContextManager:
    """Average the gradients of the backward pass inside over ranks, or only add them up on this rank for later."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
    plain = wanted or not isinstance(model, DistributedDataParallel)
    return contextlib.nullcontext() if plain else model.no_sync()  # type: ignore[operator]


def local_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return each parameter by name, or its local shard (maybe empty) as a plain one that shares the module's memory."""
    if module not in _LOCAL:
        _LOCAL[module] = {name: _local(parameter) for name, parameter in module.named_parameters()}
    return _LOCAL[module]


def _local(parameter: nn.Parameter) -> nn.Parameter:
    sharded = isinstance(parameter, DTensor)
    return nn.Parameter(_rows(parameter), parameter.requires_grad) if sharded else parameter


def collect_gradients(module: nn.Module) -> None:
    """Move the gradients of a sharded module to its ``local_parameters``."""
    local = local_parameters(module)
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            local[name].grad = None if parameter.grad is None else _rows(parameter.grad)
            parameter.grad = None


def gather_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with whole tensors: rank 0's in host memory, gathered one after the other; the others' is empty.

    Of a plain module it is its state dict, on every rank.
    """
    state = module.state_dict()
    if not is_sharded(module):
        return state
    return _of_main({name: _to_main(tensor) for name, tensor in state.items()})


def load_state(module: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Fill module from a state dict with whole tensors, of which each rank takes its rows; names and shapes must fit."""
    if not is_sharded(module):
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
    if not is_sharded(module):
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
    if is_sharded(module):
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


def whole_copy(module: Module) -> Module:
    """Return a plain copy of a sharded module, whole on every rank, for uses that differ between ranks; a plain one itself."""
    if module not in _BLUEPRINTS:
        return module
    whole = {name: _here(tensor) for name, tensor in module.state_dict().items()}
    made = copy.deepcopy(_BLUEPRINTS[module])
    made.load_state_dict(whole, assign=True)
    return made  # type: ignore[return-value]


def is_sharded(module: nn.Module) -> bool:
    """Tell whether ``shard`` has sharded this module's parameters."""
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
