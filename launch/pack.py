"""Make tar shards of images: ``launch/pack.py photos/ shards/``."""

from glsd.cli.main import run

if __name__ == "__main__":
    run("pack")
