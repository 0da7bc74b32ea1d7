"""The whole story on one page, without a download: pack embedded images, pretrain, evaluate, look. ``make demo`` runs it."""

import shutil
import time
from pathlib import Path

import _door
import torch

from glsd.command_line import load
from glsd.config import EvalConfig, PretrainConfig
from glsd.data.decode import decode
from glsd.data.embedded import CANVAS, NUM_VAL_DIGITS, digit_canvases
from glsd.data.eval_loader import eval_loader
from glsd.data.pack import pack_samples
from glsd.data.shards import open_shards
from glsd.evals.embed import Embedded, embed
from glsd.evals.knn import knn_accuracy, nearest_neighbours
from glsd.evaluate import evaluate, load_model
from glsd.pretrain import pretrain
from glsd.show.neighbours import draw_neighbours

OUT = Path("demo_out")
SHARDS = {"train": f"{OUT}/shards/train-*.tar", "val": f"{OUT}/shards/val-*.tar"}
NUM_QUERIES, NUM_NEIGHBOURS, K = 8, 8, 20


def main(argv: list[str]) -> None:
    start = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    chapter("1. pack scanned digits into shards")
    for split in ("train", "val"):
        print(
            f"  {pack_samples(digit_canvases(split), OUT / 'shards', prefix=split).num_images} {split} images"
        )

    chapter(
        "2. pretrain without labels", f"launch/pretrain.py --config configs/demo/digits.yaml {' '.join(argv)}"
    )
    run = pretrain(
        load(PretrainConfig, ["--config", "configs/demo/digits.yaml", "--out", f"{OUT}/run", *argv])
    )

    scores = {"raw pixels": raw_pixels_knn()}
    chapter("3. evaluate", f"launch/evaluate.py --model {run} --protocol knn [--features initial] ...")
    for name, features in (("untrained network", "initial"), ("pretrained, no labels", "teacher")):
        scores[name] = evaluate(eval_config(run, features))["result"][f"k={K}"]["top1"]

    chapter("4. look")
    draw_neighbours_of(run)
    print(f"\nk-NN (k={K}) accuracy on {NUM_VAL_DIGITS} unseen digits")
    for name, score in scores.items():
        print(f"  {name:24} {score:6.1%}")
    gain = scores["pretrained, no labels"] - scores["untrained network"]
    print(f"  gained by pretraining    {100 * gain:+.1f} points, {time.perf_counter() - start:.0f} s in all")
    print(f"\npictures: {run}/first_batch.png  {run}/first_batch_local.png  {run}/neighbours.png")
    print(f"curves:   tensorboard --logdir {run}")


def chapter(title: str, command: str = "") -> None:
    print(f"\n== {title}" + (f"\n   python {command}" if command else ""), flush=True)


def eval_config(run: Path, features: str) -> EvalConfig:
    flags = {
        "model": run,
        "features": features,
        "protocol": "knn",
        "k": f"[{K}]",
        "data.train_shards": SHARDS["train"],
        "data.val_shards": SHARDS["val"],
        "data.resize": CANVAS,
        "data.crop": CANVAS,
    }
    return load(EvalConfig, [f"--{key}={value}" for key, value in flags.items()])


def embed_split(split: str, forward) -> Embedded:
    loader = eval_loader(
        open_shards(SHARDS[split]),
        resize=CANVAS,
        crop=CANVAS,
        batch_size=256,
        rank=0,
        world_size=1,
        num_workers=0,
    )
    return embed(forward, loader, device=torch.device("cpu"))


def raw_pixels_knn() -> float:
    """The accuracy of the pixels themselves: what the features have to beat."""
    train, val = (embed_split(split, lambda images: images.flatten(1)) for split in ("train", "val"))
    return knn_accuracy(train.features, train.labels, val.features, val.labels, k_list=(K,))[K]["top1"]


def draw_neighbours_of(run: Path) -> None:
    """Write neighbours.png: the first unseen digits with the training canvases that the teacher finds most like them."""
    teacher = load_model(eval_config(run, "teacher"))
    teacher.network.eval()
    train, val = (embed_split(split, teacher.features) for split in ("train", "val"))
    cosines, rows = nearest_neighbours(val.features[:NUM_QUERIES], train.features, k=NUM_NEIGHBOURS)
    shards = {split: open_shards(SHARDS[split]) for split in SHARDS}

    def image(split: str, number: int) -> torch.Tensor:
        return decode(shards[split].read(number))

    draw_neighbours(
        run / "neighbours.png",
        torch.stack([image("val", query) for query in range(NUM_QUERIES)]),
        torch.stack([torch.stack([image("train", int(row)) for row in found]) for found in rows]),
        query_labels=val.labels[:NUM_QUERIES],
        neighbour_labels=train.labels[rows],
        cosines=cosines,
    )


if __name__ == "__main__":
    _door.run(main)
