"""Compiled and checkpointed blocks against plain ones; the number of graphs; the memory kept for the backward pass."""

import inspect
import shutil

import pytest
import torch
from timm.models.eva import Eva
from torch._dynamo.testing import CompileCounterWithBackend

from glsd.models import drop_path
from glsd.models.backbone import Backbone, build_backbone
from glsd.models.blocks import compile_blocks

SMALL = {"patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 2}
VIT, EVA = "vit_tiny_patch16_224", "vit_small_patch16_dinov3"


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch):
    """Blocks without the tests' run-time type checks: those read where in a forward pass they are, and graphs depend on it."""
    for owner in (drop_path, drop_path._Skipping, *drop_path.SKIPPING.values()):
        for name in ("forward", "_attend", "_mix", "_add"):
            if name in vars(owner):
                monkeypatch.setattr(owner, name, inspect.unwrap(vars(owner)[name]))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(name: str = VIT, **options) -> Backbone:
    return build_backbone(name, **{"image_size": 32, "timm_args": SMALL, "seed": 1, **options})


def step(backbone: Backbone, seed: int, rows: int = 8) -> list[torch.Tensor]:
    """Outputs for two crop sizes and all gradients; an own draw of dropped rows per seed."""
    torch.manual_seed(seed)
    crops = [torch.randn(rows, 3, 32, 32), torch.randn(2 * rows, 3, 16, 16)]
    backbone.zero_grad()
    outputs = [features for images in crops for features in backbone(images)]
    torch.stack([features.pow(3).mean() for features in outputs]).sum().backward()
    return [
        *(features.detach() for features in outputs),
        *(p.grad for p in backbone.parameters() if p.grad is not None),
    ]


def assert_equal_steps(
    one: Backbone, other: Backbone, seeds=range(4), rows: int = 8, tolerance: float = 1e-5
):
    for seed in seeds:
        first, second = step(one, seed, rows), step(other, seed, rows)
        assert len(first) == len(second) > 30
        for ours, theirs in zip(first, second, strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max())
            )


@pytest.mark.slow
@pytest.mark.parametrize("name", [VIT, EVA])
@pytest.mark.parametrize("drop_path", [0.0, 0.7])
def test_compiled_blocks_share_a_graph_per_resolution(name, drop_path):
    """Per resolution one for blocks without and one for blocks with dropped rows, however many are kept; one of the teacher."""
    student, teacher, plain = make(name, drop_path=drop_path), make(name), make(name, drop_path=drop_path)
    teacher.eval().requires_grad_(False)
    counter = CompileCounterWithBackend("eager")
    names = list(student.state_dict())
    for backbone in (student, teacher):
        compile_blocks(backbone.net, counter)
    assert list(student.state_dict()) == names
    images = torch.randn(8, 3, 32, 32)
    for seed in range(4):
        with torch.no_grad():
            assert torch.equal(teacher(images)[0], make(name).eval()(images)[0])
        assert_equal_steps(student, plain, [seed])
    assert counter.frame_count == (2 if drop_path == 0 else 4) + 1


@pytest.mark.parametrize("rows", [1, 2])
def test_tiny_batches_compile_too(rows):
    student, plain = make(drop_path=0.9), make(drop_path=0.9)
    counter = CompileCounterWithBackend("eager")
    compile_blocks(student.net, counter)
    assert_equal_steps(student, plain, rows=rows)
    assert counter.frame_count <= 5


def test_swin_and_cnns_are_left_alone():
    backbone = build_backbone("resnet10t", image_size=64)
    compile_blocks(backbone.net, "a backend that does not exist")
    assert backbone(torch.randn(2, 3, 64, 64))[0].shape == (2, 512)


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_inductor_gives_equal_numbers(checkpointing):
    student, plain = make(drop_path=0.5, checkpointing=checkpointing), make(drop_path=0.5)
    counter = CompileCounterWithBackend("inductor")
    compile_blocks(student.net, counter)
    assert_equal_steps(student, plain, tolerance=1e-4)
    assert counter.frame_count == 4


@pytest.mark.parametrize("name", [VIT, EVA])
@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_checkpointing_changes_no_gradient(name, backend):
    extra = {"attn_drop_rate": 0.2} if backend is None and name == VIT else {}  # dropout repeats its draws
    options = {"drop_path": 0.5, "timm_args": SMALL | extra}
    student, plain = make(name, checkpointing=True, **options), make(name, **options)
    if backend is None:
        for seed in range(3):
            assert all(
                torch.equal(*pair) for pair in zip(step(student, seed), step(plain, seed), strict=True)
            )
    else:
        compile_blocks(student.net, backend)
        assert_equal_steps(student, plain, range(2), tolerance=1e-6)


def kept_bytes(backbone: Backbone) -> int:
    """Bytes that autograd keeps of a forward pass for the backward pass, parameters apart."""
    own = {parameter.data_ptr() for parameter in backbone.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.randn(8, 3, 32, 32)
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = backbone(images)
    assert out[0].requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("name", [VIT, EVA, "swin_tiny_patch4_window7_224"])
def test_checkpointing_keeps_less(name):
    swin = {"depths": [1, 1, 1, 4], "embed_dim": 12, "num_heads": [1, 1, 2, 2], "window_size": 2}
    args = {"timm_args": swin if "swin" in name else SMALL, "image_size": 32 if "swin" not in name else 64}
    full, small = (kept_bytes(make(name, **args, checkpointing=on)) for on in (False, True))
    assert small < (0.75 if "swin" in name else 0.4) * full, (small, full)


def test_dropped_rows_keep_less_as_well():
    assert kept_bytes(make(drop_path=0.9)) < 0.8 * kept_bytes(make())


@pytest.mark.parametrize("name", [VIT, EVA])
def test_blocks_use_fused_attention(name):
    backbone = make(name, drop_path=0.1)
    assert isinstance(backbone.net, Eva) == (name == EVA)
    assert all(block.attn.fused_attn for block in backbone.net.blocks)
