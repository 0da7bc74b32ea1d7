"""One rank of the doctor, for tests: its packages are taken as given, which saves the seconds of trying them.

python doctor_rank.py FACTS CLOCK_AHEAD WHAT [arguments of launch/doctor.py]; WHAT: ``as it is``, or what this rank does wrong.

python doctor_rank.py serve    # forks ranks within milliseconds, as everything is imported: a line of input is a JSON list of
{"argv", "env", "out"}, one per rank; the answer, once all have ended, the list of their exit codes
"""

import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from glsd.cli import doctor
from glsd.doctor import arrival, devices, files, network, packages, panel
from glsd.doctor import run as checks

MOST_SECONDS = 150


def good_packages() -> dict:
    """Facts of an environment in which all is well, as this one's may not be."""
    needed = packages.requirements(Path(__file__).parents[2] / "pyproject.toml")
    found = {"python": "3.12.1", "executable": "python", "code": "here (1)", "needed": needed}
    return found | {"versions": dict.fromkeys(needed, "9999.0"), "pins": {}, "errors": {}}


def main(facts: str, ahead: str, what: str, *argv: str) -> None:
    found, examine = json.loads(Path(facts).read_text()), checks.examine
    packages.facts = lambda pyproject: found
    checks.examine = lambda *given, **named: examine(*given, **named, now=lambda: time.time() + float(ahead))
    if what == "impatient":
        files.SEE_SECONDS, network.JOIN_SECONDS = 3.0, 5.0
    if what in ("hangs", "dies", "waits less"):
        for module in (checks, arrival, panel):
            vars(module)["SLACK"] = 3.0
        checks.DEVICE_SECONDS = 2.0
    if what == "hangs":
        devices.facts = lambda: {"never": threading.Event().wait()}
    if what == "dies":
        devices.facts = die
    code = doctor.main(list(argv))
    sys.stdout.flush()
    os._exit(code)


def die() -> dict:
    """A moment later: the others have heard of this check by then."""
    time.sleep(0.5)
    os._exit(9)


def serve() -> None:
    """Fork ranks as they are ordered."""
    importlib.import_module("glsd.doctor.shards")
    assert threading.active_count() == 1, f"would not survive a fork: {threading.enumerate()}"
    gc.freeze()  # a fork that collects would copy every page
    for line in sys.stdin:
        pids = [begin(order) for order in json.loads(line)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)
    os._exit(0)


def begin(order: dict) -> int:
    """Fork a rank; what it prints goes to ``out`` and ``out``.err."""
    if pid := os.fork():
        return pid
    try:
        signal.alarm(MOST_SECONDS)
        os.environ.clear()
        os.environ.update(order["env"])
        for target, path in ((1, order["out"]), (2, order["out"] + ".err")):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), target)
        main(*order["argv"])
    finally:  # main does not return
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # never back into the server


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main(*sys.argv[1:])
