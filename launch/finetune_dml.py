"""Fine-tune a backbone for retrieval: finetune_dml.py --init RUN|timm:NAME --loss NAME --reg NAME --data.train_shards TARS."""

import _door

from glsd.command_line import load
from glsd.finetune import finetune
from glsd.finetune_config import FinetuneConfig
from glsd.runtime import ending


def main(argv: list[str]) -> None:
    finetune(load(FinetuneConfig, argv))
    ending.finish()


if __name__ == "__main__":
    _door.run(main)
