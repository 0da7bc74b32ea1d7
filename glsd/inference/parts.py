"""A long job in parts: each holds the vectors of a fixed number of images, and is written once, as a whole."""

import contextlib
import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import Timeout
from jaxtyping import Float32, Int64
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from glsd.errors import UserError, one_line
from glsd.files import locked, replacing
from glsd.inference.embed import Unreadable

PLAN_FILE, LOCK_FILE = "plan.json", "lock"
MOST, FEWEST, SPREAD = 8192, 32, 64  # images of a part: 1/64 of all, within these limits


class DamagedPart(UserError):
    """A part is not as it was written; it can be made again."""


class Part(NamedTuple):
    """The vectors of the readable images of one part."""

    numbers: Int64[np.ndarray, " m"]  # ascending
    vectors: Float32[np.ndarray, "m d"]
    unreadable: list[Unreadable]


class Parts:
    """The parts of one job, below a folder. Part i holds the images from i * size on.

    plan: what decides the vectors; every part says for which plan it was made. compared: as for ``difference``.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any], *, compared: Mapping[str, str]):
        self.folder, self.plan, self.compared = folder, plan, compared
        self.total: int = plan["images"]
        self.size = part_size(self.total)
        self.count = -(-self.total // self.size)
        told = json.dumps([[key, plan[key]] for key in self.compared])
        self.digest = hashlib.sha256(told.encode()).hexdigest()

    def numbers(self, part: int) -> range:
        """Return the numbers of a part's images."""
        return range(part * self.size, min(self.total, (part + 1) * self.size))

    @contextlib.contextmanager
    def opened(self) -> Iterator[list[int]]:
        """Hold the folder for this process, and give the parts that are missing or damaged.

        Raises UserError if the folder holds parts of another plan, another process works on it, or it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = contextlib.ExitStack()
            lock.enter_context(locked(self.folder / LOCK_FILE, timeout=0.0))
        except Timeout as error:
            raise UserError(f"{self.folder}: another process writes these parts: wait for it") from error
        except OSError as error:
            raise UserError(f"cannot write {self.folder}: {one_line(error)}") from error
        with lock:
            self._check_plan()
            for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed
                leftover.unlink(missing_ok=True)
            yield [part for part in range(self.count) if not self._is_whole(part)]

    def write(self, part: int, found: Part) -> None:
        """Write one part, atomically. Raises UserError if it cannot be written."""
        unreadable = json.dumps([tuple(entry) for entry in found.unreadable])
        tensors = {"numbers": found.numbers, "vectors": found.vectors}
        told = {"plan": self.digest, "unreadable": unreadable, "crc32": str(_crc32(found, unreadable))}
        try:
            with replacing(self._file(part)) as file:
                file.write(save(tensors, told))
        except OSError as error:
            raise UserError(
                f"cannot write {self._file(part)}: {one_line(error)}; the same command goes on from here"
            ) from error

    def read(self, part: int) -> Part:
        """Return one part. Raises DamagedPart, and UserError if it is of another plan."""
        file = self._file(part)
        try:
            with safe_open(file, "numpy") as opened:
                told = opened.metadata() or {}
                found = Part(
                    opened.get_tensor("numbers"),
                    opened.get_tensor("vectors"),
                    [Unreadable(*entry) for entry in json.loads(told["unreadable"])],
                )
                crc32 = int(told["crc32"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise DamagedPart(f"{file} is damaged: {one_line(error)}") from error
        if crc32 != _crc32(found, told["unreadable"]):
            raise DamagedPart(f"{file} is damaged: its checksum is another one")
        if told.get("plan") != self.digest:
            raise UserError(
                f"{file} was made for another model, other images or other settings: delete {self.folder}"
            )
        seen = sorted([*found.numbers.tolist(), *(entry.number for entry in found.unreadable)])
        if seen != list(self.numbers(part)):
            raise DamagedPart(f"{file} is damaged: it holds other images")
        return found

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.safetensors"

    def _is_whole(self, part: int) -> bool:
        if not self._file(part).exists():
            return False
        try:
            self.read(part)
        except DamagedPart as error:
            print(f"warning: {error}; it is made again", flush=True)
            return False
        return True

    def _check_plan(self) -> None:
        """Write the plan, or compare it with the one that the folder was made for."""
        file = self.folder / PLAN_FILE
        try:
            if not file.exists():
                if any(self.folder.glob("part-*.safetensors")):
                    raise UserError(
                        f"{self.folder} holds parts but no {PLAN_FILE}: delete it and start again"
                    )
                with replacing(file) as opened:
                    opened.write(json.dumps(self.plan, indent=1).encode())
            before = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {file}: {one_line(error)}; delete {self.folder}") from error
        what = difference(before, self.plan, self.compared)
        if what:
            raise UserError(
                f"{self.folder} holds parts of another call: {what}; repeat that one, choose another --out, or delete the folder"
            )


def difference(before: Any, now: Mapping[str, Any], keys: Mapping[str, str]) -> str:
    """Return in words the first difference between two plans; "" if they agree.

    keys: those that must agree -> the key that says it to a person.
    """
    before = before if isinstance(before, dict) else {}
    for key, said in keys.items():
        if before.get(key) != now[key]:
            then, what = before.get(said), said.replace("_", " ")
            if then == now[said]:
                return f"the {what} {then!r} has changed since"
            return f"the {what} was {then!r}, now {now[said]!r}"
    return ""


def part_size(total: int) -> int:
    """Return the number of images of a part. It depends on the number of images alone, so ranks do not change it."""
    return min(MOST, max(FEWEST, -(-total // SPREAD)))


def _crc32(found: Part, unreadable: str) -> int:
    start = zlib.crc32(np.ascontiguousarray(found.numbers).data, zlib.crc32(unreadable.encode()))
    return zlib.crc32(np.ascontiguousarray(found.vectors).data, start)
