"""Pretrain a vision backbone without labels: ``accelerate launch launch/pretrain.py --config configs/pretrain/... ``.

With ``--dry_run`` it takes a few steps, says whether the run fits and how long it takes, and keeps nothing.
"""

from glsd.cluster import shutdown
from glsd.config.parse import load
from glsd.config.pretrain import PretrainConfig
from glsd.pretrain.dry_run import forecast
from glsd.pretrain.train import pretrain

DRY_RUN = "--dry_run"


def main(argv: list[str]) -> None:
    cfg = load(PretrainConfig, [word for word in argv if word != DRY_RUN])
    if DRY_RUN in argv:
        forecast(cfg)
    else:
        pretrain(cfg)
    shutdown.finish()
