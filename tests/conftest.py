"""Shared fixtures: one thread per process, the photographs when they are at hand."""

import functools
import os
import signal
from pathlib import Path

import pytest
import torch

from glsd.packing.write import pack_samples
from tests.helpers.small_shards import digit_sample, pack_digit_classes, pack_noise
from tests.helpers.warm_python import warm_python

# Programs that tests start find this checkout, its tests and its laboratory.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_signals():
    """A run that was told to stop leaves SIGTERM and SIGUSR1 ignored; the next test must not inherit that."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def python() -> str:
    """A program that runs python scripts, without the seconds of their imports."""
    return warm_python()


@pytest.fixture(scope="session")
def photos() -> Path:
    """The folder with pretrain_caltech101/ and dml_grocery81/, from $GLSD_PHOTOS or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("GLSD_PHOTOS", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "pretrain_caltech101").is_dir():
        pytest.skip(
            f"no photographs: {folder} has no pretrain_caltech101/ (set GLSD_PHOTOS to the folder that has)"
        )
    return folder


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache, which no other test has filled."""
    monkeypatch.setenv("GLSD_CACHE", str(tmp_path / "own_cache"))


@pytest.fixture
def make_shards(tmp_path):
    """The function that packs shards of noise into the test's folder, labels number % 7 (see pack_noise)."""
    return functools.partial(pack_noise, tmp_path)


@pytest.fixture(scope="session")
def digit_shards(tmp_path_factory) -> Path:
    """Folder with train-a-000000.tar, train-b-000000.tar (48 labeled 40x40 digits) and val-000000.tar (24)."""
    folder = tmp_path_factory.mktemp("digits")
    for prefix, first in (("train-a", 0), ("train-b", 24), ("val", 48)):
        pack_samples(map(digit_sample, range(first, first + 24)), folder, prefix=prefix)
    return folder


@pytest.fixture
def tiny_run(digit_shards, tmp_path):
    """A function (name, **changes of dotted keys) -> argv of a pretraining run that takes milliseconds a step."""

    def argv(name: str = "run", **changes) -> list[str]:
        values = {
            "out": str(tmp_path / name),
            "data.shards": f"{digit_shards}/train-*.tar",
            "data.num_workers": 0,
            "data.global_size": 32,
            "data.local_size": 16,
            "data.num_local": 2,
            "model.backbone": "vit_tiny_patch16_224",
            "model.timm_args": "{patch_size: 8, depth: 2, embed_dim: 32, num_heads: 2}",
            "head.num_prototypes": 64,
            "head.hidden_dim": 32,
            "head.bottleneck_dim": 16,
            "optim.epochs": 4,
            "optim.batch_size": 8,
            "optim.warmup_epochs": 1,
            "watch.log_every": 1,
            "watch.checkpoint_every": 100,
            "watch.probe_every": 0,
            "watch.pictures": "false",
        }
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        return [f"--{key}={value}" for key, value in values.items()]

    return argv


@pytest.fixture(scope="session")
def class_shards(tmp_path_factory) -> Path:
    """Folder with train-000000.tar (digits 0 to 5, 12 images each) and test-000000.tar (digits 6 to 9, 10 each)."""
    folder = tmp_path_factory.mktemp("classes")
    pack_digit_classes(folder, prefix="train", classes=range(6), count=12)
    pack_digit_classes(folder, prefix="test", classes=range(6, 10), count=10)
    return folder


@pytest.fixture
def many_digits(tmp_path) -> Path:
    """As class_shards, with 100 and 20 images of each digit."""
    folder = tmp_path / "many"
    pack_digit_classes(folder, prefix="train", classes=range(6), count=100)
    pack_digit_classes(folder, prefix="test", classes=range(6, 10), count=20)
    return folder


@pytest.fixture
def tiny_finetune(class_shards, tmp_path):
    """A function (name, **changes of dotted keys) -> argv of a metric-learning run that takes milliseconds a step."""

    def argv(name: str = "run", **changes) -> list[str]:
        values = {
            "out": str(tmp_path / name),
            "init": "random",
            "data.train_shards": f"{class_shards}/train-*.tar",
            "data.test_shards": f"{class_shards}/test-*.tar",
            "data.num_workers": 0,
            "data.crop": 32,
            "data.images_per_class": 4,
            "model.backbone": "vit_tiny_patch16_224",
            "model.timm_args": "{patch_size: 8, depth: 2, embed_dim: 32, num_heads: 2}",
            "model.embed_dim": 16,
            "optim.epochs": 2,
            "optim.batch_size": 16,
            "optim.lr": 1e-3,
            "watch.log_every": 1,
            "watch.recall_at": "[1,2]",
        }
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        return [f"--{key}={value}" for key, value in values.items()]

    return argv
