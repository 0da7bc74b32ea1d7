"""Four benchmarks of metric learning, from their owners' files to shards in the splits of the field."""

import functools
import os
import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from glsd.errors import UserError, one_line
from glsd.packing.retrieval_files import (
    CARS_OWNER,
    Listing,
    check_regular,
    read_cars,
    read_cub,
    read_inshop,
    read_sop,
)
from glsd.packing.roles import RoleImage, RoleSummary, pack_roles


@dataclass(frozen=True, kw_only=True)
class RetrievalSet:
    """A benchmark: how to read it, where its owner publishes it, and its published size."""

    title: str
    owner: str
    published: dict[str, tuple[int, int]]  # images and classes of each role
    read: Callable[[Path], Listing]


def prepare(
    name: str,
    src: str | Path,
    dst: str | Path,
    *,
    shard_megabytes: int = 256,
    shuffle_seed: int = 0,
    allow_incomplete: bool = False,
) -> dict[str, RoleSummary]:
    """Pack a benchmark of ``RETRIEVAL_SETS``, as unpacked from its owner's archives, into one set of shards per role.

    Labels number the classes of all roles together. Raises UserError if an annotation file or an image is missing or
    damaged, an annotation file lists a path that leads out of the data set, or the counts of images and classes are not
    the published ones; with ``allow_incomplete`` images that are missing or damaged are left out and listed, and counts
    are as they come. The splits are those of Oh Song et al. (2016), Deep Metric Learning via Lifted Structured Feature
    Embedding, and for In-Shop of Liu et al. (2016), DeepFashion.
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
        _check_counts(listing, benchmark)
        missing = [image.path for image in listing.images if not os.path.isfile(listing.root / image.path)]
        if missing:
            raise UserError(
                f"{listing.root / missing[0]} is missing, one of {len(missing)} such images of {listing.source}: "
                f"{benchmark.owner}; or pack what is there with --allow_incomplete"
            )
    roles: dict[str, list[RoleImage]] = {role: [] for role in benchmark.published}
    for role, path, label in listing.images:
        roles[role].append(RoleImage(path, label, functools.partial(_read, listing.root / path)))
    restore = f"restore it ({benchmark.owner}), or leave such images out with --allow_incomplete"
    return pack_roles(
        roles,
        dst,
        classes=listing.classes,
        shard_megabytes=shard_megabytes,
        shuffle_seed=shuffle_seed,
        unreadable_hint=None if allow_incomplete else restore,
    )


def _read(file: Path) -> bytes:
    check_regular(file)
    return file.read_bytes()


def _check_listing(listing: Listing) -> None:
    """Raise UserError for a path out of the data set, an image listed twice and a class in training and test.

    Links in the data set may lead out of it: who owns the folder made them; annotation files may come from anyone.
    """
    role_of: dict[str, str] = {}
    training = {image.label for image in listing.images if image.role == "train"}
    for role, path, label in listing.images:
        # An empty part is a path that was absolute before its folder was put in front. NUL is not printable.
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


def _check_counts(listing: Listing, benchmark: RetrievalSet) -> None:
    for role, (num_images, num_classes) in benchmark.published.items():
        labels = [image.label for image in listing.images if image.role == role]
        if (len(labels), len(set(labels))) != (num_images, num_classes):
            raise UserError(
                f"{listing.source} lists {len(labels)} images of {len(set(labels))} classes for {role}, but "
                f"{benchmark.title} has {num_images} of {num_classes}: restore it ({benchmark.owner}), or pack what is "
                "there with --allow_incomplete"
            )


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
