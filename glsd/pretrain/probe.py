"""The probe: what teacher and student are worth by now, by RankMe on images and by k-NN where there are labels."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from glsd.cluster import dist, fsdp
from glsd.config.pretrain import PretrainConfig
from glsd.data.eval_loader import evenly_spread
from glsd.data.transform import choose_sizes
from glsd.errors import UserError, config_keys
from glsd.evaluate.sets import Embedded, check_known_classes, embed_set
from glsd.metrics.effective_rank import rankme
from glsd.metrics.knn import knn_accuracy
from glsd.models.backbone import Backbone
from glsd.models.blocks import run_uncompiled
from glsd.pretrain.networks import State
from glsd.pretrain.plan import Plan
from glsd.runtime.loop import Training
from glsd.shards.store import ShardSet, check_disjoint, number_together, open_shards

NUM_UNLABELED = 2048  # images that RankMe is measured on where no labeled set is given
IN_A_ROW = 16  # of them lie side by side in a shard, so that few pieces of remote shards are fetched
FEWEST_STEPS = 500  # between two probes if the period is not set


class ProbeSet(NamedTuple):
    """Images of a set that the probe embeds."""

    shards: ShardSet
    chosen: Int64[np.ndarray, " c"]  # dataset indices, ascending


class ProbeSets(NamedTuple):
    """What the probe measures on: RankMe on ``val``, k-NN of ``val`` among ``train`` if there is one."""

    val: ProbeSet
    train: ProbeSet | None


def open_probe(cfg: PretrainConfig, shards: ShardSet) -> ProbeSets | None:
    """Return the images of the probe, None if it is off; UserError now rather than hours into the run.

    shards: those of the training, of which a part is measured where no labeled sets are given. RankMe needs neither labels
    nor images that the network has not seen.
    """
    w = cfg.watch
    given = [key for key in ("probe_train_shards", "probe_val_shards") if getattr(w, key)]
    if w.probe_every == 0:
        return None
    if not given:
        return ProbeSets(ProbeSet(shards, in_rows(len(shards), min(NUM_UNLABELED, w.probe_images))), None)
    if len(given) == 1:
        missing = "probe_val_shards" if "probe_train_shards" in given else "probe_train_shards"
        raise UserError(
            f"watch.{missing} is not set, but watch.{given[0]} is: name labeled shards for both, or for none (no k-NN)"
        )
    sets = {}
    for key in given:
        sets[key] = open_shards(getattr(w, key))
        with config_keys({"shards": f"watch.{key}"}):
            sets[key].check_labeled()
    train, val = sets["probe_train_shards"], sets["probe_val_shards"]
    names = ("watch.probe_train_shards", "watch.probe_val_shards")
    check_disjoint(train, val, names=names)
    number_together(dict(zip(names, (train, val), strict=True)))
    check_known_classes(train, val, names=names, limit=w.probe_images)
    if w.probe_k > min(len(train), w.probe_images):
        raise UserError(
            f"watch.probe_k {w.probe_k} is more than the {min(len(train), w.probe_images)} images that vote"
        )
    chosen = [evenly_spread(part.labels(), w.probe_images) for part in (val, train)]
    return ProbeSets(ProbeSet(val, chosen[0]), ProbeSet(train, chosen[1]))


def in_rows(total: int, count: int) -> Int64[np.ndarray, " c"]:
    """Return ``count`` of ``total`` indices, ascending, in rows of IN_A_ROW that are spread evenly; all if there are no more."""
    if count >= total:
        return np.arange(total)
    rows = -(-count // IN_A_ROW)
    starts = np.arange(rows) * (total - IN_A_ROW) // max(rows - 1, 1)
    return np.unique((starts[:, None] + np.arange(IN_A_ROW)).clip(0, total - 1))[:count]


def probe_period(cfg: PretrainConfig, plan: Plan) -> int:
    """Return the steps between two probes, 0 = never. Unset: an epoch, but at least 500 steps."""
    every = cfg.watch.probe_every
    return max(plan.steps_per_epoch, FEWEST_STEPS) if every is None else every


def headline_of(cfg: PretrainConfig, sets: ProbeSets | None) -> str:
    """Return the score by which the best checkpoint is chosen: k-NN where there are labels, RankMe otherwise."""
    return f"knn{cfg.watch.probe_k}_top1" if sets is not None and sets.train is not None else "rankme"


def earlier_scores(metrics: Path, headline: str) -> dict[int, float]:
    """Return this score of the probes in metrics.jsonl, by step; rank 0 reads, the others get none."""
    if not dist.is_main() or not metrics.is_file():
        return {}
    rows = (json.loads(line) for line in metrics.read_text().splitlines() if '"probe"' in line)
    return {row["step"]: row["probe"][headline] for row in rows if headline in row.get("probe", {})}


class Measured(NamedTuple):
    """The features of one probe, by network and pooling, such as "teacher_cls"; ``train`` is empty without labels."""

    val: dict[str, Embedded]
    train: dict[str, Embedded]


def probe(t: Training[PretrainConfig, Plan, State], sets: ProbeSets) -> tuple[dict[str, Any], Measured]:
    """Measure teacher and student, class token and mean of the patches; return the scores and rank 0's features.

    Every rank embeds its share. The scores have RankMe and k-NN of what the run trains at the top, and all others by name.
    """
    networks = {"teacher": t.state.teacher.backbone, "student": t.state.student.backbone}
    with contextlib.ExitStack() as stack:
        copies = {role: fsdp.whole_copy(network) for role, network in networks.items()}
        for copy in copies.values():
            stack.enter_context(_evaluating(copy))
        val = _embed(t, copies, sets.val, "probe_val")
        train = {} if sets.train is None else _embed(t, copies, sets.train, "probe_train")
    scores: dict[str, Any] = {}
    if dist.is_main():
        every = {name: _scores(t, val[name], train.get(name)) for name in val}
        own = f"teacher_{t.state.teacher.backbone.pool}"
        scores = {**every[own], **every}
        t.meters.write({"step": t.state.step, "probe": scores})
        t.meters.say(f"probe at step {t.state.step}: {_told(t.cfg.watch.probe_k, scores)}")
    return dist.broadcast_object(scores), Measured(val, train)


def _embed(
    t: Training[PretrainConfig, Plan, State], networks: dict[str, Backbone], images: ProbeSet, name: str
) -> dict[str, Embedded]:
    columns: list[str] = []

    def features(batch: Tensor) -> Tensor:
        with run_uncompiled():
            found = {
                f"{role}_{pool}": vectors
                for role, network in networks.items()
                for pool, vectors in network.pooled(batch).items()
            }
        columns[:] = found
        return torch.cat([vectors.float() for vectors in found.values()], dim=1)

    embedded = embed_set(
        images.shards,
        features,
        name=name,
        sizes=choose_sizes(t.cfg.data.global_size),
        batch_size=64,
        num_workers=t.cfg.data.num_workers,
        device=t.accelerator.device,
        precision=t.cfg.optim.precision,
        chosen=images.chosen,
    )
    parts = embedded.features.chunk(len(columns), dim=1)
    return {
        column: embedded._replace(features=part.contiguous())
        for column, part in zip(columns, parts, strict=True)
    }


def _scores(
    t: Training[PretrainConfig, Plan, State], val: Embedded, train: Embedded | None
) -> dict[str, float]:
    found = {"rankme": rankme(val.features)}
    if train is not None:
        k = t.cfg.watch.probe_k
        accuracy = knn_accuracy(train.features, train.labels, val.features, val.labels, k_list=(k,))
        found = {f"knn{k}_top1": accuracy[k]["top1"], **found}
    return found


def _told(k: int, scores: dict[str, Any]) -> str:
    rank = f"RankMe {scores['rankme']:.1f}"
    key = f"knn{k}_top1"
    return f"k-NN (k={k}) {scores[key]:.2%}, {rank}" if key in scores else rank


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Put the network into evaluation mode in the block."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
