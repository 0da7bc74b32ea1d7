"""Four retrieval benchmarks, packed from their owners' files in the splits of the field.

No class is in both training and test. These are not the owners' classification splits: those of CUB-200-2011
(``train_test_split.txt``) and Cars-196 (its train and test folders) have every class on both sides.
"""

import errno
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glsd.errors import UserError, one_line
from glsd.packing.source import FileReader, Source, check_regular
from glsd.packing.write import PackSummary, pack_sources

CARS_OWNER = (
    "its owner published it at https://ai.stanford.edu/~jkrause/cars/car_dataset.html, which is no longer served: "
    "ask the owner, or use a copy made from there"
)
NO_CLASS = -1
CUB_TRAINING, CARS_TRAINING = 100, 98  # classes 1 to this one are for training, the others for testing


class Listed(NamedTuple):
    """An image as the annotation files list it."""

    role: str
    path: str  # below the root of the listing
    label: int


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The content of a benchmark's annotation files."""

    root: Path
    source: str  # the annotation files, for messages
    images: list[Listed]
    classes: list[str]  # in label order


@dataclass(frozen=True, kw_only=True)
class RetrievalSet:
    """A benchmark: where its owner publishes it, its published size, and how to read it."""

    title: str
    owner: str
    published: dict[str, tuple[int, int]]  # images and classes of each role
    read: Callable[[Path], Listing]


def pack_retrieval_set(
    name: str, src: str | Path, dst: str | Path, *, allow_incomplete: bool = False, **settings: Any
) -> dict[str, PackSummary]:
    """Pack a benchmark of RETRIEVAL_SETS, unpacked from its owner's archives, into ``dst/{role}-{000000}.tar``.

    Labels number the classes of all roles together. ``allow_incomplete`` leaves out and lists images that are missing or
    damaged, and accepts any number of images and classes. settings: as pack_sources.
    Raises UserError if an annotation file or an image is missing or damaged, for a path that leads out of the data set,
    for numbers of images and classes that are not the published ones, and as pack_sources does. Source of the splits: Oh
    Song et al. (2016), Deep Metric Learning via Lifted Structured Feature Embedding; of In-Shop: Liu et al. (2016),
    DeepFashion.
    """
    benchmark, src = RETRIEVAL_SETS[name], Path(src)
    if not os.path.isdir(src):
        raise UserError(
            f"{src} is no folder: expected {benchmark.title} as unpacked from its archive; {benchmark.owner}"
        )
    try:
        listing = benchmark.read(src)
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename} is missing: it belongs to {benchmark.title}; {benchmark.owner}"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {one_line(error)}") from error
    _check_listing(listing)
    if not allow_incomplete:
        _check_complete(listing, benchmark)
    sources = {}
    for role in benchmark.published:
        images = [image for image in listing.images if image.role == role]
        paths = [image.path for image in images]
        sources[role] = Source(
            title=f"role {role}",
            names=paths,
            read=FileReader(listing.root, paths),
            labels=[image.label for image in images],
            classes=listing.classes,
            keeps_extensions=False,
        )
    restore = f"restore it ({benchmark.owner}), or leave such images out with --allow_incomplete"
    return pack_sources(sources, dst, unreadable_hint=None if allow_incomplete else restore, **settings)


def _check_listing(listing: Listing) -> None:
    """Raise UserError for a path out of the data set, an image listed twice and a class in training and test.

    Links inside the data set may lead out of it: the user made them, but annotation files may come from anyone.
    """
    role_of: dict[str, str] = {}
    training = {image.label for image in listing.images if image.role == "train"}
    for role, path, label in listing.images:
        # An empty part comes from an absolute path behind its folder. NUL is not printable.
        if {"", ".."} & set(path.split("/")) or not path.isprintable():
            raise UserError(
                f"{listing.source} lists the path {path!r}: expected one below {listing.root}, not absolute, without '..' "
                "and unprintable characters: restore it"
            )
        file = posixpath.normpath(path)  # another spelling is the same image
        if file in role_of:
            raise UserError(
                f"{listing.source} lists {file} twice (roles {role_of[file]} and {role}): restore it"
            )
        role_of[file] = role
        if role != "train" and label in training:
            raise UserError(
                f"{listing.source}: class {listing.classes[label]} of {path} is in train and in {role}, but no class "
                "may be in both: restore the annotation files"
            )


def _check_complete(listing: Listing, benchmark: RetrievalSet) -> None:
    for role, (num_images, num_classes) in benchmark.published.items():
        labels = [image.label for image in listing.images if image.role == role]
        if (len(labels), len(set(labels))) != (num_images, num_classes):
            raise UserError(
                f"{listing.source} lists {len(labels)} images of {len(set(labels))} classes for {role}, but "
                f"{benchmark.title} has {num_images} of {num_classes}: restore it ({benchmark.owner}), or pack what is "
                "there with --allow_incomplete"
            )
    missing = [image.path for image in listing.images if not os.path.isfile(listing.root / image.path)]
    if missing:
        raise UserError(
            f"{listing.root / missing[0]} is missing, one of {len(missing)} such images of {listing.source}: "
            f"{benchmark.owner}; or pack what is there with --allow_incomplete"
        )


