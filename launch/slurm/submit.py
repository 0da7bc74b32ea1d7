"""Submit a stage, a sweep or a pipeline to SLURM: ``launch/slurm/submit.py pretrain --nodes 2 ... -- --config ...``."""

from glsd.cli.main import run

if __name__ == "__main__":
    run("submit")
