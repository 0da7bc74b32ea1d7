"""Read weights files and load them into a backbone, with an account of every tensor."""

import argparse
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from timm.models import eva, swin_transformer, swin_transformer_v2, vision_transformer
from torch import Tensor

from glsd.errors import UserError, one_line
from glsd.models.tokens import resample_pos_embed
from glsd.precision import check_finite

State = dict[str, Tensor]

# Where training programs keep the network in their checkpoint, best first (the teacher is the better one).
_CONTAINERS = ("teacher", "ema_model", "model_ema", "state_dict", "model", "student")
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "net.", "encoder.")
# What checkpoints hold besides a backbone: classifiers, projection heads, tokens of masked-image training.
_NOT_BACKBONE = (
    "head", "head_dense", "head_dist", "heads", "fc", "classifier", "global_head", "local_head", "attn_pool",
    "mlp", "last_layer", "last_linear", "prototypes", "dino_head", "ibot_head", "mask_token", "pre_logits", "projectors",
)  # fmt: skip
_TIMM_FORMS = {
    "VisionTransformer": vision_transformer.checkpoint_filter_fn,
    "Eva": eva.checkpoint_filter_fn,
    "SwinTransformer": swin_transformer.checkpoint_filter_fn,
    "SwinTransformerV2": swin_transformer_v2.checkpoint_filter_fn,
}

# Batch normalization counts its batches; old torch files do not hold the count, and nothing is computed from it here.
_COUNTER = "num_batches_tracked"

_MAX_DEPTH = 8  # of dictionaries around the network; one that holds itself has no end


class LoadReport(NamedTuple):
    """How well weights fitted: the number of filled tensors of the network, and the names that did not fit.

    Batch counters of batch normalization are not weights and not counted.
    """

    matched: int
    total: int
    matched_names: tuple[str, ...]
    missing: tuple[str, ...]  # tensors of the network that the file lacks
    mismatched: tuple[str, ...]  # "name: shape in the file, shape in the network"
    unexpected: tuple[str, ...]  # tensors of the file that belong to a backbone, but not to this one
    ignored: tuple[str, ...]  # heads and the like

    @property
    def complete(self) -> bool:
        """Tell whether every tensor of the network was filled and every backbone tensor of the file used."""
        return not (self.missing or self.mismatched or self.unexpected)

    def __str__(self) -> str:
        parts = [f"{self.matched} of {self.total} tensors matched"]
        if not self.complete and self.matched:
            parts[0] += f" {_first(self.matched_names)}"
        for what in ("missing", "mismatched", "unexpected"):
            names = getattr(self, what)
            if names:
                parts.append(f"{len(names)} {what} {_first(names)}")
        if self.ignored:
            parts.append(f"{len(self.ignored)} of heads and the like left out")
        return ", ".join(parts)


def _first(names: tuple[str, ...]) -> str:
    return f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def absolute_init(init: str) -> str:
    """Return where a network's first weights come from, with the path of a file made absolute: it means the same everywhere."""
    return init if init in ("random", "timm") or init.startswith("timm:") else str(Path(init).absolute())


def read_weights(path: str | Path) -> State:
    """Return the tensors of a weights file by their names in the network, without wrappers and prefixes.

    path: a .safetensors file, a torch file (read with weights_only=True), or one of our checkpoint folders (the teacher of
    pretraining, the student of metric learning). Where a file holds teacher and student, the teacher is taken. Raises
    UserError if there is no such file, it is damaged, needs code to be unpickled, or holds no network.
    """
    path = Path(path)
    if os.path.isdir(path):
        # A metric-learning run's teacher is its own past; only those runs keep the parameters of their losses.
        tuned = os.path.isfile(path / "losses.safetensors")
        path = path / ("student.safetensors" if tuned else "teacher.safetensors")
    if not os.path.isfile(path):
        name = path.name.removeprefix("timm:")
        hint = (
            f"; for timm's weights set backbone to {name!r} and init to 'timm'" if timm.is_model(name) else ""
        )
        raise UserError(
            f"weights {str(path)!r}: no such file (expected .safetensors, a torch file or a checkpoint){hint}"
        )
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            # Published DINO checkpoints keep their command line beside the weights; a Namespace runs no code.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    # Damaged files, and files that need code to be run, fail anywhere in the readers: AssertionError, IndexError, ...
    except Exception as error:
        # The cause without torch's advice and colors.
        cause = re.sub(r"\x1b\[\d*m", "", str(error).rpartition("WeightsUnpickler error: ")[2])
        reason = one_line(cause or type(error).__name__, 200)
        raise UserError(f"weights {str(path)!r} cannot be read as plain tensors: {reason}") from error
    return _strip_prefixes(_find_state(content, str(path)), str(path))


