"""Which CPUs multiply bfloat16 numbers, and what a run does on those that do not."""

import platform

import pytest
import torch
from accelerate.state import AcceleratorState

from glsd.cluster import launch
from glsd.config.parse import load, load_file
from glsd.config.pretrain import PretrainConfig
from glsd.precision import cpu_multiplies_bf16
from glsd.pretrain import dry_run
from tests.helpers.runs import assert_same_run, train

LINE = "precision bf16: this CPU has no bfloat16 instructions: "


@pytest.fixture
def old_cpu(monkeypatch):
    monkeypatch.setattr(launch, "cpu_multiplies_bf16", lambda: False)
    monkeypatch.setattr(dry_run, "cpu_multiplies_bf16", lambda: False)


@pytest.mark.parametrize(
    ("capabilities", "limit", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "", False),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, "", True),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": True}, "", True),
        ({"neon": True, "bf16": True}, "", True),
        ({"neon": True, "bf16": False}, "", False),
        ({"architecture": "ppc64le"}, "", False),
        ({"avx512_bf16": True}, "AVX2", False),
        ({"avx512_bf16": True}, "avx512_core", False),
        ({"avx512_bf16": True}, "AVX512_CORE_BF16", True),
        ({"avx512_bf16": True}, "DEFAULT", True),
    ],
)
def test_a_cpu_is_known_by_its_instructions(capabilities, limit, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert cpu_multiplies_bf16() == expected


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the names of x86")
def test_torch_names_the_instructions_as_we_do():
    assert {"avx512_bf16", "amx_bf16"} <= torch.cpu.get_capabilities().keys()


def test_bf16_becomes_float32_on_an_old_cpu_and_stays_so(tiny_run, old_cpu, capsys):
    argv = tiny_run("run", optim__precision="bf16", optim__max_steps=3)
    run = train(argv)
    assert f"{LINE}float32 instead\n" in capsys.readouterr().out
    assert load_file(PretrainConfig, run / "config.yaml").optim.precision == "no"
    assert_same_run(run, train(tiny_run("float32", optim__max_steps=3)))
    capsys.readouterr()
    train(tiny_run("run", optim__precision="bf16", optim__max_steps=6, resume="auto"))
    out = capsys.readouterr().out
    assert f"{LINE}float32 instead\n" in out
    assert "precision: " not in out.partition("configuration beside")[0]  # no difference to the first start
    assert_same_run(run, train(tiny_run("whole", optim__max_steps=6)))


def test_a_run_that_began_in_bf16_goes_on_in_it(tiny_run, monkeypatch, capsys):
    whole = train(tiny_run("whole", optim__precision="bf16", optim__max_steps=4))
    run = train(tiny_run("run", optim__precision="bf16", optim__max_steps=2))
    monkeypatch.setattr(launch, "cpu_multiplies_bf16", lambda: False)
    capsys.readouterr()
    train(tiny_run("run", optim__precision="bf16", optim__max_steps=4, resume="auto"))
    assert (
        f"{LINE}it stays, as the run began so: precision no is many times faster\n" in capsys.readouterr().out
    )
    assert_same_run(run, whole)
    # The precision is a setting as any other: asked for, it changes.
    train(tiny_run("run", optim__precision="no", optim__max_steps=5, resume="auto"))
    assert load_file(PretrainConfig, run / "config.yaml").optim.precision == "no"


def test_the_dry_run_says_in_which_precision_it_was_measured(tiny_run, old_cpu, monkeypatch, capsys):
    monkeypatch.setattr(dry_run, "MEASURE_SECONDS", 0.0)
    AcceleratorState._reset_state()
    dry_run.forecast(load(PretrainConfig, tiny_run("run", optim__precision="bf16")))
    out = capsys.readouterr().out
    assert f"{LINE}float32 instead\n" in out
    assert "images/s (float32, 1 CPU threads a rank)" in out
    found = dry_run.Forecast(
        parameters={"backbone": 1, "heads": 1},
        memory={},
        device_memory=1,
        images_per_s=1.0,
        data_wait=0.0,
        step_s=1.0,
        steps_left=1,
    )
    kept = dry_run.report(found, torch.device("cpu"), "bf16")
    assert "slow because this CPU has no bfloat16 instructions: set optim.precision to no" in kept
