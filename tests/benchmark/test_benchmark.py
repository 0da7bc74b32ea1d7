"""The benchmarks at toy sizes: the textbook agrees with ours, tables and JSON are whole, the picture is written."""

import json
import math
from types import CodeType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from glsd.errors import UserError, nearest, pick
from glsd.losses.distill import global_loss, local_loss
from glsd.packing.write import pack_samples
from launch.benchmark import floor as benchmark_floor
from launch.benchmark import loss as benchmark_loss
from launch.benchmark import main as benchmark
from launch.benchmark import road as benchmark_road
from launch.benchmark import step as benchmark_step
from launch.benchmark import sweep as benchmark_sweep
from launch.benchmark import tools as benchmark_tools
from launch.benchmark.data import jpeg
from launch.benchmark.plain import plain_global_loss, plain_local_loss
from tests.helpers.usual_spec import usual_spec

SIZES = {
    "batch": 2,
    "global_size": 64,
    "local_size": 32,
    "local_crops": 3,
    "prototypes": 40,
    "bottleneck": 8,
    "precision": "no",
    "fuse": False,
    "threads": 1,
}
SMALL_LOSS = [f"--{name}={value}" for name, value in SIZES.items() if name != "fuse"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads_of_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_other_processes(monkeypatch):
    """A memory measurement takes a process of its own, seconds of imports: here they return a number at once."""
    for module in (benchmark_loss, benchmark_step):
        monkeypatch.setattr(module, "in_own_process", lambda *_: {"mib": 2.0})


def run(capsys, *argv: str) -> tuple[dict, str]:
    """Return the JSON of the last line and all that was printed."""
    benchmark.main(list(argv))
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


def assert_numbers(tree: dict, *keys: str) -> None:
    for key in keys:
        values = tree[key].values() if isinstance(tree[key], dict) else [tree[key]]
        assert values, key
        assert all(math.isfinite(value) and value > 0 for value in values), (key, tree[key])


def in_double(inputs: benchmark_loss.Inputs) -> benchmark_loss.Inputs:
    def leaf(tensor, gradient):
        return F.normalize(tensor.detach().double(), dim=-1).requires_grad_(gradient)

    return inputs._replace(
        student=[leaf(group, True) for group in inputs.student],
        teacher=leaf(inputs.teacher, False),
        student_prototypes=leaf(inputs.student_prototypes, True),
        teacher_prototypes=leaf(inputs.teacher_prototypes, False),
        center=inputs.center.double(),
    )


@pytest.mark.parametrize("local_crops", [0, 3])
def test_the_textbook_equals_ours_on_patches(local_crops):
    inputs = in_double(benchmark_loss.make_inputs({**SIZES, "local_crops": local_crops}, CPU))
    found = []
    for function in (local_loss, plain_local_loss):
        result = function(
            *inputs[:4],
            matches=benchmark_loss.match(inputs),
            center=inputs.center,
            student_temp=0.1,
            teacher_temp=0.04,
        )
        gradients = torch.autograd.grad(result.loss, [*inputs.student, inputs.student_prototypes])
        found.append((result.loss, result.teacher_mean, result.matched_share, *gradients))
    assert 0 < found[0][2] < 1  # some patches are rejected, some are not
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


def test_the_textbook_equals_ours_on_images():
    generator = torch.Generator().manual_seed(0)
    student, teacher, prototypes, teacher_prototypes = (
        F.normalize(torch.randn(*shape, generator=generator), dim=-1)
        for shape in ((5, 3, 8), (2, 3, 8), (20, 8), (20, 8))
    )
    leaves = [student.requires_grad_(), prototypes.requires_grad_()]
    found = []
    for function in (global_loss, plain_global_loss):
        result = function(
            student,
            teacher,
            prototypes,
            teacher_prototypes,
            center=torch.linspace(-0.1, 0.1, 20),
            student_temp=0.1,
            teacher_temp=0.04,
        )
        found.append((result.loss, result.teacher_mean, *torch.autograd.grad(result.loss, leaves)))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_the_floor_multiplies_what_the_loss_needs():
    """Both layouts leave the same gradient products behind: G P and G^T X with the logits as G, of matched rows only."""
    inputs = benchmark_loss.make_inputs(SIZES, CPU)
    ((match, _),) = benchmark_loss.match(inputs)
    matched = {
        image * 2 * 16 + int(match.index[image, patch, q])
        for image, patch, q in match.weight.nonzero().tolist()
    }
    assert match.needed is not None
    assert set(match.needed.columns.tolist()) == matched
    patches = torch.cat([group.detach().transpose(0, 1).flatten(1, 2) for group in inputs.student], 1)
    student = patches.flatten(0, 1)[match.weight.flatten(0, 1).any(1)]
    prototypes = inputs.student_prototypes.detach()
    logits = student @ prototypes.T
    for layout in benchmark_floor.layouts(*inputs[:4], needed=match.needed, dtype=torch.float32).values():
        *_, vector_gradient, prototype_gradient = layout.args  # type: ignore[attr-defined]
        layout()
        torch.testing.assert_close(vector_gradient, logits @ prototypes)
        torch.testing.assert_close(prototype_gradient, logits.T @ student)


def test_loss_prints_a_table_and_one_json_line(capsys, no_other_processes):
    line, out = run(capsys, "loss", *SMALL_LOSS, "--rounds=2", "--json")
    assert_numbers(line, "time_ratio", "floor_ratio", "extra_memory_ratio", "seconds", "extra_mib", "flops")
    assert line["largest_relative_difference"] < 1e-4
    assert line["seconds"].keys() == {"ours", "plain", "floor", "matching"}
    assert line["versions"].keys() == {"torch", "glsd", "python"}
    assert line["sizes"]["prototypes"] == 40
    assert line["threads"] == 1
    assert "times as fast as the textbook" in out
    assert sum(text.startswith("{") for text in out.splitlines()) == 1


def test_a_sweep_draws_a_picture_and_skips_what_would_not_fit(capsys, no_other_processes, tmp_path):
    plot = tmp_path / "growth.png"
    argv = ["--sweep", "prototypes", "local_crops", "--sweep_prototypes", "16", "32", "64"]
    argv += ["--sweep_local_crops", "0", "2", "--sweep_rounds=1", f"--plot={plot}"]
    limit = benchmark_sweep.plain_bytes({**SIZES, "prototypes": 33}) / benchmark_sweep.GIB
    line, out = run(capsys, "loss", *SMALL_LOSS, *argv, f"--plain_gib={limit}", "--rounds=1", "--json")
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = line["sweep"]["prototypes"]
    assert [row["prototypes"] for row in rows] == [16, 32, 64]
    assert ["plain" in row for row in rows] == [True, True, False]
    assert "left out" in rows[2]["note"]
    assert all(row["ours"]["seconds"] > 0 for row in rows)
    assert [row["local_crops"] for row in line["sweep"]["local_crops"]] == [0, 2]
    assert "would not fit" in out


def test_the_step_is_taken_with_both_losses_and_cut_into_shares(capsys, no_other_processes):
    timm_args = "{patch_size: 16, depth: 1, embed_dim: 16, num_heads: 2}"
    line, out = run(
        capsys,
        "step",
        "--backbone=vit_tiny_patch16_224",
        f"--timm_args={timm_args}",
        "--batch_size=2",
        "--global_size=64",
        "--local_size=32",
        "--local_crops=2",
        "--prototypes=32",
        "--rounds=1",
        "--threads=1",
        "--json",
    )
    assert_numbers(line, "time_ratio", "extra_memory_ratio", "seconds", "images_per_s", "flops")
    for shares in line["shares"].values():
        assert {"teacher forward", "student forward", "loss", "backward of the rest"} < shares.keys()
        assert sum(shares.values()) == pytest.approx(1)
        assert all(share >= 0 for share in shares.values())
    assert line["flops"]["plain"] > line["flops"]["ours"]
    assert "our loss is" in out


def test_the_cut_loss_has_the_gradients_of_the_loss():
    inputs = benchmark_loss.make_inputs(SIZES, CPU)
    options: dict[str, Any] = {"matches": benchmark_loss.match(inputs), "center": inputs.center}
    options |= {"student_temp": 0.1, "teacher_temp": 0.04}
    leaves = [*inputs.student, inputs.student_prototypes]
    clock = benchmark_step.Clock(CPU)
    whole, cut = (
        torch.autograd.grad(3 * function(*inputs[:4], **options).loss, leaves)
        for function in (plain_local_loss, benchmark_step.cut(plain_local_loss, clock))
    )
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other)
    assert clock.seconds["loss"] > 0


