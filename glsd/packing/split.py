"""Packed labeled shards, packed again: split by class, or into the roles that a table gives each image."""

import functools
import gzip
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from glsd.errors import UserError
from glsd.packing.roles import RoleImage, RoleSummary, pack_roles
from glsd.shards.store import (
    CLASSES_FILE,
    ShardSet,
    open_shards,
    read_classes,
)

JSON_LINES, TSV = (".jsonl", ".jsonl.gz"), (".tsv", ".tsv.gz")
MAX_LINE = 2**20  # characters: a small .gz can hold a line that fills the memory


def split_shards(
    patterns: str | Sequence[str],
    dst: str | Path,
    *,
    test_share: float = 0.5,
    classes_file: str | Path | None = None,
    shard_megabytes: int = 256,
    shuffle_seed: int = 0,
) -> dict[str, RoleSummary]:
    """Pack shards again as train and test shards without a class in common.

    Of the classes that occur, in the order of their labels, the first ones train and the last ``test_share`` of them
    (a half goes to training) test, as the benchmarks of the field do. Labels stay as they are. Class names come from
    ``classes_file`` (a name a line, in the order of the labels, or a .json list) or else from the classes.json beside
    the shards. Raises UserError as open_shards and pack_roles do, for images without label, and for a share that leaves
    a side without class.
    """
    shards = open_shards(patterns)
    labels = _labels(shards)
    found = sorted(set(labels))
    num_train = math.floor(len(found) * (1 - test_share) + 0.5) if 0 < test_share < 1 else 0
    if not 0 < num_train < len(found):
        raise UserError(
            f"test_share {test_share} of {len(found)} classes leaves nothing to train or to test on: expected a share "
            "between 0 and 1, and at least 2 classes"
        )
    names = _class_names(shards) if classes_file is None else _named(Path(classes_file))
    training = set(found[:num_train])
    roles: dict[str, list[RoleImage]] = {"train": [], "test": []}
    for number, label in enumerate(labels):
        roles["train" if label in training else "test"].append(_image(shards, number, label))
    return pack_roles(roles, dst, classes=names, shard_megabytes=shard_megabytes, shuffle_seed=shuffle_seed)


def assign_roles(
    patterns: str | Sequence[str],
    dst: str | Path,
    *,
    table: str | Path,
    field: str,
    roles: Mapping[str, Sequence[str]],
    shard_megabytes: int = 256,
    shuffle_seed: int = 0,
) -> dict[str, RoleSummary]:
    """Pack shards again as one set of shards per role, where ``table`` gives the value of ``field`` for each key.

    ``roles``: the values of each role. The table is .jsonl (an object with "key" a line) or .tsv (with a header line),
    plain or .gz; rows of keys that the shards lack are ignored. Labels and class names stay as they are. Raises
    UserError as open_shards and pack_roles do, for a table that cannot be read, lacks a key or has one twice, a value
    of two roles or of none, a role without image, a key that two samples have, and images without label.
    """
    role_of = _role_of(roles)
    shards = open_shards(patterns)
    labels = _labels(shards)
    values = _read_table(Path(table), field)
    packed: dict[str, list[RoleImage]] = {role: [] for role in roles}
    lost: Counter[str] = Counter()
    seen: set[str] = set()
    for number, label in enumerate(labels):
        key = shards.key(number)
        if key in seen:
            raise UserError(
                f"key {key} of {shards.shard_of(number)} occurs twice in the shards given: {table} cannot tell which is meant"
            )
        seen.add(key)
        if key not in values:
            raise UserError(f"{table} has no key {key}, which {shards.shard_of(number)} has")
        if values[key] in role_of:
            packed[role_of[values[key]]].append(_image(shards, number, label))
        else:
            lost[values[key]] += 1
    if lost:
        value, count = lost.most_common(1)[0]
        raise UserError(
            f"{count} images have {field} {value!r}, which belongs to no role: name it, for example --role unused={value}"
        )
    for role, images in packed.items():
        if not images:
            raise UserError(
                f"role {role} gets no image: {field} has the values {', '.join(sorted(set(values.values()))[:9])}"
            )
    return pack_roles(
        packed,
        dst,
        classes=_class_names(shards),
        shard_megabytes=shard_megabytes,
        shuffle_seed=shuffle_seed,
    )


