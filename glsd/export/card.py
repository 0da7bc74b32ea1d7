"""The model card of an export: what the network is, how to use it, how it was trained and measured, and the proof."""

import inspect
import json
from pathlib import Path
from typing import Any

from glsd import __version__
from glsd.config.finetune import FinetuneConfig
from glsd.config.parse import differences
from glsd.errors import UserError
from glsd.evaluate.record import read_records
from glsd.export import foreign
from glsd.export.proof import Proof
from glsd.inference.model import Model
from glsd.loading import Loaded
from glsd.models.embedder import Embedder
from glsd.runtime.run import redact
from glsd.shards.find import find_sources
from glsd.shards.remote import is_remote
from glsd.shards.store import open_shards

_FILL_IN = "FILL-IN"
_POOLED = {
    "cls": "the class token",
    "mean": "the mean of the patch tokens",
    "mean+max": "mean + maximum of the patch tokens",
}
_LIBRARIES = {"hf": "transformers", "torchscript": "pytorch"}
# Settings that say where and how fast a run was, not what it learned; paths may be nobody's business.
_LEFT_OUT = ("out", "resume", "watch.", "cluster.", "data.num_workers", "model.compile", "optim.micro_batch")

_TIMM = """\
import timm, torch
from PIL import Image

net = timm.create_model("local-dir:{out}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config({{}}, model=net))
with torch.no_grad():
    vectors = net(transform(Image.open("photo.jpg").convert("RGB"))[None])"""
_HF = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, {auto}

processor, net = AutoImageProcessor.from_pretrained("{out}"), {auto}.from_pretrained("{out}").eval()
with torch.no_grad():
    vectors = net(**processor(Image.open("photo.jpg").convert("RGB"))).{result}"""
_ONNX = """\
import json
import numpy as np
import onnxruntime
from PIL import Image

{prepare}

session = onnxruntime.InferenceSession("{out}/model.onnx")
about = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
(vectors,) = session.run(["features"], {{"images": prepare(Image.open("photo.jpg"), about)[None]}})"""
_TORCHSCRIPT = """\
import json
import numpy as np
import torch
from PIL import Image

{prepare}

extra = {{"preprocessing.json": ""}}
net = torch.jit.load("{out}/model.pt", _extra_files=extra)
with torch.no_grad():
    vectors = net(torch.from_numpy(prepare(Image.open("photo.jpg"), json.loads(extra["preprocessing.json"])))[None])"""
_SAFETENSORS = """\
import json
import numpy as np
import timm
import torch
from PIL import Image
from safetensors import safe_open

{prepare}

with safe_open("{out}/model.safetensors", "pt") as file:
    about, weights = file.metadata(), {{name: file.get_tensor(name) for name in file.keys()}}
