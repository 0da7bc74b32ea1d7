"""Whether packages are installed, fit together and can be imported. Needs only Python 3.8, so that it can report an old Python.

Versions come from metadata, and imports are tried in a child process. A broken torchvision breaks timm and accelerate, too, and
a program that imports them could no longer say why.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glsd.doctor.line import Line, plain, who
from glsd.errors import one_line

OLDEST, NEWEST = (3, 11), (3, 13)  # of Python
IMPORTED = ("torch", "torchvision", "numpy", "safetensors", "timm", "accelerate", "jaxtyping")
IMPORT_SECONDS = 180.0  # the first import from a cold network disk takes minutes
# Other ranks may try their imports, and then import everything once more, from a cold disk.
ARRIVE_SECONDS = IMPORT_SECONDS + 120.0
MARK = "glsd-doctor:"
TRY = """
import importlib, json, sys
errors = {}
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except BaseException as problem:
        errors[name] = f"{type(problem).__name__}: {problem}"
print("\\n" + sys.argv[1] + json.dumps(errors), flush=True)
import os
os._exit(0)
"""
BOTH = "install both in one command, so that they come from one place: pip install --force-reinstall"
TOGETHER = ("torch", "torchvision")


def requirements(pyproject: Path) -> dict[str, str]:
    """Return the lowest version of each package that glsd needs, by name: from the checkout, else from the installed glsd."""
    import tomllib  # missing in old Pythons, which are reported before

    if pyproject.is_file():
        entries = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
    else:
        entries = [entry for entry in importlib.metadata.requires("glsd") or () if "extra ==" not in entry]
    found = {}
    for entry in entries:
        name, _, smallest = re.sub(r"\[.*?\]", "", entry).partition(">=")
        found[name.strip()] = smallest.strip()
    return found


def facts(pyproject: Path) -> dict[str, Any]:
    """Return what is installed here, JSON for ``judge``."""
    python = sys.version_info[:2]
    found: dict[str, Any] = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "executable": sys.executable,
        "code": _code(),
        "needed": {},
        "versions": {},
        "pins": {},
        "errors": {},
    }
    if python < OLDEST:
        return found
    found["needed"] = requirements(pyproject)
    for name in found["needed"]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["versions"][name] = str(importlib.metadata.version(name))
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for entry in importlib.metadata.requires("torchvision") or ():
            if match := re.match(r"torch\s*\(?([<>=!~][^;)]*)\)?\s*(;|$)", entry):
                found["pins"]["torchvision"] = match[1].strip()
    there = [name for name in IMPORTED if name in found["versions"]]
    found["errors"] = try_imports(there)
    return found


def _code() -> str:
    """The folder of this glsd and a hash of its code."""
    folder = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"{folder} ({digest.hexdigest()[:8]})"


def try_imports(modules: Sequence[str], seconds: float = IMPORT_SECONDS) -> dict[str, str]:
    """Return the error of each module that cannot be imported; one child process tries them in order."""
    command = [sys.executable, *(["-P"] if sys.version_info >= (3, 11) else []), "-c", TRY, MARK, *modules]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, errors="replace")
    except subprocess.TimeoutExpired:
        return {" ".join(modules): f"importing them takes more than {seconds:.0f} s"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(MARK):
            return {name: plain(error) for name, error in json.loads(line[len(MARK) :]).items()}
    how = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    last = done.stderr.strip().splitlines()[-1:] or [""]
    return {" ".join(modules): f"importing them ends the process ({how}) {plain(last[0])}".strip()}


def usable(found: Mapping[str, Any]) -> bool:
    """Tell whether this rank can make the checks that need torch."""
    needed = ("torch", "numpy", "jaxtyping", "psutil")
    return bool(found["versions"]) and all(
        name in found["versions"] and not any(name in key.split() for key in found["errors"])
        for name in needed
    )


def judge(found: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]) -> list[Line]:
    """Return the lines about packages, from the facts of each rank."""
    lines = _same_everywhere(found, hosts)
    said: dict[Line, list[int]] = {}
    for rank, here in found.items():
        for line in _one(here):
            said.setdefault(line, []).append(rank)
    for line, ranks in said.items():
        where = f" on {who(ranks, hosts)}" if len(found) > 1 and len(ranks) < len(found) else ""
        lines.append(Line(line.verdict, line.name, line.found + where, line.fix))
    if not any(line.verdict == "FIX" for line in lines):
        first = found[min(found)]
        parts = ", ".join(f"{name} {first['versions'][name]}" for name in IMPORTED[:-1])
        same = f", the same on {len(found)} ranks" if len(found) > 1 else ""
        lines.insert(0, Line("ok", "versions", f"Python {first['python']}, {parts}{same}"))
    return lines


def _same_everywhere(found: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]) -> list[Line]:
    lines = []
    codes: dict[str, list[int]] = {}
    for rank, here in found.items():
        codes.setdefault(here["code"], []).append(rank)
    if len({code.rpartition(" ")[2] for code in codes}) > 1:
        parts = "; ".join(f"{code} on {who(ranks, hosts)}" for code, ranks in codes.items())
        lines.append(Line("FIX", "code", f"glsd differs: {parts}", "bring all hosts to one commit"))
    names = {name for here in found.values() for name in here["needed"]}
    for name in ("python", *sorted(names)):
        by_version: dict[str, list[int]] = {}
        for rank, here in found.items():
            version = here["python"] if name == "python" else here["versions"].get(name, "missing")
            by_version.setdefault(version, []).append(rank)
        if len(by_version) > 1:
            common = max(by_version, key=lambda version: (version != "missing", len(by_version[version])))
            parts = "; ".join(f"{version} on {who(ranks, hosts)}" for version, ranks in by_version.items())
            how = (
                f"start every rank with Python {common}"
                if name == "python"
                else f"pip install '{name}=={common}'"
            )
            lines.append(Line("FIX", "versions", f"{name} differs: {parts}", f"{how} on the other ranks"))
    return lines


def _one(here: Mapping[str, Any]) -> list[Line]:
    python = tuple(int(part) for part in here["python"].split(".")[:2])
    if python < OLDEST:
        fix = f"start it with Python {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
        return [Line("FIX", "python", f"Python {here['python']} ({here['executable']}) is too old", fix)]
    lines = []
    if python > NEWEST:
        fix = f"if something fails, try {NEWEST[0]}.{NEWEST[1]}"
        lines.append(
            Line(
                "note",
                "python",
                f"Python {here['python']} is newer than the versions glsd is tested with",
                fix,
            )
        )
    versions, needed, errors = here["versions"], here["needed"], here["errors"]
    absent = [name for name in needed if name not in versions]
    if absent:
        shown = ", ".join(absent[:6]) + (f" and {len(absent) - 6} more" if len(absent) > 6 else "")
        fix = "activate the environment of glsd, or: pip install -e . (in the checkout)"
        lines.append(Line("FIX", "packages", f"not installed for {here['executable']}: {shown}", fix))
    old = [name for name in needed if name in versions and _less(versions[name], needed[name])]
    if old:
        shown = ", ".join(f"{name} {versions[name]}" for name in old)
        fix = "pip install " + " ".join(f"'{name}>={needed[name]}'" for name in old)
        lines.append(Line("FIX", "packages", f"too old: {shown}", fix))
    return lines + _torch_and_torchvision(here) + _other_errors(errors)


def _torch_and_torchvision(here: Mapping[str, Any]) -> list[Line]:
    versions, error = here["versions"], here["errors"].get("torchvision", "")
    if not all(name in versions for name in TOGETHER):
        return []
    torch, vision = versions["torch"], versions["torchvision"]
    pair = f"torch {torch} and torchvision {vision}"
    fix = f"{BOTH} 'torch=={torch.partition('+')[0]}' torchvision"
    if "torch" in here["errors"]:
        return []  # reported by _other_errors
    if error:
        return [Line("FIX", "torchvision", f"{pair} do not belong together ({one_line(error)})", fix)]
    pin = here["pins"].get("torchvision", "")
    if pin and not _fits(torch, pin):
        return [Line("FIX", "torchvision", f"{pair} do not belong together: that one needs torch {pin}", fix)]
    labels = [version.partition("+")[2] for version in (torch, vision)]
    if labels[0] != labels[1]:
        return [
            Line("note", "torchvision", f"{pair} are different builds, although they can be imported", fix)
        ]
    return []


def _other_errors(errors: Mapping[str, str]) -> list[Line]:
    lines, vision = [], errors.get("torchvision", "")
    for name, error in errors.items():
        if name == "torchvision" or (vision and error == vision):
            continue  # timm and other packages only repeat the error of torchvision
        if vision and name in ("timm", "accelerate"):
            continue
        what = f"cannot import {name}: {one_line(error)}"
        lines.append(Line("FIX", "packages", what, f"pip install --force-reinstall --no-deps {name}"))
    return lines


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"\d+(\.\d+)*", version.partition("+")[0])
    numbers = [int(part) for part in release[0].split(".")] if release else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _less(version: str, smallest: str) -> bool:
    return _numbers(version) < _numbers(smallest)


def _fits(version: str, pins: str) -> bool:
    """Tell whether a version meets pins such as ``==2.9.0`` or ``>=2.9,<2.10``; unknown kinds of pins count as met."""
    own = _numbers(version)
    for pin in pins.split(","):
        sign, other = re.match(r"\s*([<>=!~]*)\s*(.*)", pin).groups()  # type: ignore[union-attr]
        wanted = _numbers(other)
        meets = {"==": own == wanted, ">=": own >= wanted, "<": own < wanted, ">": own > wanted}
        if "*" not in other and not meets.get(sign, True):
            return False
    return True
