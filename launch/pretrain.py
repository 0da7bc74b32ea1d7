"""Pretrain a vision backbone without labels: ``accelerate launch launch/pretrain.py --config configs/pretrain/... ``."""

import _door

from glsd.command_line import load
from glsd.config import PretrainConfig
from glsd.pretrain import pretrain
from glsd.runtime import dist


def main(argv: list[str]) -> None:
    pretrain(load(PretrainConfig, argv))
    dist.finish()


if __name__ == "__main__":
    _door.run(main)
