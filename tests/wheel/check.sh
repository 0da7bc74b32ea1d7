#!/usr/bin/env bash
# Build the wheel, install it into a fresh environment and use it in another folder: what `pip install .` gives a user.
# The dependencies are those of the given python (default: .venv of the checkout), so nothing is downloaded.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
python="${1:-$root/.venv/bin/python}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
unset PYTHONPATH

# A copy, so that building leaves nothing in the checkout and takes nothing stale from it.
mkdir "$work/source" "$work/elsewhere"
cd "$root"
git ls-files -z --cached --others --exclude-standard | tar --null -T - -c | tar -x -C "$work/source"
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w "$work" "$work/source"
"$python" -m venv --without-pip "$work/venv"
"$python" -m pip --python "$work/venv/bin/python" install --quiet --disable-pip-version-check --no-deps "$work"/glsd-*.whl
# A line of a .pth file extends the path, but runs no .pth file there: the editable glsd of the checkout stays out.
site="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
echo "$site" >"$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"

cd "$work/elsewhere"
export PATH="$work/venv/bin:$PATH"
python - "$work/venv" "$root" <<'PYTHON'
import sys
from pathlib import Path
import numpy as np
from PIL import Image
import glsd
folder, root = Path(glsd.__file__).parent, Path(sys.argv[2])
assert folder.is_relative_to(sys.argv[1]), f"glsd comes from {folder}"
assert glsd.__version__ and (folder / "py.typed").is_file()
def recipes(top):
    return {str(file.relative_to(top)) for file in top.glob("*/*.yaml")}
assert recipes(folder / "configs") == recipes(root / "configs") != set(), "recipes are missing"
draw = np.random.default_rng(0)
for number in range(24):
    file = Path("photos", f"class{number % 2}", f"{number}.png")
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(file)
PYTHON
glsd --help
glsd --version
python -m glsd pretrain --help >/dev/null
for split in train val; do glsd pack photos/ shards/ --prefix "$split" --workers 1; done
glsd audit 'shards/train-*.tar' --workers 1
glsd pretrain --config vitt16_cpu --data.shards 'shards/train-*.tar' --out run --optim.max_steps 2 --optim.batch_size 8 \
    --optim.precision no --head.num_prototypes 64 --model.timm_args '{depth: 1}'
test -d run/checkpoints/step_00000002
glsd evaluate --model run --protocol knn --data.train_shards 'shards/train-*.tar' --data.val_shards 'shards/val-*.tar' \
    --k '[1]' --data.num_workers 0
glsd doctor --out run --json >doctor.txt || test $? = 1
grep -q '"lines"' doctor.txt
if glsd pretrain --config vitt16_cp 2>mistake.txt; then exit 1; fi
grep -q "did you mean 'vitt16_cpu'" mistake.txt
echo "The wheel works outside of the checkout."
