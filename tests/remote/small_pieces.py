"""launch/pretrain.py with small requests, so that the small shards of these tests come in several pieces."""

from glsd.cli import pretrain
from glsd.cli.door import run
from glsd.shards import remote

remote.PIECE = 100_000  # bytes

if __name__ == "__main__":
    run(pretrain.main)