def parse_roles(given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the values of each role from texts such as ``gallery=train,val``; UserError for others or one twice."""
    roles: dict[str, tuple[str, ...]] = {}
    for text in given:
        role, equals, values = text.partition("=")
        if not role or not equals or not all(values.split(",")):
            raise UserError(f"role {text!r}: expected a role and its values, such as gallery=train,val")
        if role in roles:
            raise UserError(f"role {role} is given twice: list its values once, separated by commas")
        roles[role] = tuple(values.split(","))
    return roles


def _role_of(roles: Mapping[str, Sequence[str]]) -> dict[str, str]:
    if not roles:
        raise UserError("no roles given: expected for example --role query=test --role gallery=train,val")
    role_of: dict[str, str] = {}
    for role, values in roles.items():
        for value in values:
            if value in role_of:
                raise UserError(
                    f"value {value!r} is given to {role_of[value]} and to {role}: an image has one role"
                )
            role_of[value] = role
    return role_of


def _labels(shards: ShardSet) -> list[int]:
    labels = shards.labels().tolist()
    if -1 in labels:
        number = labels.index(-1)
        raise UserError(
            f"{labels.count(-1)} of {len(labels)} images have no label, first {shards.key(number)} in "
            f"{shards.shard_of(number)}: expected a .cls member beside every image"
        )
    return labels


def _image(shards: ShardSet, number: int, label: int) -> RoleImage:
    return RoleImage(
        f"{shards.shard_of(number)}/{shards.key(number)}", label, functools.partial(shards.read, number)
    )


def _class_names(shards: ShardSet) -> list[str]:
    """The names beside the shards, none if there are none; UserError if two folders have different ones."""
    folders = dict.fromkeys(os.path.dirname(path) for path in shards.paths)
    files = [Path(folder, CLASSES_FILE) for folder in folders]
    there = [file for file in files if file.is_file()]
    if not there:
        return []
    names = read_classes(there[0])
    for file in files:
        if not file.is_file() or read_classes(file) != names:
            raise UserError(
                f"{there[0]} and {file} do not say the same: a label must mean one class in all shards given"
            )
    return names


def _named(file: Path) -> list[str]:
    if file.suffix == ".json":
        return read_classes(file)
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file} ({error}): expected a class name a line") from error
    if not all(names):
        raise UserError(f"{file}, line {names.index('') + 1} is empty: expected a class name a line")
    return names


def _read_table(path: Path, field: str) -> dict[str, str]:
    """Return the value of ``field`` for each key."""
    if not path.name.endswith(JSON_LINES + TSV):
        raise UserError(f"table {path}: expected a file of one of the kinds {', '.join(JSON_LINES + TSV)}")
    values: dict[str, str] = {}
    number = 0
    columns: list[str] | None = None
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), ""), 1):
                if len(line) > MAX_LINE:
                    raise ValueError(f"longer than {MAX_LINE} characters: expected a row a line")
                if number == 1 and path.name.endswith(TSV):
                    columns = _tsv_header(line)
                    continue
                row = json.loads(line) if columns is None else _tsv_row(line, columns)
                if not isinstance(row, dict) or "key" not in row or field not in row:
                    raise ValueError(f"expected at least 'key' and {field!r}, found {line.strip()[:99]!r}")
                key = _text(row["key"])
                if key in values:
                    raise ValueError(f"the key {key} comes again: expected each key once")
                values[key] = _text(row[field])
    except (ValueError, RecursionError) as error:  # RecursionError: JSON nested deeply
        raise UserError(f"table {path}, line {number}: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read table {path}: {error}") from error
    if not values:
        raise UserError(f"table {path} has no rows: expected one for each key of the shards")
    return values


def _tsv_header(line: str) -> list[str]:
    columns = line.rstrip("\r\n").split("\t")
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise ValueError(f"the column {twice[0]!r} comes twice: expected each column once")
    return columns


def _tsv_row(line: str, columns: list[str]) -> dict[str, str]:
    cells = line.rstrip("\r\n").split("\t")
    if len(cells) != len(columns):
        raise ValueError(f"expected the columns {', '.join(columns)}, found {line.strip()[:99]!r}")
    return dict(zip(columns, cells, strict=True))


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