def read_cub(src: Path) -> Listing:
    """List CUB-200-2011: classes 1-100 train, 101-200 test.

    Raises UserError for damaged annotation files and FileNotFoundError for missing ones, as the other readers do.
    """
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
    """List Cars-196: classes 1-98 train, 99-196 test.

    Its owner published two forms: all images in car_ims, or two halves beside a devkit, which are merged here.
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
    (names,) = _mat_columns(names_file, "class_names")
    classes = [name for name in names if isinstance(name, str)]
    if len(classes) < len(names):
        raise UserError(f"{names_file}: its class_names are not all text: restore it")
    images = []
    for file, (path_field, folder) in files.items():
        rows = zip(*_mat_columns(file, "annotations", path_field, "class"), strict=True)
        for place, (path, number) in enumerate(rows, 1):
            if not isinstance(path, str):
                raise UserError(f"{file}, annotation {place}: its file name is no text: restore it")
            if not isinstance(number, int) or not 1 <= number <= len(classes):
                raise UserError(
                    f"{file}, annotation {place}: class {number}, expected 1 to {len(classes)}, the classes of {names_file}"
                )
            role = "train" if number <= CARS_TRAINING else "test"
            images.append(Listed(role, f"{folder}{path}", number - 1))
    return Listing(root=root, source=" and ".join(map(str, files)), images=images, classes=classes)


def read_sop(src: Path) -> Listing:
    """List Stanford Online Products by the roles of Ebay_train.txt and Ebay_test.txt."""
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
    """List the In-shop Clothes Retrieval Benchmark by the roles of its partition file."""
    root = _root(src, "In-shop Clothes Retrieval Benchmark", "In-shop_Clothes_Retrieval_Benchmark")
    file = _root(root, "Eval") / "list_eval_partition.txt"
    if not file.exists() and (root / file.name).exists():
        file = root / file.name
    columns: dict[str, Callable] = {"image_name": str, "item_id": str, "evaluation_status": _status}
    rows = list(_rows(file, columns, header=2))
    classes = sorted({item for _, item, _ in rows})
    rank = {item: label for label, item in enumerate(classes)}
    # On a disk that ignores case, root/img exists in both layouts; root/Img/img does not.
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


def _root(src: Path, *names: str) -> Path:
    """Return the folder of the data set: ``src``, or the folder in it that the owner's archive makes."""
    return next((src / name for name in names if (src / name).is_dir()), src)


def _rows(file: Path, columns: Mapping[str, Callable[[str], Any]], *, header: int = 0) -> Iterator[list]:
    """Yield the converted cells of each line after the header lines, the last of which names the columns.

    Blanks separate cells; the last cell may hold some. Raises UserError that names file and line.
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


def _mat_columns(file: Path, variable: str, *fields: str) -> list[list[str | int | None]]:
    """Return fields of a struct array in a MATLAB file, or the array itself if no field is named.

    An element that is neither text nor a whole number is None. Raises UserError for a damaged file.
    """
    from scipy.io import loadmat

    check_regular(file)
    try:
        content = loadmat(file, squeeze_me=True, variable_names=[variable])
    # SciPy's reader runs into errors of any type in a damaged file: ValueError, ZeroDivisionError, UnboundLocalError, ...
    except Exception as error:
        raise _bad_mat(file, f"{type(error).__name__}: {one_line(str(error))}") from error
    if variable not in content:
        raise _bad_mat(file, f"it has no variable {variable!r}")
    rows = np.atleast_1d(content[variable]).ravel()
    if lacking := set(fields) - set(rows.dtype.names or ()):
        raise _bad_mat(file, f"its {variable} lack the field {min(lacking)!r}")
    columns = [rows[field] for field in fields] or [rows]
    return [[_plain(value) for value in column.tolist()] for column in columns]


def _plain(value: object) -> str | int | None:
    if isinstance(value, str):
        return str(value)
    return int(value) if isinstance(value, int | np.integer) and not isinstance(value, bool) else None


def _bad_mat(file: Path, reason: str) -> UserError:
    return UserError(f"{file} cannot be read as a MATLAB file: {reason}: restore it; {CARS_OWNER}")


RETRIEVAL_SETS = {
    "cub200": RetrievalSet(
        title="CUB-200-2011",
        owner="its owner Caltech publishes it at https://www.vision.caltech.edu/datasets/cub_200_2011/",
        published={"train": (5_864, 100), "test": (5_924, 100)},
        read=read_cub,
    ),
    "cars196": RetrievalSet(
        title="Cars-196",
        owner=CARS_OWNER,
        published={"train": (8_054, 98), "test": (8_131, 98)},
        read=read_cars,
    ),
    "sop": RetrievalSet(
        title="Stanford Online Products",
        owner="its owner Stanford publishes it at https://cvgl.stanford.edu/projects/lifted_struct/",
        published={"train": (59_551, 11_318), "test": (60_502, 11_316)},
        read=read_sop,
    ),
    "inshop": RetrievalSet(
        title="the In-shop Clothes Retrieval Benchmark",
        owner="its owner, CUHK, publishes it at https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html",
        published={"train": (25_882, 3_997), "query": (14_218, 3_985), "gallery": (12_612, 3_985)},
        read=read_inshop,
    ),
}
