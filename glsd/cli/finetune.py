"""Fine-tune a backbone for retrieval: finetune_dml.py --init RUN|timm:NAME --loss NAME --reg NAME --data.train_shards TARS."""

from glsd.cluster import shutdown
from glsd.config.finetune import FinetuneConfig
from glsd.config.parse import load
from glsd.finetune.train import finetune


def main(argv: list[str]) -> None:
    finetune(load(FinetuneConfig, argv))
    shutdown.finish()
