"""A program, run by glsd.packing.retrieval_files: variables of the MATLAB file on its standard input as JSON.

Damaged files can crash SciPy's reader or make it ask for any amount of memory, which a caller can only survive in
another process. It imports nothing of glsd, so that it starts fast and needs little memory. Arguments: the limit of its
memory in MiB, and as JSON the wanted variables, each with the fields to take of its structs (none: its elements).
"""

import contextlib
import json
import sys

import numpy as np
from scipy.io import loadmat

MAX_OUTPUT = 2**26  # characters, a hundred times those of a whole list of Cars-196


def limit_memory(megabytes: int) -> None:
    """Limit the address space of this process and leave no core dump behind, where the system can."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (megabytes * 2**20, megabytes * 2**20))


def plain(value: object) -> str | int | None:
    """Return a text or whole number as such, None for anything else."""
    if isinstance(value, str):
        return str(value)
    return int(value) if isinstance(value, int | np.integer) and not isinstance(value, bool) else None


def main() -> None:
    """Print the variables as JSON, or end with an error whose last line says why."""
    limit_memory(int(sys.argv[1]))
    wanted: dict[str, list[str]] = json.loads(sys.argv[2])
    # Cells and structs become arrays without axes of length 1; no code is run.
    content = loadmat(sys.stdin.buffer, squeeze_me=True, variable_names=list(wanted))
    found: dict[str, list] = {}
    for variable, fields in wanted.items():
        if variable not in content:
            sys.exit(f"it has no variable {variable!r}")
        rows = np.atleast_1d(content[variable]).ravel()
        if lacking := set(fields) - set(rows.dtype.names or ()):
            sys.exit(f"its {variable} lack the field {min(lacking)!r}")
        columns = [[plain(value) for value in rows[field].tolist()] for field in fields]
        found[variable] = (
            list(zip(*columns, strict=True)) if fields else [plain(value) for value in rows.tolist()]
        )
    text = json.dumps(found)
    if len(text) > MAX_OUTPUT:
        sys.exit("it holds far more than such a file should")
    print(text)


if __name__ == "__main__":
    main()
