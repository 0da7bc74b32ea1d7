"""A folder of pictures with hard names, one of which cannot be read."""

import os
from pathlib import Path

from tests.helpers.small_shards import scene

BROKEN = "b/broken.png"  # stands in the middle


def hard_pictures(root: Path) -> Path:
    """Write 79 pictures and a broken file in three classes; names have spaces, line ends and bytes that are no text."""
    for number in range(79):
        path = root / "abc"[number % 3] / f"im {number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        scene(number, width=48 + number % 5, height=40).save(path)
    (root / BROKEN).write_bytes(b"no image")
    os.rename(root / "a" / "im 000.png", root / "a" / 'ünï, "code".png')
    os.rename(root / "a" / "im 003.png", os.fsencode(root / "a") + b"/byte \xff.png")
    os.rename(root / "b" / "im 001.png", root / "b" / "line\nend\r.png")
    return root
