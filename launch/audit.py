"""Report what is wrong with shards: ``launch/audit.py train=shards/train-*.tar``."""

from glsd.cli.main import run

if __name__ == "__main__":
    run("audit")
