"""Check this machine or cluster before a run: ``accelerate launch ... launch/doctor.py --out runs --shards ...``."""

import importlib.util
import sys
from pathlib import Path

# The doctor also tells that glsd is not installed, so it starts from a bare checkout.
installed = importlib.util.find_spec("glsd") is not None
if not installed:
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from glsd.cli.doctor import exit_with, main  # noqa: E402

if __name__ == "__main__":
    exit_with(main(sys.argv[1:], installed=installed))
