"""Pretrain a vision backbone without labels: ``accelerate launch launch/pretrain.py --config ...``."""

from glsd.cli.main import run

if __name__ == "__main__":
    run("pretrain")
