"""The crops of a run with the default configuration."""

import dataclasses
from typing import Any

from glsd.config.pretrain import DataConfig
from glsd.data.crops import CropSpec


def usual_spec(**changes: Any) -> CropSpec:
    """Return the default crops with some settings changed."""
    return dataclasses.replace(CropSpec.of(DataConfig()), **changes)
