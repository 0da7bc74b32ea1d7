"""Measure a frozen backbone on labeled images: k-NN, linear probe or retrieval.

  glsd evaluate --model runs/mine --protocol knn --data.train_shards 'shards/train-*.tar' \\
      --data.val_shards 'shards/val-*.tar'
  glsd evaluate --model runs/mine --features initial ...     the untrained network, for comparison
  glsd evaluate --model timm:vit_small_patch16_224.dino ...  weights of timm
"""

from pathlib import Path

from glsd.cli.closing import of_evaluation
from glsd.config.evaluate import EvalConfig
from glsd.config.parse import load

FIRST = (
    *("model", "protocol", "features", "data.train_shards", "data.val_shards", "data.test_shards"),
    *("data.query_shards", "data.gallery_shards", "data.crop", "data.limit", "k", "out"),
)


def main(argv: list[str]) -> None:
    """Parse, then measure. The imports of networks take seconds, so they wait for a valid command line."""
    cfg = load(EvalConfig, argv, about=__doc__ or "", first=FIRST)
    from glsd.cluster import shutdown
    from glsd.evaluate.run import evaluate
    from glsd.loading import find_run

    if evaluate(cfg):
        print(of_evaluation(cfg, find_run(Path(cfg.model))), flush=True)
    shutdown.finish()
