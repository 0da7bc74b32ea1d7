"""Writing a trained network for other libraries: timm, transformers, ONNX, TorchScript, safetensors."""

import contextlib
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from timm.layers import pos_embed_sincos
from torch import Tensor, nn

from glsd.data.photometric import MEAN, STD
from glsd.errors import UserError, one_line, pick
from glsd.export.card import write_card
from glsd.export.proof import Proof, prove
from glsd.files import new_folder
from glsd.geometry import patch_sides
from glsd.inference.model import Model
from glsd.inference.plain import Plain, plain_form
from glsd.loading import load_network

# What a form needs besides glsd itself.
_PACKAGES = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "hf": ("transformers",)}
_WINDOWED = ("SwinTransformer", "SwinTransformerV2")  # whose graph holds the windows of one image size


class Written(NamedTuple):
    """What the proof and the card must know of an export."""

    any_size: bool  # it takes images of other sizes than the native one
    has_layer: bool  # timm's classifier makes the vector


def export(
    path: str,
    form: str,
    out: Path,
    *,
    role: str | None = None,
    backbone: str = "",
    pool: Any = None,
    image_size: int | None = None,
    which: str = "last",
) -> Proof:
    """Write the network that ``path`` names into the new folder ``out``, with a model card, and prove what was written.

    form: timm, hf, onnx, torchscript or safetensors. role, backbone, pool, image_size, which: as for ``load_network``. The folder
    appears when the proof has succeeded. Raises UserError if it has files already or cannot be written, a package is
    missing, the form cannot express the network, or the proof fails; then nothing stays.
    """
    write = pick(FORMS, form, "form")
    _check_packages(form)
    _check_out(out)
    loaded = load_network(path, role=role, backbone=backbone, pool=pool, image_size=image_size, which=which)
    model = Model(loaded)
    try:
        with new_folder(out.absolute()) as folder:
            written = write(folder, model)
            proof = prove(form, folder, model, any_size=written.any_size)
            write_card(
                folder, form, loaded, model, proof, name=out.absolute().name, has_layer=written.has_layer
            )
    except (OSError, SafetensorError) as problem:  # safetensors reports a full disk by its own type
        raise UserError(f"cannot write {out}: {one_line(problem)}; nothing was written") from problem
    return proof


def write_timm(folder: Path, model: Model) -> Written:
    """Write the folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads."""
    plain = plain_form(model.network, model.transform)
    _write_weights(folder, plain, {"format": "pt"})
    _write_json(folder / "config.json", plain.config())
    return Written(plain.any_size, plain.has_layer)


def write_hf(folder: Path, model: Model) -> Written:
    """Write the folder that transformers' auto classes load through their wrapper of timm.

    Not the native classes: their pooled output is another one (a dense layer with tanh, or no registers, or no mean), and
    would be random or wrong. AutoModel leaves out timm's classifier, so a network with a layer is an image classifier,
    whose logits are the vector.
    """
    plain = plain_form(model.network, model.transform)
    config = plain.config() | {"model_type": "timm_wrapper", "architectures": ["TimmWrapperModel"]}
    if plain.has_layer:
        config["architectures"] = ["TimmWrapperForImageClassification"]
        # Without names, a layer of 1000 would get those of ImageNet's classes.
        config["label_names"] = [f"dimension {i}" for i in range(plain.net.num_classes)]
    _write_weights(folder, plain, {"format": "pt"})
    _write_json(folder / "config.json", config)
    return Written(plain.any_size, plain.has_layer)


def write_safetensors(folder: Path, model: Model) -> Written:
    """Write one weights file by timm's names, whose header says how to build the network and prepare its images."""
    plain = plain_form(model.network, model.transform)
    about = {
        "format": "pt",
        "architecture": plain.architecture,
        "num_classes": str(plain.net.num_classes),
        "model_args": json.dumps(plain.args),
        "preprocessing": json.dumps(preprocessing(model)),
    }
    _write_weights(folder, plain, about)
    return Written(plain.any_size, plain.has_layer)


