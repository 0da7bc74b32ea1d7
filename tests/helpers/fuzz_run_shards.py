"""python fuzz_run_shards.py SEED COUNT FOLDER: open and read mutated shards, then as many mutated indices / 2, rows of JSON."""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from glsd.data.crops import crop_sample
from glsd.errors import BrokenImage, UserError
from glsd.shards.index import build_index, index_path, write_index
from glsd.shards.store import ShardSet, open_shards
from tests.helpers import fuzz_shards, fuzz_watch
from tests.helpers.usual_spec import usual_spec

SPEC = usual_spec(global_size=8, local_size=8, num_local=0)
MEMORY = 1 << 30


def read_all(shards: ShardSet) -> dict[str, Any]:
    outcome: dict[str, Any] = {"samples": [], "broken": []}
    for number in range(len(shards)):
        key = shards.key(number)
        try:
            raw = shards.read(number)
            crop_sample(raw, SPEC, seed=0, epoch=0, position=number)
            outcome["samples"].append([key, shards.label(number), hash(raw)])
        except BrokenImage as error:
            outcome["broken"].append([key, str(error)])
    return outcome


def attempt(path: Path, seen: list[str], before: int) -> dict[str, Any]:
    seen.clear()
    try:
        outcome = read_all(open_shards(str(path)))
    except UserError as error:
        outcome = {"error": str(error)}
    except Exception as error:  # noqa: BLE001 - the question is which ones escape
        outcome = {"escaped": repr(error)}
    return {**outcome, "seen": list(seen), "grown": fuzz_watch.peak_bytes() - before}


def main(seed: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    shards = fuzz_shards.originals()
    wholes = {}
    for name, raw in shards.items():  # whatever is imported on first use
        path = folder / f"{name}.tar"
        path.write_bytes(raw)
        wholes[name] = read_all(open_shards(str(path)))
    whole = folder / "pax.tar"
    write_index(build_index(whole), index_path(whole), shard_name=whole.name)
    sidecar = index_path(whole).read_bytes()
    fuzz_watch.bound_memory(MEMORY)
    before = fuzz_watch.peak_bytes()
    seen = fuzz_watch.watch(may_write=str(folder))

    def shard(number: int) -> dict[str, Any]:
        name, raw = fuzz_shards.mutated(number, shards, seed)
        path = folder / f"{number}.tar"
        path.write_bytes(raw)
        return {"name": name, **attempt(path, seen, before)}

    def index(number: int) -> dict[str, Any]:
        index_path(whole).write_bytes(fuzz_shards.mutated_index(number, sidecar, seed))
        row = attempt(whole, seen, before)
        same = {key: row.get(key) for key in ("samples", "broken")} == wholes["pax"]
        return {"name": "index", "same": same, **row}

    fuzz_watch.go_through(range(count), shard)
    fuzz_watch.go_through(range(count // 2), index)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
