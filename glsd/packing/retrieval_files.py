"""The annotation files of four metric-learning benchmarks, in their owners' layouts, as lists of images.

The splits share no class between training and test. They are not the owners' classification splits: those of
CUB-200-2011 (``train_test_split.txt``) and Cars-196 (its train and test folders) have every class on both sides.
"""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from glsd.errors import UserError

CARS_OWNER = (
    "its owner published it at https://ai.stanford.edu/~jkrause/cars/car_dataset.html, which is no longer served: "
    "ask the owner, or use a copy made from there"
)
NO_CLASS = -1
CUB_TRAINING, CARS_TRAINING = 100, 98  # classes 1 to this train, the others test
MAT_READER = Path(__file__).with_name("mat_reader.py")
MAT_MEGABYTES, MAT_SECONDS = 2048, 120  # the whole list needs less than 192 MiB and about a second


class Listed(NamedTuple):
    """An image as the annotation files list it."""

    role: str
    path: str  # below the root of the listing
    label: int


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What the annotation files of a data set say."""

    root: Path
    source: str  # the annotation files to name when something is wrong
    images: list[Listed]
    classes: list[str]  # in the order of their labels


def _root(src: Path, *names: str) -> Path:
    """The folder of the data set: ``src``, or the folder in it that the owner's archive makes."""
    return next((src / name for name in names if (src / name).is_dir()), src)


