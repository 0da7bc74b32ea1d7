"""The pictures: what is drawn where, and that a picture is written whole or not at all."""

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.patches import ConnectionPatch, Rectangle
from PIL import Image

from glsd.errors import UserError
from glsd.show import matches, neighbors
from glsd.show.matches import draw_matches
from glsd.show.neighbors import draw_neighbors


@pytest.fixture
def figures(monkeypatch):
    """The figures that would be written."""
    drawn: list = []
    for module in (matches, neighbors):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: drawn.append(figure))
    return drawn


def crops(m, side, seed=0):
    return torch.randint(
        0, 256, (m, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def lines_of(figure):
    return [artist for artist in figure.artists if isinstance(artist, ConnectionPatch)]


def test_lines_join_the_centers_of_matched_patches(figures, tmp_path):
    # A local crop of 2 x 2 patches in a global crop of 3 x 3 patches of 8 pixels.
    index = torch.tensor([[4, 8, 0, 5]])
    weight = torch.tensor([[1.0, 0.25, 0.0, 1.0]])
    draw_matches(tmp_path / "x.png", crops(1, 16), crops(1, 24), index=index, weight=weight, stride=8)
    (figure,) = figures
    ends = [(line.xy1, line.xy2) for line in lines_of(figure)]
    # Pixel centers are whole numbers, so the middle of the first patch of 8 pixels is 3.5.
    assert ends == [((3.5, 3.5), (11.5, 11.5)), ((11.5, 3.5), (19.5, 19.5)), ((11.5, 11.5), (19.5, 11.5))]
    left, right = figure.axes
    dark = [p.get_xy() for p in left.patches if isinstance(p, Rectangle) and p.get_fill()]
    assert dark == [(-0.5, 7.5)]  # the rejected patch: first column, second row
    assert "3 of 4 patches matched" in left.get_title()
    assert len(right.patches) == 3


def test_only_a_readable_number_of_lines_spread_over_all_patches(figures, tmp_path):
    index = torch.arange(196).repeat(2, 1)
    weight = torch.stack([torch.ones(196), torch.zeros(196)])
    draw_matches(
        tmp_path / "x.png", crops(2, 224), crops(2, 224), index=index, weight=weight, stride=16, lines=10
    )
    ends = [line.xy1 for line in lines_of(figures[0])]
    assert len(ends) == len(set(ends)) == 10
    assert min(y for _, y in ends) < 56
    assert max(y for _, y in ends) > 168
    assert figures[0].axes[2].get_title() == "student: 0 of 196 patches matched"


def test_match_picture_is_written_whole(tmp_path):
    first, second = crops(3, 32), crops(3, 32, seed=1)
    kept = first.clone()
    path = tmp_path / "new" / "first_batch.png"
    arguments: dict[str, Any] = {
        "index": torch.zeros(3, 16, dtype=torch.int64),
        "weight": torch.ones(3, 16),
        "stride": 8,
    }
    draw_matches(path, first, second, **arguments)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
        assert np.asarray(picture).std() > 10
    assert torch.equal(first, kept)
    assert [p.name for p in path.parent.iterdir()] == ["first_batch.png"]  # no draft is left
    before = path.read_bytes()
    draw_matches(path, first, second, **arguments)
    assert path.read_bytes() == before


def test_unwritable_folder_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write the picture"):
        draw_neighbors(
            tmp_path / "file" / "x.png",
            crops(1, 8),
            crops(2, 8)[None],
            query_labels=torch.zeros(1, dtype=torch.int64),
            neighbor_labels=torch.zeros(1, 2, dtype=torch.int64),
            cosines=torch.ones(1, 2),
        )


def test_neighbors_are_marked_right_or_wrong(figures, tmp_path):
    draw_neighbors(
        tmp_path / "x.png",
        crops(2, 8),
        crops(6, 8).unflatten(0, (2, 3)),
        query_labels=torch.tensor([1, 0]),
        neighbor_labels=torch.tensor([[1, 0, 1], [0, 0, 5]]),
        cosines=torch.tensor([[0.99, 0.5, 0.25], [0.75, 0.5, -0.125]], dtype=torch.float64),
    )
    titles = [axis.get_title() for axis in figures[0].axes]
    assert titles[:4] == ["query: 1", "✓ 1 0.99", "✗ 0 0.50", "✓ 1 0.25"]
    assert titles[4:] == ["query: 0", "✓ 0 0.75", "✓ 0 0.50", "✗ 5 -0.12"]
    colors = {axis.get_title()[0]: axis.spines["left"].get_edgecolor() for axis in figures[0].axes}
    assert len({colors[mark] for mark in "q✓✗"}) == 3
    shown = figures[0].axes[5].images[0].get_array()
    assert np.array_equal(shown, crops(6, 8)[3].permute(1, 2, 0).numpy())


def test_neighbors_carry_the_names_of_their_classes(figures, tmp_path):
    names = ["cat", "a dog of a very long kind", "$x^2$ \n", "\u732b"]
    draw_neighbors(
        tmp_path / "x.png",
        crops(1, 8),
        crops(4, 8)[None],
        query_labels=torch.tensor([0]),
        neighbor_labels=torch.tensor([[0, 1, 2, 4]]),
        cosines=torch.ones(1, 4),
        class_names=names,
    )
    titles = [axis.get_title() for axis in figures[0].axes]
    # A label beyond the names stays a number; a formula and a line end are shown as text.
    assert titles == [
        "query: cat",
        "\u2713 cat 1.00",
        "\u2717 a dog of a very\u2026 1.00",
        "\u2717 \\$x^2\\$ ? 1.00",
        "\u2717 4 1.00",
    ]


def test_a_picture_with_names_is_written(tmp_path):
    draw_neighbors(
        tmp_path / "names.png",
        crops(1, 8),
        crops(2, 8)[None],
        query_labels=torch.tensor([1]),
        neighbor_labels=torch.tensor([[1, 0]]),
        cosines=torch.ones(1, 2),
        class_names=["$broken{formula", "menorah"],
    )
    assert Image.open(tmp_path / "names.png").size[0] > 100


def test_neighbor_picture_is_written(tmp_path):
    path = tmp_path / "neighbors.png"
    labels = torch.zeros(2, dtype=torch.int64)
    draw_neighbors(
        path,
        crops(2, 8),
        crops(6, 8).unflatten(0, (2, 3)),
        query_labels=labels,
        neighbor_labels=labels[:, None].repeat(1, 3),
        cosines=torch.ones(2, 3),
    )
    with Image.open(path) as picture:
        assert picture.format == "PNG"