net = timm.create_model(
    about["architecture"], num_classes=int(about["num_classes"]), **json.loads(about["model_args"])
).eval()
net.load_state_dict(weights)
with torch.no_grad():
    vectors = net(torch.from_numpy(prepare(Image.open("photo.jpg"), json.loads(about["preprocessing"])))[None])"""
USE = {
    "timm": _TIMM,
    "hf": _HF,
    "onnx": _ONNX,
    "torchscript": _TORCHSCRIPT,
    "safetensors": _SAFETENSORS,
}


def write_card(
    folder: Path, form: str, loaded: Loaded, model: Model, proof: Proof, *, name: str, has_layer: bool
) -> None:
    """Write README.md; ``name`` is that of the final folder, has_layer: timm's classifier makes the vector."""
    parts = [
        f"---\nlibrary_name: {_LIBRARIES.get(form, form)}\npipeline_tag: image-feature-extraction\n"
        f"tags: [glsd, image-retrieval]\nlicense: {_FILL_IN}  # such as apache-2.0\n---",
        f"# {name}\n\n{_summary(loaded)}",
        f"## Use\n\n{_use(form, name, has_layer)}\n\n{_sizes(form, model, proof)}\n\n{_PREPARED}",
        f"## Network\n\n{_network(model)}",
        f"## Training\n\n{_training(loaded)}",
        f"## Evaluations\n\n{_evaluations(loaded)}",
        "## Proof\n\nMeasured when this folder was written:\n\n"
        + "\n".join(f"- {line}" for line in proof.lines()),
        f"## License\n\n{_FILL_IN}: name the license of the weights here and in the first lines of this file. It depends on "
        "the images, and on the weights that training started from.",
        "## Publish\n\n```python\nimport huggingface_hub\n\n"
        f'huggingface_hub.create_repo("you/{name}", exist_ok=True)\n'
        f'huggingface_hub.upload_folder(repo_id="you/{name}", folder_path="{name}")\n```',
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


_PREPARED = (
    "Turn a photograph upright first if its EXIF data asks for it: `PIL.ImageOps.exif_transpose(image)`. glsd does so; "
    "the code above does not. Images longer than 8 : 1 are cut to 8 : 1 by glsd before they are resized."
)


def _use(form: str, name: str, has_layer: bool) -> str:
    auto, result = (
        ("AutoModelForImageClassification", "logits") if has_layer else ("AutoModel", "pooler_output")
    )
    prepare = inspect.getsource(foreign.prepare).strip()
    code = f"```python\n{USE[form].format(out=name, auto=auto, result=result, prepare=prepare)}\n```"
    if form == "hf" and has_layer:
        code += "\n\n`AutoModel` would leave out the last linear layer and return the pooled feature: take the class above."
    return code


def _summary(loaded: Loaded) -> str:
    width = loaded.network.embed_dim
    if loaded.config is None:
        return f"Image features of width {width}, exported by glsd {__version__} from {_without_folders(loaded.name)}."
    role = loaded.name.partition(" of ")[0]
    step = f", step {loaded.step:,}" if loaded.step else ""
    if isinstance(loaded.config, FinetuneConfig):
        what = f"Embeddings of width {width} for image retrieval, learned with labels"
    else:
        what = (
            f"Image features of width {width}, learned without labels by global and local self-distillation"
        )
    return f"{what} ({role}{step}). Exported by glsd {__version__}."


def _sizes(form: str, model: Model, proof: Proof) -> str:
    """Return what image sizes the export takes, and what happens at another one."""
    side, stride = model.transform.crop, model.backbone.stride
    if proof.other_size is not None:
        return (
            f"Images are {side} x {side} pixels. Other sizes give the features that glsd gives, if both sides are multiples of "
            f"{stride}."
        )
    only = f"Images must be {side} x {side} pixels; another size is an error."
    if form in ("torchscript", "onnx"):
        return only
    return (
        f"{only} With `dynamic_img_size=True` or another `img_size` timm takes other sizes, but it resamples the position "
        "embedding with antialiasing and glsd without: the features are then not those of glsd. The ONNX export gives "
        "those of glsd at every size."
    )


def _network(model: Model) -> str:
    backbone = model.backbone
    assert backbone.built_with is not None
    name, _ = backbone.built_with
    millions = sum(p.numel() for p in model.network.parameters()) / 1e6
    layer = isinstance(model.network, Embedder) and model.network.head is not None
    vector = f"{_POOLED[backbone.pool]} after the final norm{', through a linear layer' if layer else ''}"
    resize, crop = model.transform.resize, model.transform.crop
    return "\n".join(
        [
            f"- {name} of timm, {millions:.2f} M parameters, stride {backbone.stride}",
            f"- vector: {vector}, width {model.width}",
            f"- preprocessing: RGB, short side to {resize} pixels (bicubic, antialiased), center crop of {crop}, mean and "
            "deviation of ImageNet",
        ]
    )


def _training(loaded: Loaded) -> str:
    if loaded.config is None:
        return "Not trained by a run of glsd."
    settings = {k: v for k, v in differences(loaded.config).items() if _is_shown(k)}
    lines = [f"- images in the training shards: {_count_images(loaded)}", f"- step: {loaded.step:,}"]
    lines.append(
        "- settings that differ from glsd's defaults:" if settings else "- settings: glsd's defaults"
    )
    for key, value in settings.items():
        lines.append(f"  - `{key}: {_without_folders(value) if key in ('init', 'model.init') else value}`")
    return "\n".join(lines)


def _is_shown(key: str) -> bool:
    return not (key.endswith("_shards") or key == "data.shards" or key.startswith(_LEFT_OUT))


def _without_folders(name: object) -> str:
    """Return the last part of a path: where something lay on a disk is not for the public."""
    text = redact(str(name))
    return text if text.startswith("timm:") else Path(text).name


def _count_images(loaded: Loaded) -> str:
    """Return the number of training images, if the shards lie here and are those of the checkpoint."""
    assert loaded.config is not None
    assert loaded.run is not None
    finetuned = isinstance(loaded.config, FinetuneConfig)
    key = "data.train_shards" if finetuned else "data.shards"
    patterns = (
        loaded.config.data.train_shards
        if isinstance(loaded.config, FinetuneConfig)
        else loaded.config.data.shards
    )
    state = loaded.run / "checkpoints" / f"step_{loaded.step:08d}" / "state.json"
    unknown = f"{_FILL_IN} (the shards of the run are not here, or no longer the same)"
    try:
        if any(is_remote(path) for paths in find_sources(patterns) for path in paths):
            return unknown
        shards = open_shards(patterns)
        known = json.loads(state.read_text())["order"][key]
    except (UserError, OSError, KeyError, ValueError):
        return unknown
    return f"{len(shards):,}" if known == shards.fingerprint() else unknown


def _evaluations(loaded: Loaded) -> str:
    """Return a table for each evaluation of this very network: the same role and step."""
    records = read_records(loaded.run) if loaded.run else []
    role = loaded.name.partition(" of ")[0]
    mine = [
        x for x in records if x.get("step") == loaded.step and str(x.get("model")).startswith(f"{role} of ")
    ]
    if not mine:
        return "evals.json of the run holds none of this network. `glsd evaluate` writes them."
    return "\n\n".join(_table(record) for record in mine)


def _table(record: dict[str, Any]) -> str:
    protocol = record.get("protocol", "")
    words = " ".join(protocol.values()) if isinstance(protocol, dict) else str(protocol)
    sets = [
        f"{name}: {x['images']:,} images"
        for name, x in record.items()
        if isinstance(x, dict) and "images" in x
    ]
    results = {
        k: v for k, v in record.items() if isinstance(v, dict) and "images" not in v and k != "protocol"
    }
    rows = _numbers(
        dict(list(results.items())[-1:])
    )  # metric learning records epoch 0, too, before the last one
    head = f"{str(record.get('time', ''))[:10]}: {words}" + (f" ({', '.join(sets)})" if sets else "")
    return "\n".join(
        [head, "", "| measure | value |", "|---|---|", *(f"| {name} | {x:.4g} |" for name, x in rows)]
    )


def _numbers(tree: dict[str, Any], above: str = "") -> list[tuple[str, float]]:
    """Return the numbers of nested dictionaries with their names in a row."""
    found: list[tuple[str, float]] = []
    for key, value in tree.items():
        name = f"{above} {key}".strip().removeprefix("result ")
        if isinstance(value, dict):
            found += _numbers(value, name)
        elif isinstance(value, int | float) and key != "tie_gap":
            found.append((name, value))
    return found
