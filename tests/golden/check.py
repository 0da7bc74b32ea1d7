"""Compare the library with golden numbers: ``python tests/golden/check.py FOLDER [FOLDER ...]``.

Every .npz of the folders is checked through the library's public functions: one line per file with the
comparison that came nearest to its tolerance, exit code 1 if one exceeds it, an array is left unchecked, a
file is of no known kind, or there is none. Sizes and constants are read from the files, so other seeds and
shapes work as well.
"""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from golden_file import Golden
from kinds_dml import check_distillation, check_mdr, check_symmetric, check_trace_mdr, check_trace_obdsd
from kinds_losses import check_global, check_local_distance, check_local_similarity, check_positions
from kinds_metrics import check_metrics, check_metrics_query_gallery
from kinds_parts import check_clip, check_head, check_param_groups, check_pos_embed, check_schedules
from kinds_ranking import check_margin, check_ms
from kinds_train import check_train

# What the file's name starts with -> how to check it.
KINDS: dict[str, Callable[[Golden], None]] = {
    "global": check_global,
    "local_distance": check_local_distance,
    "local_similarity": check_local_similarity,
    "positions": check_positions,
    "schedules": check_schedules,
    "head": check_head,
    "clip": check_clip,
    "param_groups": check_param_groups,
    "pos_embed": check_pos_embed,
    "train": check_train,
    "ms": check_ms,
    "margin": check_margin,
    "psd": check_distillation,
    "obdsd_softmax": check_distillation,
    "obdp_sym": check_symmetric,
    "mdr": check_mdr,
    "metrics_query_gallery": check_metrics_query_gallery,
    "metrics": check_metrics,
    "trace_obdsd": check_trace_obdsd,
    "trace_mdr": check_trace_mdr,
}


def check_file(path: Path) -> tuple[bool, str]:
    """Return whether the library agrees with one file, and a line that says so."""
    kind = next((kind for kind in KINDS if path.stem.startswith(kind)), None)
    if kind is None:
        return False, f"unknown kind: the name starts with none of {', '.join(KINDS)}"
    if not path.with_suffix(".json").is_file():
        return False, "no .json beside it"
    try:
        golden = Golden.open(path)
    except Exception as error:  # noqa: BLE001 - a damaged archive may raise anything; the other files are still checked
        return False, f"cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    try:
        KINDS[kind](golden)
    except Exception as error:  # noqa: BLE001 - whatever the library raises on one file is the result of that file
        traceback.print_exc()
        return False, f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if unused := golden.unused():
        return False, f"{len(unused)} arrays never looked at, e.g. {', '.join(unused[:3])}"
    if not golden.comparisons:
        return False, "nothing was compared"
    worst = golden.worst()
    count = len(golden.comparisons)
    relative = max((c.error for c in golden.comparisons if c.tolerance == golden.tolerance), default=0.0)
    line = f"largest relative error {relative:.1e} (tolerance {golden.tolerance:.0e}), {count} comparisons"
    if not worst.ok:
        line = f"{worst.what}: error {worst.error:.3g}, tolerance {worst.tolerance:.3g}; {line}"
    return worst.ok, line


def check_folders(folders: list[Path]) -> int:
    """Check every file of the folders, print a line for each, and return the exit code."""
    files = [path for folder in folders for path in sorted(folder.glob("*.npz"))]
    width = max((len(path.stem) for path in files), default=0)
    failed = 0
    for path in files:
        ok, line = check_file(path)
        failed += not ok
        print(f"{path.stem:{width}}  {'ok  ' if ok else 'FAIL'}  {line}", flush=True)
    if not files:
        print(f"no .npz files in {', '.join(map(str, folders)) or 'no folder'}")
        return 1
    print(f"{len(files) - failed} of {len(files)} files ok")
    return 1 if failed else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(check_folders([Path(argument) for argument in sys.argv[1:]]))
