"""Shared fixtures: one thread per process, the photographs when they are at hand."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photos() -> Path:
    """The folder with pretrain_caltech101/ and dml_grocery81/, from $GLSD_PHOTOS or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("GLSD_PHOTOS", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "pretrain_caltech101").is_dir():
        pytest.skip(f"no photographs: {folder} has no pretrain_caltech101/ (set GLSD_PHOTOS to the folder that has)")
    return folder
