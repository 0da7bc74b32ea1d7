"""Labeled image sets: open them, check them, and embed them on all ranks."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from tqdm import tqdm

from glsd.batches import LabeledBatch
from glsd.cluster import dist
from glsd.config.evaluate import EvalDataConfig
from glsd.config.finetune import FinetuneDataConfig
from glsd.data.eval_loader import eval_loader, evenly_spread
from glsd.data.transform import Sizes
from glsd.errors import UserError, config_keys
from glsd.metrics.search import known_labels
from glsd.shards.store import (
    ShardSet,
    check_disjoint,
    number_together,
    open_shards,
)


def open_labeled(patterns: str | list[str], key: str) -> ShardSet:
    """Open one labeled set.

    Raises UserError, naming ``key``, if no shards are given, they hold no image, or an image has no label, and as
    number_together does.
    """
    if not patterns:
        example = f"shards/{key.rpartition('.')[2].removesuffix('_shards')}-*.tar"
        raise UserError(f"{key} is not set: give labeled shards, e.g. --{key} '{example}'")
    shards = open_shards(patterns)
    if not len(shards):
        raise UserError(f"{key} {patterns!r}: no images in these shards")
    with config_keys({"shards": key}):
        shards.check_labeled()
    number_together({key: shards})
    return shards


def check_known_classes(train: ShardSet, val: ShardSet, *, names: tuple[str, str], limit: int = 0) -> None:
    """Warn if the class of some val images is that of no train image; UserError if it is so for all of them.

    names: of the sets, for messages. limit: most images of each set, as in eval_loader.
    """
    known, asked = (part.labels() for part in (train, val))
    num_classes = len(np.unique(known))
    if limit:
        known, asked = (labels[evenly_spread(labels, limit)] for labels in (known, asked))
    found = known_labels(torch.from_numpy(known), torch.from_numpy(asked), names=names)
    if found.all() or not dist.is_main():
        return
    unknown = np.unique(asked[~found.numpy()])
    left = len(np.unique(known))
    few = f" (its {limit} images, spread evenly, have {left} of its {num_classes} classes)"
    print(
        f"warning: {len(unknown):,} of {len(np.unique(asked)):,} classes of {names[1]} are not in {names[0]}"
        f"{few if left < num_classes else ''}: {int((~found).sum()):,} of {len(asked):,} images count as wrong",
        flush=True,
    )


def open_retrieval(data: EvalDataConfig | FinetuneDataConfig) -> dict[str, ShardSet]:
    """Open {'test'} (leave-one-out) or {'query', 'gallery'}.

    Raises UserError if other sets are given, if they overlap, or if no image has another one of its class to find.
    """
    given = [role for role in ("test", "query", "gallery") if getattr(data, f"{role}_shards")]
    if given not in (["test"], ["query", "gallery"]):
        raise UserError(
            "retrieval needs either data.test_shards (each image searched among all others) or data.query_shards "
            f"and data.gallery_shards, but {' and '.join(f'data.{role}_shards' for role in given) or 'none'} is set"
        )
    sets = {role: open_labeled(getattr(data, f"{role}_shards"), f"data.{role}_shards") for role in given}
    if len(sets) == 2:
        check_disjoint(sets["query"], sets["gallery"], names=("data.query_shards", "data.gallery_shards"))
        number_together({f"data.{role}_shards": shards for role, shards in sets.items()})
        findable = np.isin(sets["query"].labels(), sets["gallery"].labels()).any()
    else:
        findable = np.unique(sets["test"].labels(), return_counts=True)[1].max() > 1
    if not findable:
        raise UserError(
            f"{' and '.join(f'data.{role}_shards' for role in given)}: no image has another image of its class to find: "
            "check the labels"
        )
    return sets


class Embedded(NamedTuple):
    """Features of a labeled set on the CPU, in the order of the data set."""

    features: Float32[Tensor, "n d"]
    labels: Int64[Tensor, " n"]  # -1 = no label
    indices: Int64[Tensor, " n"]  # ascending


@torch.no_grad()
def embed(
    forward: Callable[[Tensor], Tensor],
    loader: Iterable[LabeledBatch],
    *,
    device: torch.device,
    precision: str = "no",
) -> Embedded:
    """Embed the images of all ranks' loaders; every rank returns all features, sorted by index.

    forward: images (b 3 h w) -> features (b d), a network in evaluation mode. loader: this rank's batches; rows with
    index -1 are padding or unreadable, and are left out. precision: "no" or "bf16" (autocast). Raises UserError if
    there is no batch at all, RuntimeError if an index comes twice, which is a bug of the loader.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in loader:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            features = forward(batch.images.to(device, non_blocking=True))
        parts.append((features.float().cpu(), batch.labels, batch.indices))
    if not parts:
        raise UserError("no images to embed: the shards are empty")
    # Some backends gather only what is on the device.
    features, labels, indices = (
        dist.gather_rows(torch.cat(column).to(device)).cpu() for column in zip(*parts, strict=True)
    )
    real = (indices >= 0).nonzero()[:, 0]
    order = real[indices[real].argsort()]
    features, labels, indices = features[order], labels[order], indices[order]
    twice = indices[1:][indices[1:] == indices[:-1]]
    if len(twice):
        raise RuntimeError(f"the loader gave {len(twice)} images twice, the first is number {int(twice[0])}")
    return Embedded(features, labels, indices)


def embed_set(
    shards: ShardSet,
    forward: Callable[[Tensor], Tensor],
    *,
    name: str,
    sizes: Sizes,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    precision: str = "no",
    limit: int = 0,
    chosen: np.ndarray | None = None,
) -> Embedded:
    """Embed every readable image of a set, or of its ``chosen`` images; every rank returns all features.

    forward: images (b 3 h w) -> features (b d). A warning names the number of images that cannot be read, and one of
    them. Raises UserError if no image can be read.
    """
    loader = eval_loader(
        shards,
        resize=sizes.resize,
        crop=sizes.crop,
        batch_size=batch_size,
        rank=dist.rank(),
        world_size=dist.world_size(),
        num_workers=num_workers,
        limit=limit,
        chosen=chosen,
    )
    # disable=None: a bar on a terminal, nothing in a log file.
    hidden = None if dist.is_main() else True
    batches = tqdm(loader, desc=f"{name} features", unit="batch", leave=False, disable=hidden)
    embedded = embed(forward, batches, device=device, precision=precision)
    broken = [record for part in dist.gather_objects(list(loader.broken)) for record in part]
    total = len(shards) if chosen is None else len(chosen)
    expected, found = min(limit, total) if limit else total, len(embedded.labels)
    if found + len(broken) != expected:
        raise RuntimeError(f"{name}: {found} features and {len(broken)} unreadable of {expected} images")
    if broken and dist.is_main():
        print(
            f"warning: {len(broken)} {name} images cannot be read, e.g. {broken[0].key!a}: {broken[0].reason}"
        )
    if not found:
        raise UserError(f"{name} set: none of the {expected} images can be read")
    return embedded