@pytest.mark.slow
def test_data_measures_both_pipelines_on_every_set(capsys, tmp_path):
    argv = [
        "--images=8",
        "--batch_size=2",
        "--batches=2",
        "--rounds=1",
        "--global_size=32",
        "--local_size=16",
    ]
    pack_samples(((jpeg(number), "jpg", None) for number in range(4)), tmp_path, prefix="mine")
    argv += ["--shards", str(tmp_path / "mine-*.tar"), "--workers", "0", "1", "--json"]
    line, _ = run(capsys, "data", *argv)
    names = {"made", "given"}
    assert line["sets"].keys() == names
    for ratio, worst in {"worker_ratio": min, "pipeline_ratio": min, "decode_only_ratio": max}.items():
        assert_numbers(line, ratio)
        assert line[ratio] == worst(found[ratio] for found in line["sets"].values())
    for found in line["sets"].values():
        assert found["worker"]["seconds"].keys() == {"plain", "ours", "decode only"}
        assert found["workers"].keys() == {"0", "1"}
        for figures in (found["worker"], found["pipeline"], *found["workers"].values()):
            assert_numbers(figures, "seconds", "images_per_s")
    assert line["threads"] == 1
    assert line["extra_mib"].keys() == {"plain", "ours"}


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    """At a size where logits show: the textbook holds those of all student rows, and a log-softmax of each pair."""
    sizes = {**SIZES, "batch": 8, "prototypes": 8192}
    student_logits_mib = 8 * (2 * 16 + 3 * 4) * 8192 * 4 / 2**20
    assert benchmark_loss.extra_memory("plain", sizes, CPU) > 2 * student_logits_mib


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["loss", "--batch=0"], "--batch is 0"),
        (["loss", "--local_size=8"], "--local_size is 8"),
        (["loss", "--rounds=0"], "--rounds is 0"),
        (["loss", "--plot=a.png"], "--sweep"),
        (["loss", "--sweep", "batch", "--plot=a.jpg"], ".png"),
        (["loss", "--sweep", "batch", "--sweep_batch", "0"], "--sweep_batch"),
        (["data", "--workers", "-1"], "--workers"),
        (["data", "--shards", "none-*.tar"], "none-*.tar"),
        (["step", "--backbone=no_such_net"], "no_such_net"),
    ],
)
def test_mistakes_are_one_line(argv, says):
    with pytest.raises(UserError) as caught:
        benchmark.main(argv)
    assert says in str(caught.value)


