"""The library against golden numbers, and the checker against spoiled ones."""

import json
import math
import os
import shutil
from pathlib import Path

import check
import numpy as np
import pytest

SUBSET = Path(__file__).parent / "glsd"
FILES = sorted(SUBSET.glob("*.npz"))
# What the library is expected to produce, by the start of an array's name.
RESULTS = (
    "out_",
    "grad_",
    "after_",
    "cosine_",
    "teacher_temp_",
    "pos_exact",
    "lr_schedule",
    "momentum_schedule",
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_agrees_with_the_library(path):
    ok, line = check.check_file(path)
    assert ok, line


def test_the_subset_has_every_kind():
    stems = [path.stem for path in [*FILES, *(SUBSET.parent / "dml").glob("*.npz")]]
    assert {kind for kind in check.KINDS if any(stem.startswith(kind) for stem in stems)} == set(check.KINDS)


@pytest.mark.slow
def test_agrees_with_the_whole_collection():
    root = os.environ.get("GLSD_GOLDEN")
    if not root:
        pytest.skip("set GLSD_GOLDEN to the folder that holds glsd/ with all golden files")
    assert check.check_folders([Path(root) / "glsd"]) == 0


def results_of(path: Path) -> list[str]:
    with np.load(path) as archive:
        # The margin between the best and the second best match only says where a choice is unique.
        return [name for name in archive.files if name.startswith(RESULTS) and "tiemargin" not in name]


def spoil(path: Path, folder: Path, name: str, change) -> Path:
    """Write a copy of a file in which one array is changed."""
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files}
    arrays[name] = change(arrays[name])
    np.savez(folder / path.name, **arrays)
    shutil.copy(path.with_suffix(".json"), folder)
    return folder / path.name


def shift_largest(array: np.ndarray) -> np.ndarray:
    """Change the largest entry: a float by one part in a million, an index or a mask by one."""
    changed = np.array(array)
    place = np.unravel_index(np.abs(changed.astype(float)).argmax(), changed.shape)
    is_float = np.issubdtype(changed.dtype, np.floating)
    changed[place] = changed[place] * (1 + 1e-6) + 1e-12 if is_float else changed[place] ^ 1
    return changed


