"""Fine-tune a backbone for retrieval: ``launch/finetune_dml.py --init RUN --reg obdsd ...``."""

from glsd.cli.main import run

if __name__ == "__main__":
    run("finetune")
