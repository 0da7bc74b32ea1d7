"""The usual pipeline: PIL and torchvision crop and color every image in the loader."""

import io
import random
from functools import partial
from typing import Any

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from glsd.batches import NUM_GLOBAL
from glsd.data.crops import CropSpec
from glsd.data.photometric import MEAN, STD
from glsd.shards.store import ShardSet


class Sometimes:
    """Applies a change to a share of the images."""

    def __init__(self, share: float, change: Any):
        self.share, self.change = share, change

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.change(image) if random.random() < self.share else image


def blur(image: Image.Image, sigma: tuple[float, float]) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*sigma)))


def crop_transform(spec: CropSpec, number: int) -> transforms.Compose:
    """Return DINO's transform of crop ``number`` (0 and 1 are the global ones) with the rates of our own cropper."""
    is_global, kind = number < NUM_GLOBAL, min(number, NUM_GLOBAL)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                spec.global_size if is_global else spec.local_size,
                scale=spec.global_scale if is_global else spec.local_scale,
                interpolation=InterpolationMode.BICUBIC,
            ),
            transforms.RandomHorizontalFlip(spec.flip_prob),
            Sometimes(spec.jitter_prob, transforms.ColorJitter(*spec.jitter)),
            transforms.RandomGrayscale(spec.grayscale_prob),
            Sometimes(spec.blur_prob[kind], partial(blur, sigma=spec.blur_sigma)),
            Sometimes(spec.solarize_prob[kind], ImageOps.solarize),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


class PlainDataset(Dataset):
    """All crops of an image, in floating point."""

    def __init__(self, shards: ShardSet, spec: CropSpec):
        self.shards = shards
        self.transforms = [crop_transform(spec, number) for number in range(NUM_GLOBAL + spec.num_local)]

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> list[Tensor]:
        image = Image.open(io.BytesIO(self.shards.read(index))).convert("RGB")
        return [transform(image) for transform in self.transforms]


def plain_batches(shards: ShardSet, spec: CropSpec, *, batch_size: int, num_workers: int):
    """Yield lists of (b, 3, h, w) crops, one entry a crop, without end: at the end of an epoch nobody waits."""
    dataset = PlainDataset(shards, spec)
    yield from DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=RandomSampler(dataset, replacement=True, num_samples=2**40),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
