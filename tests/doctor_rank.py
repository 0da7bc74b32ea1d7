"""One rank of the doctor, for tests: its packages are taken as given, which saves the seconds of trying them.

python doctor_rank.py FACTS CLOCK_AHEAD WHAT [arguments of launch/doctor.py]; WHAT: ``as it is``, or what this rank does wrong.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "launch"))

import doctor

from glsd import cluster_doctor
from glsd.runtime import doctor_devices, doctor_files, doctor_network, doctor_packages


def good_packages() -> dict:
    """Facts of an environment in which all is well, as this one's may not be."""
    needed = doctor_packages.requirements(Path(__file__).parents[1] / "pyproject.toml")
    found = {"python": "3.12.1", "executable": "python", "code": "here (1)", "needed": needed}
    return found | {"versions": dict.fromkeys(needed, "9999.0"), "pins": {}, "errors": {}}


def main(facts: str, ahead: str, what: str, *argv: str) -> None:
    packages, examine = json.loads(Path(facts).read_text()), cluster_doctor.examine
    doctor_packages.facts = lambda pyproject: packages
    cluster_doctor.examine = lambda *given, **named: examine(
        *given, **named, clock=lambda: time.time() + float(ahead)
    )
    if what == "impatient":
        doctor_files.SEE_SECONDS, doctor_network.JOIN_SECONDS = 3.0, 5.0
    if what == "hangs":
        cluster_doctor.DEVICE_SECONDS = 2.0
        doctor_devices.facts = lambda: {"never": threading.Event().wait()}
    if what == "waits less":
        cluster_doctor.DEVICE_SECONDS = 2.0
    if what == "dies":
        doctor_devices.facts = lambda: os._exit(9)
    code = doctor.main(list(argv))
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
