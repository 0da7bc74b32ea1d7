"""The smallest trees of files that a retrieval benchmark's owner could have published."""

from pathlib import Path

from tests.helpers.small_shards import noise_image


def put(root: Path, paths: list[str]) -> None:
    """Write a different image at each path."""
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(noise_image(number, "PNG" if path.endswith("png") else "JPEG"))


def lines(file: Path, *rows: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{row}\n" for row in rows))


def cub_tree(src: Path) -> dict[str, tuple[str, str]]:
    """Write six images of the classes 1, 100, 101 and 200 of CUB-200-2011; return role and class name of each.

    Their order is not that of the classes.
    """
    root = src / "CUB_200_2011"
    names = {number: f"{number:03d}.Bird_{number}" for number in range(1, 201)}
    classes = [101, 1, 200, 100, 1, 101]
    paths = [f"{names[number]}/Bird_{place}.jpg" for place, number in enumerate(classes)]
    put(root, [f"images/{path}" for path in paths])
    lines(root / "classes.txt", *(f"{number} {name}" for number, name in names.items()))
    lines(root / "images.txt", *(f"{place + 7} {path}" for place, path in enumerate(paths)))
    lines(
        root / "image_class_labels.txt",
        *(f"{place + 7} {number}" for place, number in reversed(list(enumerate(classes)))),
    )
    lines(root / "train_test_split.txt", *(f"{place + 7} {place % 2}" for place in range(6)))  # to be ignored
    return {
        f"images/{path}": ("train" if number <= 100 else "test", names[number])
        for path, number in zip(paths, classes, strict=True)
    }
