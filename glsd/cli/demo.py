"""The whole story on one page, without a download: pack embedded images, pretrain, evaluate, fine-tune, look.

``make demo`` runs it.
"""

import json
import shutil
import time
from pathlib import Path

import torch

from glsd.config.evaluate import EvalConfig
from glsd.config.finetune import FinetuneConfig
from glsd.config.parse import load
from glsd.config.pretrain import PretrainConfig
from glsd.data.decode import decode
from glsd.data.eval_loader import eval_loader
from glsd.evaluate.embed import Embedded, embed
from glsd.evaluate.run import evaluate, load_model
from glsd.finetune.train import finetune
from glsd.metrics.knn import knn_accuracy, nearest_neighbors
from glsd.packing.embedded import CANVAS, NUM_VAL_DIGITS, digit_canvases
from glsd.packing.folder import pack_samples
from glsd.packing.split import split_shards
from glsd.pretrain.train import pretrain
from glsd.shards.store import open_shards
from glsd.show.neighbors import draw_neighbors

OUT = Path("demo_out")
SHARDS = {"train": f"{OUT}/shards/train-*.tar", "val": f"{OUT}/shards/val-*.tar"}
NUM_QUERIES, NUM_NEIGHBORS, K = 8, 8, 20
UNSEEN = 0.4  # share of the digits that fine-tuning never sees: 6 to 9


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

    chapter("4. fine-tune on the digits 0 to 5, retrieve 6 to 9", "launch/pack.py split ...")
    for split, part in (("train", "learned"), ("val", "unseen")):
        split_shards(SHARDS[split], OUT / part, test_share=UNSEEN)
    tuned = {reg: fine_tune(reg) for reg in ("none", "obdsd")}

    chapter("5. look")
    draw_neighbors_of(run, "teacher", SHARDS["val"], SHARDS["train"])
    for folder in tuned.values():
        draw_neighbors_of(folder, "student", f"{OUT}/unseen/test-*.tar")
    print(f"\nk-NN (k={K}) accuracy on {NUM_VAL_DIGITS} unseen images")
    for name, score in scores.items():
        print(f"  {name:24} {score:6.1%}")
    gain = scores["pretrained, no labels"] - scores["untrained network"]
    print(f"  gained by pretraining    {100 * gain:+.1f} points")
    print("\nretrieval of the digits 6 to 9, never seen with a label: Recall@1, MAP@R")
    for name, found in retrieval_table(tuned).items():
        print(f"  {name:24} {found['recall@1']:6.1%} {found['map_at_r']:6.1%}")
    folders = [str(folder) for folder in (run, *tuned.values())]
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    print(f"pictures: {run}/first_batch.png  " + "  ".join(f"{folder}/neighbors.png" for folder in folders))
    print(f"curves:   tensorboard --logdir {OUT}")


def fine_tune(reg: str) -> Path:
    """Fine-tune what was pretrained, with or without a regularizer."""
    flags = ["--config", "configs/dml/digits.yaml", "--reg", reg, "--out", f"{OUT}/dml-{reg}"]
    print(f"   python launch/finetune_dml.py {' '.join(flags)}", flush=True)
    return finetune(load(FinetuneConfig, flags))


def retrieval_table(tuned: dict[str, Path]) -> dict[str, dict[str, float]]:
    """What the runs wrote down: before fine-tuning, and after it with each regularizer."""
    records = {reg: json.loads((folder / "evals.json").read_text())[-1] for reg, folder in tuned.items()}
    table = {"pretrained, no labels": next(iter(records.values()))["epoch 0"]}
    for reg, record in records.items():
        last = [key for key in record if key.startswith("epoch ")][-1]
        table[f"fine-tuned, --reg {reg}"] = record[last]
    return {name: found["test"]["cosine"] for name, found in table.items()}


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


def embed_shards(shards: str, forward) -> Embedded:
    loader = eval_loader(
        open_shards(shards),
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
    train, val = (embed_shards(SHARDS[split], lambda images: images.flatten(1)) for split in ("train", "val"))
    return knn_accuracy(train.features, train.labels, val.features, val.labels, k_list=(K,))[K]["top1"]


def draw_neighbors_of(run: Path, features: str, queries: str, gallery: str | None = None) -> None:
    """Write neighbors.png: a few images with those that the network finds most like them, in the gallery or beside them."""
    measured = load_model(eval_config(run, features))
    measured.network.eval()
    query = embed_shards(queries, measured.features)
    found = query if gallery is None else embed_shards(gallery, measured.features)
    chosen = torch.linspace(0, len(query.labels) - 1, NUM_QUERIES).long()
    itself = 0 if gallery else 1
    cosines, rows = nearest_neighbors(query.features[chosen], found.features, k=NUM_NEIGHBORS + itself)
    if itself:  # out by its number: another image may be as near
        others = rows != chosen[:, None]
        others[others.all(dim=1), -1] = False
        cosines, rows = (part[others].reshape(NUM_QUERIES, NUM_NEIGHBORS) for part in (cosines, rows))
    query_shards, found_shards = open_shards(queries), open_shards(gallery or queries)
    draw_neighbors(
        run / "neighbors.png",
        torch.stack([decode(query_shards.read(int(i))) for i in query.indices[chosen]]),
        torch.stack(
            [torch.stack([decode(found_shards.read(int(i))) for i in row]) for row in found.indices[rows]]
        ),
        query_labels=query.labels[chosen],
        neighbor_labels=found.labels[rows],
        cosines=cosines,
    )
