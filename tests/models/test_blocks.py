"""Compiled and checkpointed blocks against plain ones; the number of graphs; the memory kept for the backward pass."""

import copy
import inspect
import shutil

import pytest
import torch
from timm.layers import DropPath
from timm.models.eva import Eva
from torch._dynamo.testing import CompileCounterWithBackend

from glsd.models.backbone import Backbone, build_backbone
from glsd.models.blocks import _SharedDropPath, compile_blocks, run_uncompiled

SMALL = {"patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 2}
VIT, EVA = "vit_tiny_patch16_224", "vit_small_patch16_dinov3"


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch):
    """Blocks without the tests' run-time type checks: those read where in a forward pass they are, and graphs depend on it."""
    monkeypatch.setattr(_SharedDropPath, "forward", inspect.unwrap(_SharedDropPath.forward))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(name: str = VIT, **options) -> Backbone:
    return build_backbone(name, **{"image_size": 32, "timm_args": SMALL, "seed": 1, **options})


def step(backbone: Backbone, seed: int, rows: int = 8) -> list[torch.Tensor]:
    """Outputs for two crop sizes and all gradients; every seed drops other rows."""
    torch.manual_seed(seed)
    crops = [torch.randn(rows, 3, 32, 32), torch.randn(2 * rows, 3, 16, 16)]
    backbone.zero_grad()
    outputs = [features for images in crops for features in backbone(images)]
    torch.stack([features.pow(3).mean() for features in outputs]).sum().backward()
    return [
        *(features.detach() for features in outputs),
        *(p.grad for p in backbone.parameters() if p.grad is not None),
    ]


def assert_equal(first: list[torch.Tensor], second: list[torch.Tensor], tolerance: float = 1e-5):
    assert len(first) == len(second) > 30
    for ours, theirs in zip(first, second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


def assert_compiled_is_eager(backbone: Backbone, seeds=range(4), rows: int = 8, tolerance: float = 1e-5):
    for seed in seeds:
        compiled = [tensor.clone() for tensor in step(backbone, seed, rows)]
        with run_uncompiled():
            assert_equal(compiled, step(backbone, seed, rows), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", [VIT, EVA])
@pytest.mark.parametrize("drop_path", [0.0, 0.7])
def test_compiled_blocks_share_a_graph_per_resolution(name, drop_path):
    """Per resolution one without and one with stochastic depth, whatever the rate; one of the teacher."""
    student, teacher = make(name, drop_path=drop_path), make(name)
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
        assert_compiled_is_eager(student, [seed])
    assert counter.frame_count == (2 if drop_path == 0 else 4) + 1


@pytest.mark.parametrize("rows", [1, 2])
def test_tiny_batches_compile_too(rows):
    student = make(drop_path=0.9)
    counter = CompileCounterWithBackend("eager")
    compile_blocks(student.net, counter)
    assert_compiled_is_eager(student, rows=rows)
    assert counter.frame_count <= 5


def test_compiled_blocks_drop_rows_as_timm_does():
    torch.manual_seed(0)
    x = torch.randn(4000, 3, 2, dtype=torch.float64)
    ours, timms = _SharedDropPath(0.3, x.device), DropPath(0.3)
    for module in (ours, timms):
        scale = module(x) / x
        assert scale.std(dim=(1, 2)).max() < 1e-6  # a row is dropped or kept as a whole
        kept = scale[:, 0, 0] > 0
        torch.testing.assert_close(scale[kept], torch.full_like(scale[kept], 1 / 0.7), rtol=1e-6, atol=0)
        assert abs(float(kept.double().mean()) - 0.7) < 5 * (0.3 * 0.7 / 4000) ** 0.5
    assert torch.equal(ours.eval()(x), x)
    assert ours(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", [VIT, EVA])
def test_draws_follow_the_seed_and_evaluation_drops_nothing(name):
    plain, dropping = make(name), make(name, drop_path=0.6)
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(2))

    def train_output(backbone, seed):
        torch.manual_seed(seed)
        return backbone.train()(images)[0].detach()

    assert torch.equal(train_output(dropping, 0), train_output(copy.deepcopy(dropping), 0))
    assert not torch.equal(train_output(dropping, 0), train_output(dropping, 1))
    assert torch.equal(dropping.eval()(images)[0], plain.eval()(images)[0])


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
    student = make(drop_path=0.5, checkpointing=checkpointing)
    counter = CompileCounterWithBackend("inductor")
    compile_blocks(student.net, counter)
    with torch._inductor.config.patch(fallback_random=True):  # its own generator draws other rows
        assert_compiled_is_eager(student, tolerance=1e-4)
    assert counter.frame_count == 4


@pytest.mark.parametrize("name", [VIT, EVA])
@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_checkpointing_changes_no_gradient(name, backend):
    extra = {"attn_drop_rate": 0.2} if backend is None and name == VIT else {}  # dropout repeats its draws
    options = {"drop_path": 0.5, "timm_args": SMALL | extra}
    student, plain = make(name, checkpointing=True, **options), make(name, **options)
    if backend is not None:
        for backbone in (student, plain):
            compile_blocks(backbone.net, backend)
    for seed in range(3):
        first, second = step(student, seed), step(plain, seed)
        if backend is None:
            assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
        else:
            assert_equal(first, second, tolerance=1e-6)


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


@pytest.mark.parametrize("name", [VIT, EVA])
def test_blocks_use_fused_attention(name):
    backbone = make(name, drop_path=0.1)
    assert isinstance(backbone.net, Eva) == (name == EVA)
    assert all(block.attn.fused_attn for block in backbone.net.blocks)
