"""The face of a trained network: load it, embed images, look at its patches and its attention."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor
from tqdm import tqdm

from glsd.data.transform import EvalTransform, choose_sizes
from glsd.errors import BrokenImage, UserError
from glsd.geometry import patch_sides
from glsd.inference.embed import batches_of, embedded
from glsd.inference.images import Images, as_images
from glsd.inference.plain import plain_form
from glsd.loading import Loaded, load_network
from glsd.models.backbone import Backbone, check_image_size
from glsd.models.embedder import Embedder
from glsd.models.tokens import attention_of

WORKERS_FROM = 256  # so many images are worth the start of loader processes


class Squares(NamedTuple):
    """Some images as a network sees them, before they are normalized."""

    names: list[str]
    pixels: UInt8[Tensor, "n 3 s s"]


class Model:
    """A frozen network with the transform that its images need; ``glsd.load`` makes it.

    Attributes: ``name`` says where it came from, ``width`` is the length d of a vector, ``transform`` makes an input from
    a picture, ``network`` is the torch module, ``device`` where it is.
    """

    def __init__(self, loaded: Loaded):
        self._loaded = loaded
        self.name = loaded.name
        self.network: Backbone | Embedder = loaded.network.eval()
        self.width = loaded.network.embed_dim
        self.device = torch.device("cpu")
        sizes = choose_sizes(loaded.crop, resize=loaded.resize)
        self.transform = EvalTransform(resize=sizes.resize, crop=sizes.crop)

    def __repr__(self) -> str:
        return f"<glsd model: {self.name}, width {self.width}, {self.transform}, on {self.device}>"

    @property
    def step(self) -> int | None:
        """The step of the checkpoint, None for a network that is not a run's."""
        return self._loaded.step

    @property
    def has_class_token(self) -> bool:
        """Whether ``attention`` can say something."""
        return getattr(self.backbone.net, "cls_token", None) is not None

    @property
    def loaded(self) -> Loaded:
        """What the path named: the network, and the run and the checkpoint that it is of."""
        return self._loaded

    @property
    def backbone(self) -> Backbone:
        """The network without the embedding layer of metric learning."""
        return self.network.backbone if isinstance(self.network, Embedder) else self.network

    @property
    def timm(self) -> Any:
        """The network as a plain timm module: a copy that returns the same vectors and needs no code of ours.

        Its ``pretrained_cfg`` says what its images need, so timm's own functions build the right transform from it. The
        layer of metric learning is timm's classifier. A ViT with learned positions takes images of its native size only.
        Raises UserError for a network that timm cannot express.
        """
        return plain_form(self.network, self.transform).net

    def to(self, device: str | torch.device) -> "Model":
        """Move the network to a device, in place, and return the model."""
        self.device = torch.device(device)
        self.network.to(self.device)
        return self

    def embed(
        self,
        images: Any,
        *,
        batch_size: int = 64,
        num_workers: int | None = None,
        precision: str = "no",
        progress: bool = False,
    ) -> Float32[np.ndarray, "n d"]:
        """Return one vector per image: the embedding of metric learning, or the pooled feature of a backbone.

        images: a folder, shards, one path, or a list of paths, Pillow images, arrays (h, w, 3) or tensors (3, h, w), both
        uint8 RGB. Images of a folder come sorted by path (``glsd.list_images`` names them). num_workers: loader processes;
        None = 2 for many images, none for few. precision: "no" (float32) or "bf16". progress: show a bar, on a terminal.
        Raises UserError for an image that cannot be read; ``glsd embed`` lists such images and goes on.
        """
        chosen = as_images(images)
        total = len(chosen.names)
        workers = (2 if total >= WORKERS_FROM else 0) if num_workers is None else num_workers
        parts = embedded(
            chosen,
            self.features,
            self.transform,
            batches=batches_of(range(total), batch_size),
            num_workers=workers,
            device=self.device,
            precision=precision,
        )
        found = []
        with tqdm(total=total, unit="image", disable=None if progress else True) as bar:
            for part in parts:
                for number, reason in part.unreadable:
                    raise UserError(f"image {chosen.names[number]} cannot be read: {reason}")
                found.append(part.vectors)
                bar.update(len(part.vectors))
        return np.concatenate(found)

    def squares(self, images: Images, numbers: Sequence[int]) -> Squares:
        """Return the center squares of some images. Raises UserError for one that cannot be read."""
        found = []
        for number in numbers:
            try:
                found.append(self.transform.square(images.pixels(number)))
            except BrokenImage as problem:
                raise UserError(f"image {images.names[number]} cannot be read: {problem}") from problem
        return Squares([images.names[number] for number in numbers], torch.stack(found))

    @torch.no_grad()
    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return one vector per image, without gradient. images: as ``transform`` makes them, on the model's device."""
        return self._loaded.features(images)

    @torch.no_grad()
    def patches(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b r c d"]:
        """Return the backbone's patch features in rows and columns. images: as for ``features``, of any size that fits."""
        return self.backbone(images)[1].unflatten(1, self._grid(images))

    @torch.no_grad()
    def attention(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b a r c"]:
        """Return the attention of the class token to the patches in the last block, by head, rows and columns.

        The shares of one head sum to at most 1: the rest goes to the class token and to registers. Raises UserError for a
        network without a class token.
        """
        grid = self._grid(images)
        return attention_of(self.backbone.net, lambda: self.backbone(images)).unflatten(2, grid)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        """Return the rows and columns of patches. Raises UserError for a side that is not a multiple of the patch's."""
        height, width = images.shape[2:]
        down, across = patch_sides(self.backbone.stride)
        check_image_size(height, down)
        check_image_size(width, across)
        return height // down, width // across


def load(
    path: str | Path,
    *,
    role: str | None = None,
    backbone: str = "",
    pool: str | None = None,
    image_size: int | None = None,
    which: str = "last",
    device: str | torch.device = "cpu",
) -> Model:
    """Return the model that ``path`` names: a run of either stage, a checkpoint, ``timm:NAME`` or a weights file.

    role: which network of a run, 'teacher', 'student' or 'initial'; None = the teacher of pretraining, the student of metric
    learning. backbone: timm name of the network that a weights file belongs to. pool: 'cls', 'mean' or 'mean+max'; None = as
    the run was trained, 'cls' otherwise. image_size: side of the center crop in pixels, for a network that is not a run's;
    None = 224. which: 'last' or 'best' checkpoint of a run, by its probes. Raises UserError if the path names no network, or
    the weights do not fit.
    """
    wanted: dict[str, Any] = {"role": role, "backbone": backbone, "pool": pool, "image_size": image_size}
    return Model(load_network(str(path), which=which, **wanted)).to(device)


def list_images(images: Any) -> list[str]:
    """Return the names of the images that ``embed`` would take, in its order."""
    return list(as_images(images).names)
