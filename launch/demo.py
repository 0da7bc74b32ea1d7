"""Pack, pretrain, evaluate and fine-tune on embedded images; ``make demo`` runs it."""

from glsd.cli.main import run

if __name__ == "__main__":
    run("demo")
