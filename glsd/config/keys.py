"""The keys of a configuration by their dotted names: type, default, explanation; and the key that a wrong name means."""

import dataclasses
import difflib
import functools
import inspect
import re
import typing
from collections.abc import Collection
from typing import Any, NamedTuple

# What other programs call a setting -> our keys; the first that a configuration has is suggested.
ELSEWHERE = {
    name: ours
    for names, ours in {
        "learning_rate base_lr blr base_learning_rate": ("optim.lr",),
        "min_learning_rate final_lr": ("optim.min_lr",),
        "bs batch train_batch_size per_device_train_batch_size batch_size_per_gpu": (
            "optim.batch_size",
            "data.batch_size",
        ),
        "accum_iter gradient_accumulation_steps grad_accum": ("optim.micro_batch",),
        "num_epochs num_train_epochs max_epochs n_epochs": ("optim.epochs", "linear_epochs"),
        "steps num_steps iterations max_iter": ("optim.max_steps",),
        "wd": ("optim.weight_decay",),
        "momentum_teacher ema ema_decay momentum": ("optim.teacher_momentum",),
        "grad_clip gradient_clip_val max_grad_norm clip_grad_norm clip": ("optim.clip_grad",),
        "amp fp16 bf16 use_fp16 use_amp mixed_precision dtype": ("optim.precision", "precision"),
        "output output_dir out_dir outdir save_dir log_dir logdir work_dir exp_dir": ("out",),
        "arch architecture model_name network encoder": ("model.backbone", "backbone"),
        "pretrained weights pretrained_weights checkpoint ckpt": ("model.init", "init", "model"),
        "data_path data_dir data_root dataset train_data train_dir": ("data.shards", "data.train_shards"),
        "val_data val_dir": ("data.val_shards", "data.test_shards"),
        "workers num_worker n_workers": ("data.num_workers",),
        "image_size img_size input_size crop_size global_crop_size": ("data.global_size", "data.crop"),
        "local_crop_size": ("data.local_size",),
        "local_crops_number num_crops": ("data.num_local",),
        "global_crops_scale": ("data.global_scale",),
        "local_crops_scale": ("data.local_scale",),
        "out_dim": ("head.num_prototypes",),
        "patch_size patch": ("model.timm_args",),
        "drop_path_rate": ("model.drop_path",),
        "nb_knn knn neighbors": ("k",),
        "recall recall_k ks": ("recall_at", "watch.recall_at"),
        "random_seed": ("seed",),
        "save_every save_freq saveckp_freq checkpoint_freq": ("watch.checkpoint_every",),
        "log_freq print_freq log_interval": ("watch.log_every",),
        "regularizer regularization": ("reg",),
    }.items()
    for name in names.split()
}


class Key(NamedTuple):
    """One setting of a configuration."""

    kind: Any
    default: Any
    says: str


@functools.cache
def keys_of(config_class: Any) -> dict[str, Key]:
    """Return every setting by its dotted name, in order."""
    found: dict[str, Key] = {}
    says, whole = _arguments(config_class), config_class()
    for field in dataclasses.fields(config_class):
        kind: Any = field.type
        if dataclasses.is_dataclass(kind):
            found |= {f"{field.name}.{name}": key for name, key in keys_of(typing.cast(Any, kind)).items()}
        else:
            found[field.name] = Key(kind, getattr(whole, field.name), says.get(field.name, ""))
    return found


def groups_of(config_class: Any) -> dict[str, Any]:
    """Return the groups of settings by name."""
    return {f.name: f.type for f in dataclasses.fields(config_class) if dataclasses.is_dataclass(f.type)}


def _arguments(config_class: Any) -> dict[str, str]:
    """Return the explanation of each field in the docstring of its class."""
    _, _, text = inspect.cleandoc(config_class.__doc__ or "").partition("Args:\n")
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", text, re.M)
    return {name: " ".join(says.split()) for name, says in found}


def find(name: str, config_class: Any) -> str | None:
    """Return the dotted key that a name means, None if there is none; ``-`` counts as ``_``.

    It may be a setting, a group, or an entry of a setting that holds names with values (``model.timm_args.depth``).
    """
    name = name.replace("-", "_")
    keys = keys_of(config_class)
    if name in keys or name in groups_of(config_class):
        return name
    holder, _, entry = name.rpartition(".")
    takes_names = holder in keys and typing.get_origin(keys[holder].kind) is dict
    return name if takes_names and entry.isidentifier() else None


def hint(name: str, known: Collection[str], dashes: str = "") -> str:
    """Return ``"; did you mean 'x'?"`` for the known key that a wrong name most likely means, or an empty string."""
    meant = _meant(name.replace("-", "_").lower(), known)
    return f"; did you mean {dashes + meant!r}?" if meant and meant != name else ""


def _meant(name: str, known: Collection[str]) -> str | None:
    group, _, last = name.rpartition(".")
    by_case = {key.lower(): key for key in known}
    if name in by_case:
        return by_case[name]
    lasts: dict[str, list[str]] = {}
    for key in known:
        lasts.setdefault(key.rpartition(".")[2], []).append(key)
    if last in lasts:  # a name without its group, or in another one
        return max(lasts[last], key=lambda key: difflib.SequenceMatcher(None, name, key).ratio())
    for key in ELSEWHERE.get(last, ()):
        if key in known:
            return key
    initials = {key: "".join(word[0] for word in key.rpartition(".")[2].split("_") if word) for key in known}
    short = [key for key in known if len(last) > 1 and initials[key] == last]
    if short:
        return max(short, key=lambda key: key.startswith(f"{group}."))
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == group}
    if close := difflib.get_close_matches(last, list(siblings), n=1, cutoff=0.6):
        return siblings[close[0]]
    if close := difflib.get_close_matches(name, list(known), n=1, cutoff=0.75):
        return close[0]
    close = difflib.get_close_matches(last, list(lasts), n=1, cutoff=0.7)
    return lasts[close[0]][0] if close else None
