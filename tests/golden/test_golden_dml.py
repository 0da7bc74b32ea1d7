"""The metric-learning half of the golden numbers: the library agrees with them, and not with spoiled ones."""

import os
import re
from pathlib import Path

import check
import numpy as np
import pytest
from test_golden import spoil

SUBSET = Path(__file__).parent / "dml"
FILES = sorted(SUBSET.glob("*.npz"))
RESULTS = re.compile(
    r"(.*_)?(loss|kl|coef|rank|grad_\w+|target|transition|diffusion|degree|A_T|mdr|triplet|ema_mean|ema_std|ema_mean_std|"
    r"batch_std|counts_per_level|losses|levels_after_step|W_after_step|recall|recall_all_queries|map_at_r|r_precision|"
    r"first_hit_rank|map_at_r_per_query|nmi_arithmetic|pml_mined_mean|dw_prob_obdsd)"
)


def shift_largest(array: np.ndarray) -> np.ndarray:
    """Change the largest entry: a float by one part in 100,000 (margins were kept in float32), an integer by one."""
    changed = np.array(array)
    place = np.unravel_index(np.abs(changed.astype(float)).argmax(), changed.shape)
    is_float = np.issubdtype(changed.dtype, np.floating)
    changed[place] = changed[place] * (1 + 1e-5) + 1e-12 if is_float else changed[place] + 1
    return changed


def results_of(path: Path) -> list[str]:
    with np.load(path) as archive:
        return [name for name in archive.files if RESULTS.fullmatch(name) and archive[name].any()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_agrees_with_the_library(path):
    ok, line = check.check_file(path)
    assert ok, line


@pytest.mark.slow
def test_agrees_with_the_whole_collection():
    root = os.environ.get("GLSD_GOLDEN")
    if not root:
        pytest.skip("set GLSD_GOLDEN to the folder that holds dml/ with all golden files")
    assert check.check_folders([Path(root) / "dml"]) == 0


def cases(every: int) -> list[tuple[Path, str]]:
    return [(path, name) for path in FILES for name in results_of(path)[::every]]


def spoiled_is_found(path: Path, name: str, folder: Path) -> bool:
    ok, line = check.check_file(spoil(path, folder, name, shift_largest))
    return not ok and name in line


@pytest.mark.parametrize(("path", "name"), cases(17), ids=lambda value: getattr(value, "stem", value))
def test_a_spoiled_result_fails(tmp_path, path, name):
    assert spoiled_is_found(path, name, tmp_path)


@pytest.mark.slow
def test_every_third_result_counts(tmp_path):
    assert len(cases(3)) > 50
    assert [(path.stem, name) for path, name in cases(3) if not spoiled_is_found(path, name, tmp_path)] == []
