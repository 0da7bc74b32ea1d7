"""Warnings name the knob, healthy numbers give none, RankMe follows its equation."""

import dataclasses
import math
import re
import typing

import numpy as np
import pytest
import torch

from glsd.config.pretrain import PretrainConfig
from glsd.runtime.health import check, rankme

K = 4096
UNIFORM = math.log(K)
HEALTHY = {
    "loss": 4.1,
    "global_loss": 4.0,
    "local_loss": 4.2,
    "global_teacher_entropy": 3.0,
    "local_teacher_entropy": 3.5,
    "matched_share": 0.84,
    "grad_norm": 1.3,
    "rankme": 120.0,
    "timing": {"data_wait": 0.04},
}


def kinds(early=False, **changes) -> list[str]:
    findings = check({**HEALTHY, **changes}, num_prototypes=K, embed_dim=384, early=early)
    return [finding.kind for finding in findings]


def test_healthy_and_empty_rows_give_no_warning():
    assert kinds() == []
    assert check({}, num_prototypes=K, embed_dim=384) == []


CASES = [
    ({"global_loss": UNIFORM, "global_teacher_entropy": UNIFORM}, "global_uniform_collapse"),
    ({"local_loss": UNIFORM, "local_teacher_entropy": UNIFORM - 1e-4}, "local_uniform_collapse"),
    ({"global_loss": UNIFORM - 0.01, "global_teacher_entropy": 2.0}, "global_stuck"),
    ({"global_loss": 0.001, "global_teacher_entropy": 0.0}, "global_one_point_collapse"),
    ({"local_loss": 0.0, "local_teacher_entropy": 0.001}, "local_one_point_collapse"),
    ({"matched_share": 0.01}, "few_matches"),
    ({"matched_share": 0.0, "local_loss": 0.0, "local_teacher_entropy": 0.0}, "few_matches"),
    ({"grad_norm": 0.0}, "no_gradient"),
    ({"grad_norm": 1e5}, "exploding_gradient"),
    ({"rankme": 1.1}, "low_rank"),
    ({"timing": {"data_wait": 0.5}}, "data_wait"),
    ({"loss": math.nan}, "non_finite"),
    ({"grad_norm": math.inf}, "non_finite"),
]


@pytest.mark.parametrize(("changes", "kind"), CASES)
def test_each_illness_is_named(changes, kind):
    assert kinds(**changes) == [kind]


@pytest.mark.parametrize("changes", [case[0] for case in CASES])
def test_the_knobs_in_a_warning_exist(changes):
    known = set()
    for section, cls in typing.get_type_hints(PretrainConfig).items():
        if dataclasses.is_dataclass(cls):
            known |= {f"{section}.{field.name}" for field in dataclasses.fields(cls)}
    for finding in check({**HEALTHY, **changes}, num_prototypes=K, embed_dim=384):
        named = set(re.findall(r"\b(?:data|model|head|loss|optim|watch)\.\w+", finding.line))
        assert named, f"{finding.line} names no knob"
        assert named <= known, named - known


def test_a_fresh_network_may_look_uniform_but_not_be_broken():
    early = {"global_loss": UNIFORM, "rankme": 1.0, "grad_norm": 1e5, "timing": {"data_wait": 0.9}}
    assert kinds(early=True, **early) == []
    assert kinds(early=True, loss=math.nan, matched_share=0.0, grad_norm=0.0) == [
        "non_finite",
        "few_matches",
        "no_gradient",
    ]


def literal_rankme(features: np.ndarray) -> float:
    values = np.linalg.svd(features, compute_uv=False)
    p = values / np.abs(values).sum() + 1e-7
    return float(np.exp(-np.sum(p * np.log(p))))


def test_rankme_equals_its_equation():
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert rankme(features) == pytest.approx(literal_rankme(features.double().numpy()), rel=1e-10)


def test_rankme_counts_directions():
    q, _ = torch.linalg.qr(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).double())
    for rank in (1, 4, 16):
        # The equation's 1e-7 per direction keeps it a little off the whole number.
        assert rankme((q[:, :rank] @ torch.eye(rank, 16, dtype=torch.float64)) * 7) == pytest.approx(
            rank, rel=1e-4
        )


def test_rankme_of_constant_zero_and_bad_features():
    assert rankme(torch.ones(20, 5)) == pytest.approx(1.0, abs=1e-4)
    assert rankme(torch.zeros(20, 5)) == pytest.approx(1.0, abs=1e-4)
    assert math.isnan(rankme(torch.full((4, 2), math.nan)))
