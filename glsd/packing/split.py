"""Packing labeled shards again: split by class, or by the role that a table gives each image."""

import gzip
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glsd.errors import UserError
from glsd.packing.source import Source
from glsd.packing.write import PackSummary, pack_sources
from glsd.shards.labels import CLASSES_FILE, read_classes
from glsd.shards.store import ShardSet, open_shards

JSON_LINES, TSV = (".jsonl", ".jsonl.gz"), (".tsv", ".tsv.gz")
MAX_LINE = 2**20  # characters: a small .gz can hold a line that fills the memory


def split_shards(
    patterns: str | Sequence[str],
    dst: str | Path,
    *,
    test_share: float = 0.5,
    classes_file: str | Path | None = None,
    **settings: Any,
) -> dict[str, PackSummary]:
    """Pack labeled shards again as train and test shards without a common class; ``settings`` as pack_sources.

    Of the classes that occur, in label order, the last ``test_share`` are for testing (a half is for training), as in the
    benchmarks of the field. Labels stay as they are. Class names come from ``classes_file`` (a name a line in label order,
    or a .json list), by default from the classes.json beside the shards.
    Raises UserError for an image without label and for a share that leaves a side without class, and as open_shards and
    pack_sources do.
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
    names = _class_names(shards) if classes_file is None else _read_names(Path(classes_file))
    training = set(found[:num_train])
    numbers: dict[str, list[int]] = {"train": [], "test": []}
    for number, label in enumerate(labels):
        numbers["train" if label in training else "test"].append(number)
    return _pack(_sources(shards, labels, numbers, names), shards, dst, settings)


def assign_roles(
    patterns: str | Sequence[str],
    dst: str | Path,
    *,
    table: str | Path,
    field: str,
    roles: Mapping[str, Sequence[str]],
    **settings: Any,
) -> dict[str, PackSummary]:
    """Pack labeled shards again as one set of shards per role, chosen by a table; ``settings`` as pack_sources.

    table: .jsonl (an object with "key" a line) or .tsv (with a header line), plain or .gz; keys that the shards lack are
    ignored. field: the column that decides. roles: the values of that column for each role. Labels and class names stay as
    they are.
    Raises UserError for a table that cannot be read, lacks a key or repeats one, a value of no role or of two, a role
    without image, a key of two samples and an image without label, and as open_shards and pack_sources do.
    """
    role_of = _role_of(roles)
    shards = open_shards(patterns)
    labels = _labels(shards)
    values = _read_table(Path(table), field)
    numbers: dict[str, list[int]] = {role: [] for role in roles}
    without_role: Counter[str] = Counter()
    seen: set[str] = set()
    for number in range(len(shards)):
        key = shards.key(number)
        if key in seen:
            raise UserError(
                f"key {key} of {shards.shard_of(number)} occurs twice in the shards given: {table} cannot tell which is meant"
            )
        seen.add(key)
        if key not in values:
            raise UserError(f"{table} has no key {key}, which {shards.shard_of(number)} has")
        if values[key] in role_of:
            numbers[role_of[values[key]]].append(number)
        else:
            without_role[values[key]] += 1
    if without_role:
        value, count = without_role.most_common(1)[0]
        raise UserError(
            f"{count} images have {field} {value!r}, which belongs to no role: name it, for example --role unused={value}"
        )
    for role in roles:
        if not numbers[role]:
            raise UserError(
                f"role {role} gets no image: {field} has the values {', '.join(sorted(set(values.values()))[:9])}"
            )
    return _pack(_sources(shards, labels, numbers, _class_names(shards)), shards, dst, settings)


def _pack(
    sources: Mapping[str, Source], shards: ShardSet, dst: str | Path, settings: Mapping[str, Any]
) -> dict[str, PackSummary]:
    """Pack some of the samples of shards; the last summary says what all of them leave behind."""
    summaries = pack_sources(sources, dst, **settings)
    last = next(reversed(summaries))
    return {**summaries, last: replace(summaries[last], notes=tuple(shards.unused_members()))}


def parse_roles(given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the values of each role from texts such as ``gallery=train,val``.

    Raises UserError for other texts and for a role that comes twice.
    """
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
    shards.check_labeled()
    return shards.labels().tolist()


def _sources(
    shards: ShardSet, labels: Sequence[int], numbers: Mapping[str, Sequence[int]], classes: Sequence[str]
) -> dict[str, Source]:
    """Return a source for each role, of the samples with the given numbers."""
    return {
        role: Source(
            title=f"role {role}",
            names=[f"{shards.shard_of(number)}/{shards.key(number)}" for number in chosen],
            read=_SampleReader(shards, chosen),
            labels=[labels[number] for number in chosen],
            classes=classes,
            keeps_extensions=False,
        )
        for role, chosen in numbers.items()
    }


class _SampleReader:
    """Reads some samples of a shard set, by their place among them."""

    def __init__(self, shards: ShardSet, numbers: Sequence[int]):
        self._shards, self._numbers = shards, numbers

    def __call__(self, place: int) -> bytes:
        return self._shards.read(self._numbers[place])


def _class_names(shards: ShardSet) -> list[str]:
    """Return the class names beside the shards, or none; UserError if two folders have different ones."""
    folders = dict.fromkeys(os.path.dirname(path) for path in shards.paths)
    files = [Path(folder, CLASSES_FILE) for folder in folders]
    existing = [file for file in files if file.is_file()]
    if not existing:
        return []
    names = read_classes(existing[0])
    for file in files:
        if not file.is_file() or read_classes(file) != names:
            raise UserError(
                f"{existing[0]} and {file} name different classes: a label must mean one class in all shards given"
            )
    return names


def _read_names(file: Path) -> list[str]:
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
