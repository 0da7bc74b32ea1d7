"""Pack embedded images, pretrain, evaluate, fine-tune and draw: everything in a few minutes, without a download.

glsd demo                        writes into demo_out, whose old content is deleted
glsd demo --optim.epochs 20      flags are those of the pretraining: glsd pretrain --help
"""

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from glsd.config.evaluate import EvalConfig
from glsd.config.finetune import FinetuneConfig
from glsd.config.parse import HELP, load
from glsd.config.pretrain import PretrainConfig

if TYPE_CHECKING:
    from glsd.evaluate.sets import Embedded

OUT = Path("demo_out")
SHARDS = {"train": f"{OUT}/shards/train-*.tar", "val": f"{OUT}/shards/val-*.tar"}
NUM_QUERIES, NUM_NEIGHBORS, K = 8, 8, 20
UNSEEN = 0.4  # share of the digits that fine-tuning never sees: 6 to 9


def main(argv: list[str]) -> None:
    """Parse, delete the demo before, run the chapters."""
    if any(word in HELP for word in argv):
        print(__doc__)
        return
    flags = ["--config", "digits", "--out", f"{OUT}/run", *argv]
    cfg = load(PretrainConfig, flags)
    from glsd.evaluate.run import evaluate
    from glsd.packing.embedded import digit_canvases
    from glsd.packing.split import split_shards
    from glsd.packing.write import pack_samples
    from glsd.pretrain.train import pretrain

    start = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    chapter("1. pack scanned digits into shards")
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")
    for split in splits:
        packed = pack_samples(digit_canvases(split), OUT / "shards", prefix=split)
        print(f"  {packed.num_images} {split} images")

    chapter("2. pretrain without labels", f"glsd pretrain {' '.join(flags)}")
    run = pretrain(cfg)

    scores = {"raw pixels": raw_pixels_knn()}
    chapter("3. evaluate", f"glsd evaluate --model {run} --protocol knn [--features initial] ...")
    for name, features in (("untrained network", "initial"), ("pretrained, no labels", "teacher")):
        scores[name] = evaluate(eval_config(run, features))["result"][f"k={K}"]["top1"]

    chapter("4. fine-tune on the digits 0 to 5, retrieve 6 to 9", "glsd pack split ...")
    for split, part in (("train", "learned"), ("val", "unseen")):
        split_shards(SHARDS[split], OUT / part, test_share=UNSEEN)
    tuned = {reg: fine_tune(reg) for reg in ("none", "obdsd")}

    chapter("5. draw the nearest neighbors")
    draw_neighbors_of(run, "teacher", SHARDS["val"], SHARDS["train"])
    for folder in tuned.values():
        draw_neighbors_of(folder, "student", f"{OUT}/unseen/test-*.tar")
    chapter("6. write the report", f"glsd report {run}")
    from glsd.inference.report import write_report

    page = write_report(run)
    report(run, scores, tuned)
    print(f"report:   {page} (open it in a browser)")
    print(f"curves:   tensorboard --logdir {OUT}")
    print(f"The demo took {time.perf_counter() - start:.0f} s.")


def report(run: Path, scores: dict[str, float], tuned: dict[str, Path]) -> None:
    """Print what came out, and where the pictures are."""
    from glsd.packing.embedded import NUM_VAL_DIGITS

    print(f"\nk-NN (k={K}) accuracy on {NUM_VAL_DIGITS} unseen images")
    for name, score in scores.items():
        print(f"  {name:24} {score:6.1%}")
    gain = scores["pretrained, no labels"] - scores["untrained network"]
    print(f"  gained by pretraining    {100 * gain:+.1f} points")
    print("\nretrieval of the digits 6 to 9, never seen with a label: Recall@1, MAP@R")
    for name, found in retrieval_table(tuned).items():
        print(f"  {name:24} {found['recall@1']:6.1%} {found['map_at_r']:6.1%}")
    folders = [str(folder) for folder in (run, *tuned.values())]
    print(f"\npictures: {run}/first_batch.png  " + "  ".join(f"{folder}/neighbors.png" for folder in folders))


def fine_tune(reg: str) -> Path:
    """Fine-tune what was pretrained, with or without a regularizer."""
    from glsd.finetune.train import finetune

    flags = ["--config", "digits", "--reg", reg, "--out", f"{OUT}/dml-{reg}"]
    print(f"   glsd finetune {' '.join(flags)}", flush=True)
    return finetune(load(FinetuneConfig, flags))


def retrieval_table(tuned: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Return the measurements of the runs: before fine-tuning, and after it with each regularizer."""
    records = {reg: json.loads((folder / "evals.json").read_text())[-1] for reg, folder in tuned.items()}
    table = {"pretrained, no labels": next(iter(records.values()))["epoch 0"]}
    for reg, record in records.items():
        last = [key for key in record if key.startswith("epoch ")][-1]
        table[f"fine-tuned, --reg {reg}"] = record[last]
    return {name: found["test"]["cosine"] for name, found in table.items()}


def chapter(title: str, command: str = "") -> None:
    print(f"\n== {title}" + (f"\n   {command}" if command else ""), flush=True)


def eval_config(run: Path, features: str) -> EvalConfig:
    from glsd.packing.embedded import CANVAS

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


def embed_shards(shards: str, forward) -> "Embedded":
    import torch

    from glsd.data.eval_loader import eval_loader
    from glsd.evaluate.sets import embed
    from glsd.packing.embedded import CANVAS
    from glsd.shards.store import open_shards

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
    """Return the k-NN accuracy of the raw pixels, which the features have to beat."""
    from glsd.metrics.knn import knn_accuracy

    train, val = (embed_shards(SHARDS[split], lambda images: images.flatten(1)) for split in ("train", "val"))
    return knn_accuracy(train.features, train.labels, val.features, val.labels, k_list=(K,))[K]["top1"]


def draw_neighbors_of(run: Path, role: str, queries: str, gallery: str | None = None) -> None:
    """Write neighbors.png: a few queries, each with its nearest neighbors in the gallery, or among the queries."""
    import torch

    from glsd.data.decode import decode
    from glsd.loading import load_network
    from glsd.metrics.knn import nearest_neighbors
    from glsd.shards.store import CLASSES_FILE, open_shards, read_classes
    from glsd.show.neighbors import draw_neighbors

    loaded = load_network(str(run), role=role)
    loaded.network.eval()
    query = embed_shards(queries, loaded.features)
    found = query if gallery is None else embed_shards(gallery, loaded.features)
    chosen = torch.linspace(0, len(query.labels) - 1, NUM_QUERIES).long()
    itself = 0 if gallery else 1
    cosines, rows = nearest_neighbors(query.features[chosen], found.features, k=NUM_NEIGHBORS + itself)
    if itself:  # the query is removed by its number, because another image may be as near
        others = rows != chosen[:, None]
        others[others.all(dim=1), -1] = False
        cosines, rows = (part[others].reshape(NUM_QUERIES, NUM_NEIGHBORS) for part in (cosines, rows))
    query_shards, found_shards = open_shards(queries), open_shards(gallery or queries)
    named = Path(queries).with_name(CLASSES_FILE)
    draw_neighbors(
        run / "neighbors.png",
        torch.stack([decode(query_shards.read(int(i))) for i in query.indices[chosen]]),
        torch.stack(
            [torch.stack([decode(found_shards.read(int(i))) for i in row]) for row in found.indices[rows]]
        ),
        query_labels=query.labels[chosen],
        neighbor_labels=found.labels[rows],
        cosines=cosines,
        class_names=read_classes(named) if named.is_file() else (),
    )
