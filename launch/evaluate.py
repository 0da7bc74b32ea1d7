"""Measure a frozen network: ``launch/evaluate.py --model RUN --protocol knn ...``."""

from glsd.cli.main import run

if __name__ == "__main__":
    run("evaluate")