CASES = [
    (path, name)
    for path in FILES
    for name in (lambda names: sorted({*names[:: max(1, len(names) // 3)], *names[-1:]}))(results_of(path))
]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "name"), CASES, ids=lambda value: getattr(value, "stem", value))
def test_a_spoiled_result_fails(tmp_path, path, name):
    ok, line = check.check_file(spoil(path, tmp_path, name, shift_largest))
    assert not ok
    assert name in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stem", "name"),
    [
        (path.stem, name)
        for path in FILES
        if not path.stem.startswith(("local", "train"))
        for name in results_of(path)
    ],
)
def test_every_result_of_the_small_files_counts(tmp_path, stem, name):
    if name in ("grad_mlp.0.bias", "grad_mlp.3.bias") and stem == "head_bn":
        pytest.skip("zero but for rounding: a bias before batch normalization")
    assert not check.check_file(spoil(SUBSET / f"{stem}.npz", tmp_path, name, shift_largest))[0]


def float32_head_file(folder: Path, *, rows: int, sizes: tuple[int, int, int, int], scale: float) -> Path:
    """Write the golden file of a head of three layers with batch normalization, in float32.

    Its numbers come from the formulas of the golden files' README in numpy, each step rounded to float32.
    """
    in_dim, hidden, bottleneck, k = sizes
    rng = np.random.default_rng(rows)

    def draw(*shape: int) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    widths = [(0, in_dim, hidden), (3, hidden, hidden), (6, hidden, bottleneck)]
    w = {f"w_mlp.{p}.weight": draw(out, fan) / np.float32(fan**0.5) for p, fan, out in widths}
    w |= {f"w_mlp.{p}.bias": draw(out) for p, _, out in widths}
    for p in (1, 4):
        w |= {f"w_mlp.{p}.weight": 1 + draw(hidden) / 9, f"w_mlp.{p}.bias": draw(hidden)}
        w |= {
            f"w_mlp.{p}.running_mean": np.zeros(hidden, np.float32),
            f"w_mlp.{p}.running_var": np.ones(hidden, np.float32),
        }
        w[f"w_mlp.{p}.num_batches_tracked"] = np.array(0)
    w |= {"w_last_layer.weight_g": np.ones((k, 1), np.float32), "w_last_layer.weight_v": draw(k, bottleneck)}
    x, upstream = draw(rows, in_dim), draw(rows, k)
    arrays = {"in_x": x, "in_grad_output": upstream, **w}

    cdf = lambda h: ((1 + np.vectorize(math.erf)(h / 2**0.5)) / 2).astype(np.float32)  # noqa: E731
    inputs, normals, turned, spreads = [x], [], [], []
    for p in (0, 3):
        h = inputs[-1] @ w[f"w_mlp.{p}.weight"].T + w[f"w_mlp.{p}.bias"]
        mean, var = h.mean(0), h.var(0)
        arrays[f"after_mlp.{p + 1}.running_mean"] = 0.1 * mean
        arrays[f"after_mlp.{p + 1}.running_var"] = 0.9 + 0.1 * var * np.float32(rows / (rows - 1))
        arrays[f"after_mlp.{p + 1}.num_batches_tracked"] = np.array(1)
        spreads.append(np.sqrt(var + np.float32(1e-5)))
        normals.append((h - mean) / spreads[-1])
        turned.append(normals[-1] * w[f"w_mlp.{p + 1}.weight"] + w[f"w_mlp.{p + 1}.bias"])
        inputs.append(turned[-1] * cdf(turned[-1]))
    b = inputs[-1] @ w["w_mlp.6.weight"].T + w["w_mlp.6.bias"]
    length = np.linalg.norm(b, axis=1, keepdims=True)
    z, v = b / length, w["w_last_layer.weight_v"]
    v_length = np.linalg.norm(v, axis=1, keepdims=True)
    arrays["out_y"] = z @ (v / v_length).T

    grad_unit = upstream.T @ z
    grads = {
        "last_layer.weight_v": (grad_unit - (grad_unit * v).sum(1, keepdims=True) * v / v_length**2)
        / v_length
    }
    grad_z = upstream @ (v / v_length)
    grad = (grad_z - (grad_z * z).sum(1, keepdims=True) * z) / length
    for p, i in ((6, 2), (3, 1), (0, 0)):
        if i < 2:
            density = np.exp(-(turned[i] ** 2) / 2) / np.float32((2 * np.pi) ** 0.5)
            grad = grad * (cdf(turned[i]) + turned[i] * density)
            grads |= {f"mlp.{p + 1}.weight": (grad * normals[i]).sum(0), f"mlp.{p + 1}.bias": grad.sum(0)}
            grad = grad * w[f"w_mlp.{p + 1}.weight"]
            grad = (grad - grad.mean(0) - normals[i] * (grad * normals[i]).mean(0)) / spreads[i]
        grads |= {f"mlp.{p}.weight": grad.T @ inputs[i], f"mlp.{p}.bias": grad.sum(0)}
        grad = grad @ w[f"w_mlp.{p}.weight"]
    arrays |= {"out_grad_x": grad, **{f"grad_{name}": value for name, value in grads.items()}}
    arrays = {name: a.astype(np.float32) if a.dtype.kind == "f" else a for name, a in arrays.items()}
    np.savez(folder / "head_unseen.npz", allow_pickle=False, **arrays)
    names = [name.removeprefix("w_") for name in w if "running" not in name and "num_batches" not in name]
    constants: dict[str, object] = {
        "in_dim": in_dim,
        "out_dim": k,
        "hidden_dim": hidden,
        "bottleneck_dim": bottleneck,
        "n_layers": 3,
    }
    constants |= {
        "use_bn": True,
        "norm_last_layer": True,
        "trainable": {n: not n.endswith("_g") for n in names},
    }
    (folder / "head_unseen.json").write_text(json.dumps(constants))
    return folder / "head_unseen.npz"


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(("rows", "sizes"), [(9, (10, 12, 6, 18)), (300, (40, 64, 16, 50))])
def test_an_unseen_head_with_batch_norm_in_float32(tmp_path, rows, sizes, scale):
    """A bias before batch normalization has no gradient but rounding, which no two programs share."""
    path = float32_head_file(tmp_path, rows=rows, sizes=sizes, scale=scale)
    ok, line = check.check_file(path)
    assert ok, line
    with np.load(path) as archive:
        weights = np.abs(archive["grad_mlp.3.weight"]).max()
    changes = {
        "grad_mlp.3.bias": lambda a: a + 1e-3 * weights,
        "grad_mlp.6.bias": lambda a: a * (1 + 1e-3),
        "grad_mlp.4.bias": lambda a: a * (1 + 1e-3),
        "grad_mlp.0.weight": lambda a: a * (1 + 1e-3),
    }
    for name, change in changes.items():
        (tmp_path / name).mkdir()
        ok, line = check.check_file(spoil(path, tmp_path / name, name, change))
        assert not ok
        assert name in line


def test_a_damaged_file_fails_and_the_others_are_still_checked(tmp_path, capsys):
    for stem in ("clip", "head_bn", "pos_embed", "schedules"):
        for end in (".npz", ".json"):
            shutil.copy(SUBSET / f"{stem}{end}", tmp_path)
    whole = (tmp_path / "clip.npz").read_bytes()
    (tmp_path / "clip.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "head_bn.npz").write_bytes(b"")
    (tmp_path / "pos_embed.json").write_text('{"cases": ')
    assert check.check_folders([tmp_path]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["clip", "FAIL"],
        ["head_bn", "FAIL"],
        ["pos_embed", "FAIL"],
        ["schedules", "ok"],
    ]
    assert all("cannot be read" in line for line in lines[:3])


@pytest.mark.parametrize("change", [lambda a: a * np.nan, lambda a: a[..., :-1]], ids=["nan", "shape"])
def test_nan_and_wrong_shapes_fail(tmp_path, change):
    assert not check.check_file(spoil(SUBSET / "clip.npz", tmp_path, "out_grad_p0", change))[0]


def test_a_wrong_parameter_group_fails(tmp_path):
    shutil.copy(SUBSET / "param_groups.npz", tmp_path)
    constants = json.loads((SUBSET / "param_groups.json").read_text())
    constants["groups"]["norm_last_layer_True"]["cls_token"] = "no_decay"
    (tmp_path / "param_groups.json").write_text(json.dumps(constants))
    assert not check.check_file(tmp_path / "param_groups.npz")[0]


def test_an_array_that_nobody_checks_fails(tmp_path):
    path = spoil(SUBSET / "clip.npz", tmp_path, "out_grad_p0", lambda a: a)
    with np.load(path) as archive:
        arrays = dict(archive.items())
    np.savez(path, **arrays, out_something_new=np.ones(2))
    assert check.check_file(path) == (False, "1 arrays never looked at, e.g. out_something_new")


def test_unknown_kinds_missing_constants_and_empty_folders_fail(tmp_path, capsys):
    assert check.check_folders([tmp_path]) == 1
    assert "no .npz files" in capsys.readouterr().out
    np.savez(tmp_path / "riddle.npz", out_x=np.ones(1))
    shutil.copy(SUBSET / "clip.npz", tmp_path)
    assert check.check_folders([tmp_path]) == 1
    assert "0 of 2 files ok" in capsys.readouterr().out