def test_peaks_are_found_by_the_longest_name():
    assert benchmark_tools.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert benchmark_tools.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert benchmark_tools.peak_flops("CPU x86_64") is None


def test_ratios_are_paired():
    assert benchmark_tools.paired_ratio([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]) == 2.0


def test_boxes_are_views_of_images():
    spec = usual_spec(num_local=3)
    (global_boxes, local_boxes), (parameters, _) = benchmark_tools.drawn_boxes(spec, 4)
    second = benchmark_tools.draw(spec, height=375, width=500, seed=0, epoch=0, position=1)
    assert global_boxes.shape == (2, 4, 4)
    assert torch.equal(global_boxes[1, 1], second.boxes[1])
    assert torch.equal(local_boxes[2, 1], second.boxes[2 + 2])
    assert torch.equal(parameters[0, 1], second.photometric[0])


def test_every_benchmark_has_help(capsys):
    for name in benchmark.BENCHMARKS:
        with pytest.raises(SystemExit):
            benchmark.main([name, "--help"])
        assert ("--json" in capsys.readouterr().out) == (name != "table")


def test_the_road_is_what_runs_between_two_optimizer_steps():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    found: set[CodeType] = set()
    with benchmark_road.counting(found):
        for step in range(benchmark_road.FIRST + 3):
            weight.grad = torch.ones(1)
            if step == benchmark_road.FIRST:
                pick({"a": 1}, "a", "letter")
            else:
                nearest("a", ["b"])
            optimizer.step()
    by_name = {code.co_name: code for code in found if code.co_filename.endswith("errors.py")}
    assert by_name.keys() == {"pick"}
    assert benchmark_road.length(by_name["pick"]) == 6
