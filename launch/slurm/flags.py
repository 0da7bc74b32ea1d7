"""Check flags for job.sh: ``flags.py STAGE ...`` prints the run folder, ``flags.py line FILE N`` a task of a sweep."""

from glsd.cli.door import run
from glsd.slurm.flags import main

if __name__ == "__main__":
    run(main)
