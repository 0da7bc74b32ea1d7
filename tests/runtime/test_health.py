"""Warnings name the knob, and healthy numbers give none."""

import dataclasses
import math
import re
import typing

import pytest

from glsd.config.pretrain import PretrainConfig
from glsd.errors import with_config_keys
from glsd.pretrain.report import HEALTH_KEYS
from glsd.runtime.health import check

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
        line = with_config_keys(finding.line, HEALTH_KEYS)
        named = set(re.findall(r"\b(?:data|model|head|loss|optim|watch)\.\w+", line))
        assert named, f"{line} names no knob"
        assert named <= known, named - known


def test_a_fresh_network_may_look_uniform_but_not_be_broken():
    early = {"global_loss": UNIFORM, "rankme": 1.0, "grad_norm": 1e5, "timing": {"data_wait": 0.9}}
    assert kinds(early=True, **early) == []
    assert kinds(early=True, loss=math.nan, matched_share=0.0, grad_norm=0.0) == [
        "non_finite",
        "few_matches",
        "no_gradient",
    ]
