"""One rank of the doctor, for tests: its packages are taken as given, which saves the seconds of trying them.

python doctor_rank.py FACTS CLOCK_AHEAD WHAT [arguments of launch/doctor.py]; WHAT: ``as it is``, or what this rank does wrong.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

from glsd.cli import doctor
from glsd.doctor import arrival, devices, files, network, packages, panel
from glsd.doctor import run as checks


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


if __name__ == "__main__":
    main(*sys.argv[1:])
