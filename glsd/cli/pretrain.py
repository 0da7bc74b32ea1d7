"""Pretrain a vision backbone on images without labels.

glsd pretrain --config small_data --data.shards 'shards/train-*.tar' --out runs/mine
glsd pretrain --dry_run ...               a few steps: does the run fit, how long will it take? Keeps nothing.
glsd pretrain --resume auto ...           go on from the last checkpoint in --out
accelerate launch -m glsd pretrain ...    several GPUs
"""

from glsd.cli.closing import of_pretraining
from glsd.config.parse import in_its_folder, load
from glsd.config.pretrain import PretrainConfig

DRY_RUN = ("--dry_run", "--dry-run")
FIRST = (
    *("data.shards", "out", "resume", "matching", "model.backbone", "model.init"),
    *(
        "optim.epochs",
        "optim.batch_size",
        "optim.lr",
        "optim.precision",
        "data.num_workers",
    ),
)


def main(argv: list[str]) -> None:
    """Parse, then pretrain or forecast. The imports of training take seconds, so they wait for a valid command line."""
    words = [word for word in argv if word not in DRY_RUN]
    cfg = in_its_folder(load(PretrainConfig, words, about=__doc__ or "", first=FIRST), words)
    from glsd.cluster import dist, shutdown
    from glsd.pretrain.dry_run import forecast
    from glsd.pretrain.train import pretrain

    if len(words) < len(argv):
        forecast(cfg)
    else:
        run = pretrain(cfg)
        if dist.is_main():
            print(of_pretraining(cfg, run), flush=True)
    shutdown.finish()
