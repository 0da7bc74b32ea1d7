"""Pretrain a vision backbone without labels: ``accelerate launch launch/pretrain.py --config configs/pretrain/... ``.

With ``--dry_run`` it takes a few steps, says whether the run fits and how long it takes, and keeps nothing.
"""

import _door

from glsd.command_line import load
from glsd.config import PretrainConfig
from glsd.forecast import forecast
from glsd.pretrain import pretrain
from glsd.runtime import ending

DRY_RUN = "--dry_run"


def main(argv: list[str]) -> None:
    cfg = load(PretrainConfig, [word for word in argv if word != DRY_RUN])
    if DRY_RUN in argv:
        forecast(cfg)
    else:
        pretrain(cfg)
    ending.finish()


if __name__ == "__main__":
    _door.run(main)
