"""What job.sh asks before a job: ``flags.py STAGE ...`` checks flags, ``flags.py line FILE N`` prints a task of a sweep."""

from glsd.cli.door import run
from glsd.slurm.flags import main

if __name__ == "__main__":
    run(main)
