"""Fine-tune a backbone for retrieval with labels, and measure it on classes that it has not seen.

  glsd finetune --init runs/mine --reg obdsd --data.train_shards 'shards/train-*.tar' \\
      --data.test_shards 'shards/test-*.tar' --out runs/mine-dml
  glsd finetune --config cub200_vits16 --out runs/cub200     a recipe of a benchmark
"""

from glsd.cli.closing import of_finetuning
from glsd.config.finetune import FinetuneConfig
from glsd.config.parse import in_its_folder, load

FIRST = (
    *("init", "loss", "reg", "data.train_shards", "data.test_shards", "out", "resume"),
    *("optim.epochs", "optim.batch_size", "optim.lr", "optim.precision", "model.embed_dim"),
)


def main(argv: list[str]) -> None:
    """Parse, then fine-tune. The imports of training take seconds, so they wait for a valid command line."""
    cfg = in_its_folder(load(FinetuneConfig, argv, about=__doc__ or "", first=FIRST), argv)
    from glsd.cluster import dist, shutdown
    from glsd.finetune.train import finetune

    run = finetune(cfg)
    if dist.is_main():
        print(of_finetuning(cfg, run), flush=True)
    shutdown.finish()