def load_weights(net: Any, state: State, *, source: str, allow_partial: bool | None = None) -> LoadReport:
    """Copy ``state`` (named as by timm, torchvision, DINO, DINOv2/3, EsViT or us) into a timm network, say what fitted.

    A position embedding of another grid is resampled as in the forward pass; no other tensor is. source: named in errors;
    allow_partial: fill what has a name and shape of the network, leave the rest of it as it is (None: no, and errors do not
    offer it). Raises UserError, with the network untouched, if no tensor fits, if one that fits holds NaN or infinity, or unless
    allow_partial if not every tensor of the network is filled or not every backbone tensor of the file is used.
    """
    own: State = net.state_dict()
    offer = " (allow_partial true loads what fits)" if allow_partial is not None else ""
    if "pos_embed" in state and "pos_embed" in own:
        fitted = _fit_pos_embed(net, state["pos_embed"])
        if fitted is None and not allow_partial:
            raise UserError(
                f"weights {source!r}: a position embedding of shape {tuple(state['pos_embed'].shape)} is of no"
                f" square grid{offer}"
            )
        state = state if fitted is None else {**state, "pos_embed": fitted}
    found, ignored = _leave_out_heads(_to_timm_names(net, state), own)
    counters = {name: tensor for name, tensor in found.items() if name.endswith(_COUNTER)}
    found = {name: tensor for name, tensor in found.items() if name not in counters}
    needed = [name for name in own if not name.endswith(_COUNTER)]
    matched = {name: found[name] for name in needed if name in found and _same_shape(found, own, name)}
    report = LoadReport(
        matched=len(matched),
        total=len(needed),
        matched_names=tuple(matched),
        missing=tuple(name for name in needed if name not in found),
        mismatched=tuple(
            f"{name}: {tuple(found[name].shape)} in the file, {tuple(own[name].shape)} in the network"
            for name in needed
            if name in found and name not in matched
        ),
        unexpected=tuple(name for name in found if name not in own),
        ignored=ignored,
    )
    if not matched or not (report.complete or allow_partial):
        raise UserError(
            f"weights {source!r} are not of this network: {report};"
            f" check backbone and timm_args{offer if matched else ''}"
        )
    # As the network holds them: float64 numbers may be too large for it.
    check_finite({name: x.to(own[name].dtype) for name, x in matched.items()}, f"weights {source!r}")
    counters = {name: count for name, count in counters.items() if name in own and count.numel() == 1}
    net.load_state_dict(matched | counters, strict=False)
    return report


def _find_state(content: Any, path: str) -> State:
    """Return the innermost dictionary that holds tensors."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(content, dict) or any(isinstance(value, Tensor) for value in content.values()):
            break
        content = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), dict)), None)
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(
            f"weights {path!r} hold no network: expected tensors, or one of {', '.join(_CONTAINERS)}"
        )
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _strip_prefixes(state: State, path: str) -> State:
    for role in ("teacher.", "student."):
        if any(name.startswith(role) for name in state):
            state = {name.removeprefix(role): value for name, value in state.items() if name.startswith(role)}
    stripped: State = {}
    for name, value in state.items():
        short = name
        while prefix := next((p for p in _PREFIXES if short.startswith(p)), None):
            short = short.removeprefix(prefix)
        if short in stripped:
            raise UserError(
                f"weights {path!r} hold two tensors that would be {short!r}: save one network per file"
            )
        stripped[short] = value
    return stripped


def _leave_out_heads(found: State, own: State) -> tuple[State, tuple[str, ...]]:
    ignored = tuple(name for name in found if name.split(".")[0] in _NOT_BACKBONE and name not in own)
    return {name: tensor for name, tensor in found.items() if name not in ignored}, ignored


def _same_shape(found: State, own: State, name: str) -> bool:
    return found[name].shape == own[name].shape


def _fit_pos_embed(net: Any, pos_embed: Tensor) -> Tensor | None:
    """Resample a file's position embedding to the network's grid, None if it is of no grid of that shape.

    Files hold no grid: images are taken to be as square as the network's own, so its patches decide the shape.
    Entries without a place stay in front.
    """
    own_prefix = 0 if net.no_embed_class else net.num_prefix_tokens
    # DINOv2 with registers: the file has an entry for the class token that timm folds into the token itself.
    for num_prefix in (own_prefix, 1, 0) if pos_embed.ndim == 3 else ():
        places, (rows, columns) = max(pos_embed.shape[1] - num_prefix, 0), net.patch_embed.grid_size
        height = math.isqrt(places * rows // columns)
        width = height * columns // rows
        if places and height * width == places and height * columns == width * rows:
            return resample_pos_embed(pos_embed, num_prefix, (height, width), (rows, columns))
    if pos_embed.shape == net.pos_embed.shape:  # a grid that is not square, but the network's own
        return pos_embed
    return None


def _to_timm_names(net: Any, state: State) -> State:
    """Rename with timm's own tables, but keep from them what they would resample."""
    if type(net).__name__ not in _TIMM_FORMS or net.state_dict().keys() <= state.keys():
        return state
    kept = {name: tensor for name, tensor in state.items() if _is_resampled(name)}
    try:
        found = _TIMM_FORMS[type(net).__name__](
            {name: tensor for name, tensor in state.items() if name not in kept}, net
        )
    except (LookupError, AttributeError, RuntimeError, TypeError, ValueError, AssertionError):
        return state  # of another kind of network altogether, which the report will show by its names
    return found | kept


def _is_resampled(name: str) -> bool:
    """Tell whether timm would resample a tensor to the network's shape; positions have that shape by now."""
    table = name.startswith("layers.") and name.endswith("relative_position_bias_table")
    return table or name == "patch_embed.proj.weight"
