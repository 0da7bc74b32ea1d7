"""The other side of an export's proof: loads the written model with the foreign library alone, and runs it.

A program of its own, ``python -P foreign.py FORM FOLDER WORK``, which imports nothing of glsd. WORK holds images/*.png,
inputs.npy and perhaps other.npy (inputs of another size); it gets results.npz and library.json.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Forward = Callable[[np.ndarray], np.ndarray]  # images (b 3 h w) -> vectors (b d), both float32
Prepare = Callable[[Image.Image], np.ndarray]  # a picture -> an image (3 h w)
BATCH = 5  # does not divide 32: batches of two sizes


def prepare(image: Image.Image, about: dict) -> np.ndarray:
    """Resize the short side, cut the center square, normalize."""
    width, height = image.size
    short, side = about["resize"], about["crop"]
    wide, high = max(short, short * width // height), max(short, short * height // width)
    left, top = round((wide - side) / 2), round((high - side) / 2)
    square = image.convert("RGB").resize((wide, high), Image.Resampling.BICUBIC)
    pixels = np.asarray(square.crop((left, top, left + side, top + side)), np.float32) / 255
    return ((pixels - about["mean"]) / about["std"]).transpose(2, 0, 1).astype(np.float32)


def load_timm(folder: Path) -> tuple[Forward, Prepare, str]:
    import timm

    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=net))
    return _run_torch(net), lambda image: transform(image).numpy(), f"timm {timm.__version__}"


def load_hf(folder: Path) -> tuple[Forward, Prepare, str]:
    import transformers

    layer = "ForImageClassification" in transformers.AutoConfig.from_pretrained(folder).architectures[0]
    kind = transformers.AutoModelForImageClassification if layer else transformers.AutoModel
    net, report = kind.from_pretrained(folder, output_loading_info=True)
    if wrong := {name: keys for name, keys in report.items() if keys}:
        raise ValueError(f"weights that do not fit: {wrong}")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    net.eval()

    def vectors(images: Any) -> Any:
        return net(pixel_values=images).logits if layer else net(pixel_values=images).pooler_output

    version = f"transformers {transformers.__version__}"
    return _run_torch(vectors), lambda image: processor(image)["pixel_values"][0].numpy(), version


def load_onnx(folder: Path) -> tuple[Forward, Prepare, str]:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    version = f"onnxruntime {onnxruntime.__version__}"
    return lambda x: session.run(["features"], {"images": x})[0], lambda image: prepare(image, about), version


def load_torchscript(folder: Path) -> tuple[Forward, Prepare, str]:
    import torch

    extra = {"preprocessing.json": ""}
    net = torch.jit.load(folder / "model.pt", _extra_files=extra)
    about = json.loads(extra["preprocessing.json"])
    return _run_torch(net), lambda image: prepare(image, about), f"torch {torch.__version__}"


def load_safetensors(folder: Path) -> tuple[Forward, Prepare, str]:
    import safetensors
    import timm

    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        said, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    args = json.loads(said["model_args"])
    net = timm.create_model(said["architecture"], num_classes=int(said["num_classes"]), **args).eval()
    net.load_state_dict(weights)
    about = json.loads(said["preprocessing"])
    version = f"safetensors {safetensors.__version__} and timm {timm.__version__}"
    return _run_torch(net), lambda image: prepare(image, about), version


LOADERS = {
    "timm": load_timm,
    "hf": load_hf,
    "onnx": load_onnx,
    "torchscript": load_torchscript,
    "safetensors": load_safetensors,
}


def _run_torch(net: Callable[[Any], Any]) -> Forward:
    import torch

    def forward(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return net(torch.from_numpy(images)).numpy()

    return forward


def main(form: str, folder: Path, work: Path) -> None:
    forward, prepared, library = LOADERS[form](folder)

    def batched(images: np.ndarray) -> np.ndarray:
        return np.concatenate([forward(images[i : i + BATCH]) for i in range(0, len(images), BATCH)])

    pictures = [Image.open(path) for path in sorted((work / "images").glob("*.png"))]
    pixels = np.stack([prepared(picture) for picture in pictures])
    results: dict[str, Any] = {"pixels": pixels, "from_pictures": batched(pixels)}
    for name in ("inputs", "other"):
        if (work / f"{name}.npy").exists():
            results[name] = batched(np.load(work / f"{name}.npy"))
    np.savez(work / "results.npz", **results)
    ours = sorted(name for name in sys.modules if name.split(".")[0] == "glsd")
    (work / "library.json").write_text(json.dumps({"library": library, "glsd_modules": ours}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
