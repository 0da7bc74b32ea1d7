"""``python launch/benchmark WHAT ...`` from any folder; the same as ``python -m launch.benchmark WHAT ...``."""

import os
import sys
from pathlib import Path

if __package__:
    from glsd.cli.door import run
    from launch.benchmark.main import main

    run(main)
else:  # started by its path: once more as a package, so that its files find each other
    places = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    os.execve(sys.executable, [sys.executable, "-m", "launch.benchmark", *sys.argv[1:]], environment)
