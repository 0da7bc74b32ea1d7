"""The evaluation story: embed labeled images with a frozen network, measure the features, record the result."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from glsd.cluster import dist, shutdown
from glsd.cluster.launch import check_world, choose_interface, choose_precision
from glsd.config.evaluate import EvalConfig
from glsd.data.transform import Sizes, choose_sizes
from glsd.errors import config_keys
from glsd.evaluate.pixels import Pixels, check_unchosen, named_pixels
from glsd.evaluate.protocols import PROTOCOLS, describe_scores
from glsd.evaluate.record import append_record, cannot_write
from glsd.evaluate.sets import Embedded, embed_set
from glsd.loading import NATIVE_SIZE, Loaded, load_network
from glsd.models.backbone import check_image_size
from glsd.models.embedder import Embedder
from glsd.shards.store import ShardSet

POOLS = {
    "cls": "class token",
    "mean": "mean of patch tokens",
    "mean+max": "mean plus maximum of patch tokens",
}
# Argument of glsd.loading -> configuration key.
KEYS = {"path": "model", "role": "features", "image_size": "data.crop"}

LOST_AFTER = 60.0  # seconds without a heartbeat after which a rank counts as lost


def evaluate(cfg: EvalConfig) -> dict[str, Any]:
    """Measure as configured, print the numbers and their protocol, append both to evals.json, return them.

    Every rank calls and embeds its share of the images. Then all ranks leave the process group; rank 0 measures, writes
    and returns the record, the others return an empty one. Raises UserError for a mistake in the configuration, the
    shards or the weights, before the first forward pass where possible.
    """
    choose_interface()
    processes = PartialState(cpu=not torch.cuda.is_available())
    check_world(processes.num_processes, "launch/evaluate.py")
    shutdown.watch_others(LOST_AFTER)
    device = processes.device
    cfg = replace(cfg, precision=choose_precision(cfg.precision, device.type))
    protocol = PROTOCOLS[cfg.protocol]
    sets = dist.together(lambda: protocol.open(cfg))
    loaded, sizes = dist.together(lambda: load_model(cfg))
    out = Path(cfg.out) if cfg.out else loaded.run
    dist.raise_together(cannot_write(out) if out and dist.is_main() else None)

    loaded.network.to(device).eval()
    embedded = {
        name: embed_set(
            shards,
            loaded.features,
            name=name,
            sizes=sizes,
            batch_size=cfg.data.batch_size,
            num_workers=cfg.data.num_workers,
            device=device,
            precision=cfg.precision,
            limit=cfg.data.limit,
        )
        for name, shards in sets.items()
    }
    main = dist.is_main()
    # The measurement may take long or fail, on rank 0 alone: no other rank waits for it.
    shutdown.finish()
    if not main:
        return {}
    record: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "model": loaded.name,
        "step": loaded.step,
        **{name: describe_set(cfg, name, sets[name], part) for name, part in embedded.items()},
    }
    text, record["result"] = protocol.measure(cfg, loaded, embedded, device)
    record["protocol"] = f"{describe_features(cfg, loaded, sizes)}; {text}"
    print(report(record, list(sets)), flush=True)
    if out:
        append_record(out, record)
    return record


def load_model(cfg: EvalConfig) -> tuple[Loaded, Sizes]:
    """Load the network that ``cfg.model`` names, and choose the size of its images."""
    with config_keys(KEYS):
        chosen: dict[str, Any] = {"role": cfg.features, "backbone": cfg.backbone, "pool": cfg.pool}
        pixels = named_pixels(cfg.model)
        if pixels is None:
            loaded = load_network(cfg.model, image_size=cfg.data.crop, which=cfg.which, **chosen)
        else:
            check_unchosen(chosen | {"which": cfg.which != "last"})
            loaded = Loaded(network=pixels, name=cfg.model, crop=cfg.data.crop or NATIVE_SIZE)
    # The resize of a run belongs to the run's own crop.
    resize = loaded.resize if cfg.data.crop is None and cfg.data.resize is None else cfg.data.resize
    sizes = choose_sizes(loaded.crop, crop=cfg.data.crop, resize=resize)
    with config_keys(KEYS):
        check_image_size(sizes.crop, loaded.network.stride)
    return loaded, sizes


def describe_set(cfg: EvalConfig, name: str, shards: ShardSet, embedded: Embedded) -> dict[str, Any]:
    """Return what the record says about a set."""
    used = min(cfg.data.limit, len(shards)) if cfg.data.limit else len(shards)
    count = len(embedded.labels)
    return {"shards": getattr(cfg.data, f"{name}_shards"), "images": count, "unreadable": used - count}


def describe_features(cfg: EvalConfig, loaded: Loaded, sizes: Sizes) -> str:
    """Return in words how images become features."""
    network = loaded.network
    if isinstance(network, Pixels):
        what = f"pixels of the image at {network.side} x {network.side}"
    elif isinstance(network, Embedder):
        what = f"{'linear embedding of the ' if network.head else ''}{POOLS[network.backbone.pool]}"
    else:
        what = f"{POOLS[network.pool]} of the last layer"
    precision = {"no": "float32", "bf16": "bfloat16"}[cfg.precision]
    size = f"resize {sizes.resize} bicubic, center crop {sizes.crop}"
    return f"{size}, {what}, width {network.embed_dim}, {precision}"


def report(record: dict[str, Any], names: list[str]) -> str:
    """Return the lines to print: the model, the protocol, the data, and the shares in percent."""
    step = "" if record["step"] is None else f", step {record['step']}"
    sets = (f"{name} {record[name]['images']} images of {record[name]['shards']}" for name in names)
    lines = [
        f"model     {record['model']}{step}",
        f"protocol  {record['protocol']}",
        f"data      {', '.join(sets)}",
    ]
    for name, shares in record["result"].items():
        if "map_at_r" in shares:
            lines.append(f"{name:<9} {describe_scores(shares)}")
        else:
            lines.append(f"{name:<9} top-1 {100 * shares['top1']:.2f} %   top-5 {100 * shares['top5']:.2f} %")
    return "\n".join(lines)
