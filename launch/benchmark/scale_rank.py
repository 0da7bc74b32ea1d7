"""One rank of the scale benchmark, started by it: counts what a step sends, times steps and the links between ranks."""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glsd.cluster import dist, fsdp, launch
from glsd.config.parse import load
from glsd.config.pretrain import PretrainConfig
from glsd.models.blocks import blocks_of
from glsd.pretrain.networks import State, build
from glsd.pretrain.plan import make_plan
from glsd.runtime.loop import Training
from glsd.runtime.meters import Meters
from glsd.runtime.run import Run
from launch.benchmark.step import (
    FLAGS,
    Clock,
    Setup,
    random_batch,
    take_step,
)
from launch.benchmark.tools import synchronize

# Names in torch's collectives -> kind, and which of the first two arguments holds the whole (not one rank's part).
KINDS = {
    "allreduce_": ("all-reduce", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
}
WARMUP_STEPS = 2
LINK_BYTES, LINK_ROUNDS = 2**24, 5


class Counted(TorchDispatchMode):
    """Counts calls and bytes (of the whole tensors) of every collective that passes by, whoever makes it."""

    def __init__(self):
        super().__init__()
        self.seen: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.overloadpacket.__name__
            kind, place = KINDS.get(name, (name, 0))
            tensors = [leaf for leaf in tree_leaves(args[place : place + 1]) if isinstance(leaf, Tensor)]
            entry = self.seen.setdefault(kind, [0, 0])
            entry[0] += 1
            entry[1] += sum(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))


def counted_step(setup: Setup) -> dict[str, dict[str, int]]:
    """Return calls and bytes by kind of one step of this rank."""
    # Compiled code would be entered without the mode.
    with Counted() as counter, torch.compiler.set_stance("force_eager"):
        take_step(setup)
    return {kind: {"calls": calls, "bytes": count} for kind, (calls, count) in counter.seen.items()}


def step_seconds(setup: Setup, rounds: int) -> list[float]:
    """Return the seconds of steps that all ranks begin together, each the slowest rank's."""
    own = []
    for _ in range(rounds):
        dist.barrier()
        synchronize(setup.training.accelerator.device)
        started = time.perf_counter()
        take_step(setup)
        synchronize(setup.training.accelerator.device)
        own.append(time.perf_counter() - started)
    return [max(each) for each in zip(*dist.gather_objects(own), strict=True)]


def backward_seconds(setup: Setup, rounds: int) -> float:
    """Return the seconds of a step's backward pass."""
    taken = []
    for _ in range(rounds):
        clock = Clock(setup.training.accelerator.device)
        original = setup.training.accelerator.backward
        setup.training.accelerator.backward = clock.around("backward", original)
        take_step(setup)
        setup.training.accelerator.backward = original
        taken.append(clock.seconds["backward"])
    return min(taken)


def links(device: torch.device) -> dict[str, dict[str, float]]:
    """Return by kind the seconds of a collective of next to nothing and of LINK_BYTES."""
    if dist.world_size() == 1:
        return {}

    def collectives(count: int) -> dict[str, Callable[[], Any]]:
        whole = torch.zeros(count, device=device)
        part = torch.zeros(count // dist.world_size(), device=device)
        return {
            "all-reduce": lambda: torch_dist.all_reduce(whole),
            "all-gather": lambda: torch_dist.all_gather_into_tensor(whole, part),
            "reduce-scatter": lambda: torch_dist.reduce_scatter_tensor(part, whole),
        }

    def seconds(call: Callable[[], Any]) -> float:
        taken = []
        for _ in range(LINK_ROUNDS + 1):
            dist.barrier()
            synchronize(device)
            started = time.perf_counter()
            call()
            synchronize(device)
            taken.append(time.perf_counter() - started)
        return max(dist.gather_objects(min(taken[1:])))

    count = LINK_BYTES // 4 // dist.world_size() * dist.world_size()
    small, large = collectives(dist.world_size()), collectives(count)
    return {
        kind: {"empty_s": seconds(small[kind]), "full_s": seconds(large[kind]), "bytes": 4 * count}
        for kind in small
    }


def kept_bytes(state: State) -> int:
    """Return the bytes of parameters, gradients, moments and teacher that this rank holds between steps."""
    moments = [
        value for values in state.optimizer.state.values() for value in values.values() if value.ndim > 0
    ]
    student, teacher = (list(fsdp.local_parameters(net).values()) for net in (state.student, state.teacher))
    gradients = [parameter for parameter in student if parameter.requires_grad]
    return sum(tensor.nbytes for tensor in [*student, *gradients, *moments, *teacher])


def sizes_of(cfg: PretrainConfig, state: State) -> dict[str, int]:
    """Return the numbers that the cost model counts with: parameters by place, and how often a step uses a block."""
    blocks = {id(p) for block in blocks_of(state.student.backbone.net) for p in block.parameters()}
    named = list(state.student.parameters())
    d = cfg.data
    return {
        "block_parameters": sum(p.numel() for p in named if id(p) in blocks),
        "parameters": sum(p.numel() for p in named),
        "trained": sum(p.numel() for p in named if p.requires_grad),
        "tensors": sum(p.requires_grad for p in named),
        "passes": 2 if d.num_local else 1,
        "logits": cfg.head.num_prototypes * (1 if cfg.matching == "none" else 2),
    }


def sent(interface: str) -> int:
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def measure(payload: dict[str, Any]) -> dict[str, Any]:
    """Build the run, take its steps, return what this rank found."""
    argv = [f"--{key}={payload[name]}" for name, key in FLAGS.items()]
    argv += [f"--{key}={value}" for key, value in payload["way"].items()]
    cfg = load(PretrainConfig, [*argv, "--data.shards=none"])
    accelerator = launch.start(
        cfg.optim.precision,
        "launch/benchmark",
        static_graph=True,
        grad_compression=cfg.optim.grad_compression,
    )
    plan = make_plan(cfg, cfg.optim.batch_size)
    state = build(cfg, accelerator)
    with tempfile.TemporaryDirectory() as folder:
        meters = Meters(Path(folder), total_steps=1, start_step=0, device=accelerator.device)
        with contextlib.closing(meters):
            training = Training(
                cfg=cfg,
                plan=plan,
                state=state,
                run=Run(Path(folder)),
                accelerator=accelerator,
                meters=meters,
            )
            setup = Setup(training, random_batch(cfg, state, plan.rank_images))
            for _ in range(WARMUP_STEPS):
                take_step(setup)
            found: dict[str, Any] = {
                "counted": counted_step(setup),
                "seconds": step_seconds(setup, payload["rounds"]),
                "links": links(accelerator.device),
                "sizes": sizes_of(cfg, state),
                "kept_bytes": dist.gather_objects(kept_bytes(state)),
            }
            if dist.world_size() == 1:
                found["backward_s"] = backward_seconds(setup, payload["rounds"])
            if payload.get("interface"):
                dist.barrier()
                before = sent(payload["interface"])
                for _ in range(payload["rounds"]):
                    take_step(setup)
                found["sent_bytes"] = (sent(payload["interface"]) - before) / payload["rounds"]
    return found


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    torch.set_num_threads(asked["threads"])
    answer = measure(asked)
    if dist.is_main() or asked.get("interface"):
        print(json.dumps(answer), flush=True)
    dist.leave()
