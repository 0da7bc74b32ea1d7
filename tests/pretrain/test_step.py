"""The step queues work without waiting for the device: on the meta device, where a tensor has no value, waiting fails.

Every tensor on the compute device is a meta tensor here, so ``.item()``, ``bool()``, ``nonzero``, masks as indices, ``unique``,
``.cpu()`` and the like raise by themselves, in the backward pass as well; host tensors (photometric plans, drawn rows, boxes that
stay on the host) are real and may be read. Copies to the device that would wait, because they are not asked to be
asynchronous, are counted by a dispatch mode. What a GPU has and the meta device lacks is replaced by name, in ``meta_device``.
"""

import contextlib

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

import glsd.pretrain.objective
import glsd.pretrain.step as story
from glsd.config.parse import load
from glsd.config.pretrain import PretrainConfig
from glsd.data import photometric
from glsd.pretrain.networks import State, build
from glsd.pretrain.plan import make_plan, rates_at
from glsd.pretrain.train import make_batches
from glsd.runtime.loop import Training
from glsd.runtime.meters import Meters
from glsd.runtime.run import Run
from glsd.shards.store import open_shards

META = torch.device("meta")


class Waits(TorchDispatchMode):
    """Lists the copies between host and device that would wait."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []
        self.uploads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        source, target = self.copy_of(func, args, kwargs)
        if source is not None and source != target:
            self.uploads += 1
            if not (
                kwargs.get("non_blocking")
                or (func.overloadpacket is torch.ops.aten.copy_ and args[2:3] == (True,))
            ):
                self.seen.append(f"{func} from {source} to {target}")
        return func(*args, **kwargs)

    @staticmethod
    def copy_of(func, args, kwargs):
        if func.overloadpacket is torch.ops.aten._to_copy:
            return args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type
        if func.overloadpacket is torch.ops.aten.copy_:
            return args[1].device.type, args[0].device.type
        return None, None


class PlainAdamW(torch.optim.AdamW):
    """Stands in for torch's fused kernel, which also reads found_inf on the device; this one's step counts are host tensors."""

    def __init__(self, groups, **options):
        super().__init__(groups, **{**options, "fused": False})

    def step(self, closure=None):
        assert self.__dict__.pop("found_inf").device == META
        return super().step(closure)


@pytest.fixture
def meta_device(monkeypatch):
    """Let the meta device stand for the GPU; each line is something that waits for nobody on a GPU and is missing here."""
    real_autocast, real_enabled, real_tensor = torch.autocast, torch.is_autocast_enabled, torch.tensor
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda kind, **options: (
            contextlib.nullcontext() if kind == "meta" else real_autocast(kind, **options)
        ),
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and real_enabled(kind))
    monkeypatch.setattr(torch.optim, "AdamW", PlainAdamW)
    # made on the host and copied, which waits; for the meta device torch leaves the copy out
    monkeypatch.setattr(
        torch, "tensor", lambda data, device=None, **options: real_tensor(data, **options).to(device)
    )
    # pins its memory on a GPU, which needs one
    monkeypatch.setattr(photometric, "_upload", lambda host, device: host.to(device, non_blocking=True))
    monkeypatch.setattr(Accelerator, "device", property(lambda self: META))


def take_steps(argv, folder, count=2) -> tuple[Waits, Meters, State]:
    cfg = load(PretrainConfig, argv)
    accelerator = Accelerator(cpu=True)
    shards = open_shards(cfg.data.shards)
    plan = make_plan(cfg, len(shards))
    state = build(cfg, accelerator)
    batches = make_batches(cfg, state, shards)
    waits = Waits()
    with contextlib.closing(Meters(folder, total_steps=count, start_step=0, device=META)) as meters:
        t = Training(cfg=cfg, plan=plan, state=state, run=Run(folder), accelerator=accelerator, meters=meters)
        for _ in range(count):
            with waits:
                story.train_step(t, rates_at(cfg, plan, state.step), batches)
            state.step += 1
    return waits, meters, state


@pytest.mark.parametrize("matching", ["none", "geometric", "similarity", "both"])
def test_a_step_does_not_wait_for_the_device(tiny_run, tmp_path, meta_device, matching):
    waits, meters, state = take_steps(
        tiny_run(matching=matching, model__drop_path=0.3, optim__freeze_prototypes_epochs=0), tmp_path
    )
    assert waits.seen == []
    assert waits.uploads >= 4, "the mode has not even seen the crops"
    assert meters._counts["loss"] == 2
    assert all(isinstance(value, torch.Tensor) and value.device == META for value in meters._sums.values())
    assert {parameter.device.type for parameter in state.student.parameters()} == {"meta"}


@pytest.mark.parametrize(
    "options",
    [
        {"optim__micro_batch": 2, "loss__centering": "sinkhorn", "optim__clip_mode": "global"},
        {"model__activation_checkpointing": "true", "head__shared": "true", "head__trainable_gain": "true"},
        {"data__num_local": 0, "loss__local_mean": "accepted", "optim__clip_grad": 0.0},
        {"matching": "none", "loss__koleo_weight": 0.1},
    ],
    ids=["accumulated", "checkpointed", "accepted", "koleo"],
)
def test_nor_does_it_with_other_options(tiny_run, tmp_path, meta_device, options):
    waits, _, _ = take_steps(tiny_run(model__drop_path=0.3, **options), tmp_path, count=1)
    assert waits.seen == []


READS = {
    "item": lambda loss: loss.item(),
    "mask": lambda loss: loss[None][loss[None] > 0],
    "cpu": lambda loss: loss.cpu(),
    "unique": lambda loss: torch.unique(loss[None]),
    "equal": lambda loss: torch.equal(loss, loss + 1),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_a_step_that_waits_is_found_out(tiny_run, tmp_path, meta_device, monkeypatch, read):
    notes = []

    def and_read(outs, shares):
        notes.append("before")
        read(outs[0].total)
        notes.append("after")
        return glsd.pretrain.objective.step_values(outs, shares)

    monkeypatch.setattr(story, "step_values", and_read)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        take_steps(tiny_run(), tmp_path, count=1)
    assert notes == ["before"]


def test_a_copy_that_waits_is_found_out(tiny_run, tmp_path, meta_device, monkeypatch):
    def and_copy(outs, shares):
        torch.tensor([1.0, 2.0], device=outs[0].total.device)
        torch.ones(2).to(outs[0].total.device)
        return glsd.pretrain.objective.step_values(outs, shares)

    monkeypatch.setattr(story, "step_values", and_copy)
    waits, _, _ = take_steps(tiny_run(), tmp_path, count=1)
    assert len(waits.seen) == 2, waits.seen