def write_torchscript(folder: Path, model: Model) -> Written:
    """Write a traced graph for batches of any length of images of the native size; it refuses other sizes."""
    plain = plain_form(model.network, model.transform)
    size, extra = model.transform.crop, {"preprocessing.json": json.dumps(preprocessing(model))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice to its own users: tracing, deprecation
        traced: Any = torch.jit.trace(
            _Sized(plain.net, size).eval(), torch.zeros(3, 3, size, size), check_trace=False
        )
        packed = io.BytesIO()
        torch.jit.save(traced, packed, _extra_files=extra)
    (folder / "model.pt").write_bytes(packed.getbuffer())
    return Written(False, plain.has_layer)


def write_onnx(folder: Path, model: Model) -> Written:
    """Write a graph for batches of any length, and for images of any size unless the network has windows.

    It is our own network, so positions are resampled as ours are.
    """
    any_size = type(model.backbone.net).__name__ not in _WINDOWED
    (down, across), side = patch_sides(model.backbone.stride), model.transform.crop
    sizes: dict[int, Any] = {0: torch.export.Dim("batch")}
    if any_size:
        sizes |= {2: down * torch.export.Dim("rows"), 3: across * torch.export.Dim("columns")}
    # Dimensions of 1, and equal ones, would be taken for constants.
    example = torch.zeros(2, 3, *((side + down, side + 2 * across) if any_size else (side, side)))
    with warnings.catch_warnings(), sizes_of_positions_stay_open():
        warnings.simplefilter("ignore")  # torch's own deprecations
        try:
            program: Any = torch.onnx.export(
                _Vectors(model).eval(),
                (example,),
                dynamo=True,
                dynamic_shapes={"images": sizes},
                input_names=["images"],
                output_names=["features"],
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as problem:
            raise UserError(f"--to onnx: torch cannot export this network: {one_line(problem)}") from problem
    program.model.metadata_props["preprocessing"] = json.dumps(preprocessing(model))
    program.save(folder / "model.onnx")
    return Written(any_size, False)


@contextlib.contextmanager
def sizes_of_positions_stay_open() -> Iterator[None]:
    """Let a graph that is traced in the block keep the size of an image as a variable in DINOv3's rotary positions.

    timm divides their coordinates by ``float(size)``, which would write the size of the example into the graph.
    """
    module: Any = pos_embed_sincos
    module.float = lambda size: size
    try:
        yield
    finally:
        del module.float


FORMS: dict[str, Callable[[Path, Model], Written]] = {
    "timm": write_timm,
    "hf": write_hf,
    "onnx": write_onnx,
    "torchscript": write_torchscript,
    "safetensors": write_safetensors,
}


def preprocessing(model: Model) -> dict[str, Any]:
    """Return what a program needs to make an input from a picture: pixels of the resize and the crop, mean, deviation."""
    resize, crop = model.transform.resize, model.transform.crop
    return {"resize": resize, "crop": crop, "interpolation": "bicubic", "mean": list(MEAN), "std": list(STD)}


class _Vectors(nn.Module):
    """Images -> vectors as a module, which torch.onnx needs."""

    def __init__(self, model: Model):
        super().__init__()
        self.network, self._features = model.network, model._loaded.features

    def forward(self, images: Tensor) -> Tensor:
        return self._features(images)


class _Sized(nn.Module):
    """A network that refuses images of another size: its traced graph would run on for some, and return nonsense."""

    def __init__(self, net: nn.Module, size: int):
        super().__init__()
        self.net, self.size = net, size

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.expand(-1, 3, self.size, self.size))


def _write_weights(folder: Path, plain: Plain, about: dict[str, str]) -> None:
    file = folder / "model.safetensors"
    tensors = {name: x.contiguous() for name, x in plain.net.state_dict().items()}
    safetensors.torch.save_file(tensors, file, about)
    file.chmod(folder.stat().st_mode & 0o666)  # safetensors writes files that only their owner can read


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _check_packages(form: str) -> None:
    missing = [name for name in _PACKAGES.get(form, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to {form} needs {', '.join(missing)}: pip install 'glsd[export]'")


def _check_out(out: Path) -> None:
    """Raise UserError unless ``out`` is free or an empty folder."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        what = "a folder with files" if out.is_dir() else "not a folder"
        raise UserError(f"out {str(out)!r} exists and is {what}: give a new folder, or delete it first")
