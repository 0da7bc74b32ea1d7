"""One rank of the doctor, for tests: its packages are taken as given, which saves the seconds of trying them.

python doctor_rank.py FACTS CLOCK_AHEAD WHAT [arguments of launch/doctor.py]; WHAT: ``as it is``, or what this rank does wrong.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "launch"))

import doctor

from glsd import cluster_doctor
from glsd.runtime import doctor_devices, doctor_packages


def main(facts: str, ahead: str, what: str, *argv: str) -> None:
    packages, examine = json.loads(Path(facts).read_text()), cluster_doctor.examine
    doctor_packages.facts = lambda pyproject: packages
    cluster_doctor.examine = lambda *given, **named: examine(
        *given, **named, clock=lambda: time.time() + float(ahead)
    )
    if what == "hangs":
        cluster_doctor.DEVICE_SECONDS = 2.0
        doctor_devices.facts = lambda: time.sleep(1000) or {}
    if what == "waits less":
        cluster_doctor.DEVICE_SECONDS = 2.0
    if what == "dies":
        doctor_devices.facts = lambda: os._exit(9)
    code = doctor.main(list(argv))
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