def check_regular(file: Path) -> None:
    """Raise OSError unless there is such a file, and no pipe (whose opening may wait for ever), device or folder."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(file))


def _rows(file: Path, columns: Mapping[str, Callable[[str], Any]], *, header: int = 0) -> Iterator[list]:
    """Yield the converted cells of each line behind the header lines, the last of which names the columns.

    Cells stand apart by blanks, the last one may hold some. Raises UserError naming file and line.
    """
    number = 0
    check_regular(file)
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                cells = line.strip().split(maxsplit=len(columns) - 1)
                if number < header or (number > header and not cells):
                    continue
                if len(cells) != len(columns) or (number == header and cells != list(columns)):
                    raise ValueError(f"expected {' '.join(columns)}, found {line.strip()[:99]!r}")
                if number > header:
                    yield [convert(cell) for convert, cell in zip(columns.values(), cells, strict=True)]
    except ValueError as error:
        raise UserError(f"{file}, line {number}: {error}") from error


def read_cub(src: Path) -> Listing:
    """List CUB-200-2011, classes 1-100 and 101-200; UserError for damaged files, FileNotFoundError for missing ones."""
    root = _root(src, "CUB_200_2011")
    names = dict(_rows(root / "classes.txt", {"class_id": int, "class_name": str}))
    class_of = dict(_rows(root / "image_class_labels.txt", {"image_id": int, "class_id": int}))
    rank = {number: label for label, number in enumerate(sorted(names))}
    images = []
    for image, path in _rows(root / "images.txt", {"image_id": int, "image_name": str}):
        number = class_of.get(image, NO_CLASS)
        if number not in rank:
            file = "image_class_labels.txt" if number == NO_CLASS else "classes.txt"
            raise UserError(
                f"{root / file} lacks the class of image {image}, {path}, of images.txt: restore it"
            )
        images.append(Listed("train" if number <= CUB_TRAINING else "test", f"images/{path}", rank[number]))
    return Listing(
        root=root, source=f"{root}/images.txt", images=images, classes=[names[n] for n in sorted(names)]
    )


def read_cars(src: Path) -> Listing:
    """List Cars-196, classes 1-98 and 99-196, from either form that its owner published; errors as read_cub.

    The forms: all images in car_ims, or those of two halves beside a devkit. The halves are merged first.
    """
    root = _root(src, "stanford_cars")
    merged, devkit = root / "cars_annos.mat", root / "devkit"
    if merged.exists():
        files = {merged: ("relative_im_path", "")}
        names_file = merged
    else:
        labeled = [folder / "cars_test_annos_withlabels.mat" for folder in (devkit, root)]
        test = next((file for file in labeled if file.exists()), labeled[0])
        if not devkit.is_dir():
            raise FileNotFoundError(errno.ENOENT, "", f"{merged} (or the folder devkit, the other form)")
        if not test.exists() and (devkit / "cars_test_annos.mat").exists():
            raise UserError(
                f"{devkit}/cars_test_annos.mat has no classes, and the benchmark takes the classes 99-196 of both halves: "
                f"it needs cars_test_annos_withlabels.mat; {CARS_OWNER}"
            )
        files = {devkit / "cars_train_annos.mat": ("fname", "cars_train/"), test: ("fname", "cars_test/")}
        names_file = devkit / "cars_meta.mat"
    wanted: dict[Path, dict[str, list[str]]] = {
        file: {"annotations": [field, "class"]} for file, (field, _) in files.items()
    }
    wanted.setdefault(names_file, {})["class_names"] = []
    found = {file: _load_mat(file, variables) for file, variables in wanted.items()}
    classes = found[names_file]["class_names"]
    if not all(isinstance(name, str) for name in classes):
        raise UserError(f"{names_file}: its class_names are not all text: restore it")
    images = []
    for file, (_, folder) in files.items():
        for place, (path, number) in enumerate(found[file]["annotations"], 1):
            if not isinstance(path, str):
                raise UserError(f"{file}, annotation {place}: its file name is no text: restore it")
            if not isinstance(number, int) or not 1 <= number <= len(classes):
                raise UserError(
                    f"{file}, annotation {place}: class {number}, expected 1 to {len(classes)}, the classes of {names_file}"
                )
            role = "train" if number <= CARS_TRAINING else "test"
            images.append(Listed(role, f"{folder}{path}", number - 1))
    return Listing(root=root, source=" and ".join(map(str, files)), images=images, classes=classes)


def _load_mat(file: Path, wanted: Mapping[str, list[str]]) -> dict[str, list]:
    """Return variables of a MATLAB file, read in another process (see mat_reader); UserError for a damaged file.

    wanted: for each variable the fields to take of its structs, which gives tuples, or none, which gives its elements.
    Elements that are neither text nor whole numbers are None.
    """
    check_regular(file)
    command = [sys.executable, "-P", str(MAT_READER), str(MAT_MEGABYTES), json.dumps(dict(wanted))]
    # Threads of linear algebra, unused here, would take address space on machines with many cores.
    single = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with open(file, "rb") as opened:
        try:
            done = subprocess.run(
                command, stdin=opened, capture_output=True, timeout=MAT_SECONDS, env=single, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise _bad_mat(file, f"it took more than {MAT_SECONDS} s") from error
    if done.returncode < 0:
        raise _bad_mat(file, f"the reader was ended by {signal.Signals(-done.returncode).name}")
    if done.returncode > 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise _bad_mat(file, " ".join(said[-1].split())[:200] if said else f"exit status {done.returncode}")
    return json.loads(done.stdout)


def _bad_mat(file: Path, reason: str) -> UserError:
    shown = "".join(character for character in reason if character.isprintable())
    return UserError(f"{file} cannot be read as a MATLAB file: {shown}: restore it; {CARS_OWNER}")


def read_sop(src: Path) -> Listing:
    """List Stanford Online Products, Ebay_train.txt and Ebay_test.txt; errors as read_cub."""
    root = _root(src, "Stanford_Online_Products")
    columns = {"image_id": int, "class_id": int, "super_class_id": int, "path": str}
    rows = [
        (role, number, path)
        for role in ("train", "test")
        for _, number, _, path in _rows(root / f"Ebay_{role}.txt", columns, header=1)
    ]
    # The owner numbers the products; the kind is the image's folder, such as bicycle_final.
    names = {number: f"{path.split('/')[0].removesuffix('_final')}_{number}" for _, number, path in rows}
    rank = {number: label for label, number in enumerate(sorted(names))}
    return Listing(
        root=root,
        source=f"{root}/Ebay_train.txt and Ebay_test.txt",
        images=[Listed(role, path, rank[number]) for role, number, path in rows],
        classes=[names[number] for number in sorted(names)],
    )


def read_inshop(src: Path) -> Listing:
    """List the In-shop Clothes Retrieval Benchmark, by the roles of its partition file; errors as read_cub."""
    root = _root(src, "In-shop Clothes Retrieval Benchmark", "In-shop_Clothes_Retrieval_Benchmark")
    file = _root(root, "Eval") / "list_eval_partition.txt"
    if not file.exists() and (root / file.name).exists():
        file = root / file.name
    columns: dict[str, Callable] = {"image_name": str, "item_id": str, "evaluation_status": _status}
    rows = list(_rows(file, columns, header=2))
    classes = sorted({item for _, item, _ in rows})
    rank = {item: label for label, item in enumerate(classes)}
    # On a disk that takes Img and img for one name, root/img is there in both layouts; root/Img/img is not.
    return Listing(
        root=root / "Img" if (root / "Img" / "img").is_dir() else root,
        source=str(file),
        images=[Listed(role, path, rank[item]) for path, item, role in rows],
        classes=classes,
    )


def _status(text: str) -> str:
    if text not in ("train", "query", "gallery"):
        raise ValueError(f"expected train, query or gallery as evaluation_status, found {text!r}")
    return text
