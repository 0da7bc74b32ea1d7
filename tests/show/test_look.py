"""Attention, patch colors and maps: what is drawn is what the numbers say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread
from PIL import Image

import glsd
from glsd.cli.use import show
from glsd.data.photometric import normalize
from glsd.errors import UserError
from glsd.geometry import patch_centers
from glsd.inference import look
from glsd.inference.images import as_images
from glsd.inference.model import Model
from glsd.show.attention import draw_attention
from glsd.show.map import chosen, draw_map, places
from glsd.show.pca import draw_pca, patch_colors
from tests.helpers.small_shards import scene
from tests.helpers.trained import trained_networks


def test_colors_are_principal_components_of_all_patches_together():
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(3, 4, 5, 7, generator=generator) @ torch.diag(
        torch.tensor([9.0, 5.0, 3, 1, 1, 1, 1])
    )
    rows = patches.flatten(0, 2).numpy().astype(np.float64)
    centered = rows - rows.mean(0)
    _, _, directions = np.linalg.svd(centered, full_matrices=False)
    colors = patch_colors(patches)
    assert colors.shape == (3, 4, 5, 3)
    for channel in range(3):
        direction = directions[channel] * np.sign(directions[channel][np.abs(directions[channel]).argmax()])
        values = centered @ direction
        low, high = (np.sort(values)[round(share * (len(values) - 1))] for share in (0.02, 0.98))
        expected = np.clip((values - low) / (high - low), 0, 1)
        np.testing.assert_allclose(colors[..., channel].flatten().numpy(), expected, atol=1e-6)


def test_two_kinds_of_patches_get_two_colors():
    patches = torch.zeros(2, 2, 2, 4)
    patches[:, 0] = torch.tensor([1.0, 0, 0, 0])
    colors = patch_colors(
        patches + 0.001 * torch.randn(patches.shape, generator=torch.Generator().manual_seed(0))
    )
    red = colors[..., 0]
    assert (red[:, 0] - red[:, 1]).abs().min() > 0.9
    with pytest.raises(UserError, match="width 2"):
        patch_colors(torch.zeros(1, 2, 2, 2))


def test_places_keep_groups_apart():
    rng = np.random.default_rng(0)
    centers = np.eye(3, 8) * 10
    vectors = np.concatenate([center + rng.normal(size=(20, 8)) for center in centers]).astype(np.float32)
    at, method = places(vectors)
    again, _ = places(vectors)
    assert method in ("UMAP", "t-SNE")
    np.testing.assert_array_equal(at, again)
    distance = np.linalg.norm(at[:, None] - at[None], axis=2) + np.diag(np.full(60, np.inf))
    assert (distance.argmin(1) // 20 == np.arange(60) // 20).all()
    with pytest.raises(UserError, match="at least 5"):
        places(vectors[:4])


def test_thumbnails_leave_room():
    pixels = np.array([[0.0, 0], [3, 3], [30, 0], [31, 29], [0, 31]])
    assert chosen(pixels, 28) == [0, 2, 3, 4]


def test_pictures_show_the_images(tmp_path):
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[0, 0], images[1, 2] = 255, 255
    attention = torch.rand(2, 3, 4, 4)
    for name, draw in (
        ("a.png", lambda path: draw_attention(path, images, attention, ["one", "two"])),
        ("p.png", lambda path: draw_pca(path, images, torch.rand(2, 4, 4, 3), ["one", "two"])),
        ("m.png", lambda path: draw_map(path, np.array([[0.0, 0], [1, 1]]), images, title="x")),
    ):
        draw(tmp_path / name)
        pixels = imread(tmp_path / name)[..., :3]
        for color in ([1, 0, 0], [0, 0, 1]):
            assert (np.abs(pixels - color).max(2) < 0.02).sum() > 100, name
    with pytest.raises(UserError, match="does not divide"):
        draw_attention(tmp_path / "x.png", images, torch.rand(2, 3, 5, 5), ["one", "two"])
    with pytest.raises(UserError, match="cannot write the picture"):
        draw_attention(tmp_path / "a.png" / "x.png", images, attention, ["one", "two"])


@pytest.mark.parametrize("what", ["matches", "attention", "pca", "neighbors", "map"])
def test_the_command(what, tmp_path, capsys):
    trained_networks(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(7):
        scene(number).save(tmp_path / "photos" / f"{number}.png")
    out = tmp_path / "x.png"
    show.main(
        [what, str(tmp_path / "pretrained"), str(tmp_path / "photos"), "--out", str(out), "--count", "5"]
    )
    assert f"{what} of 5 of 7 images, by teacher of " in capsys.readouterr().out
    assert min(Image.open(out).size) > 100


def test_matches_join_the_same_place(tmp_path, monkeypatch):
    """Each line of the picture joins patches whose centers are near in the source; similar ones look alike to the model."""
    trained_networks(tmp_path)
    scene(1).save(tmp_path / "1.png")
    scene(2).save(tmp_path / "2.png")
    model = glsd.load(tmp_path / "pretrained")
    drawn = []
    monkeypatch.setattr(look, "draw_matches", lambda *args, **more: drawn.append((*args, more)))
    images = as_images([tmp_path / "1.png", tmp_path / "2.png"])
    for matching in (None, "similarity"):
        look.draw_matches_of(model, images, [0, 1], tmp_path / "x.png", matching=matching)
    (_, student, teacher, near), (_, *_, alike) = drawn
    size = student.shape[-1]
    here, there = (patch_centers(boxes, size, near["stride"]) for boxes in near["boxes"])
    distance = (here[:, :, None] - there[:, None]).square().sum(-1)
    assert torch.equal(distance.argmin(-1), near["index"])
    assert 0 < near["weight"].mean() < 1
    features = [model.patches(normalize(crops)).flatten(1, 2) for crops in (student, teacher)]
    cosines = torch.einsum("ind,imd->inm", *(F.normalize(part, dim=-1) for part in features))
    chosen = cosines.gather(2, alike["index"][:, :, None])[..., 0]
    assert (chosen >= cosines.amax(2) - 1e-5).all()
    assert (alike["weight"] == 1).all()


def test_neighbors_leave_the_query_out(tmp_path, monkeypatch):
    trained_networks(tmp_path)
    for number in range(6):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        scene(number % 4).save(path)  # a/4 equals a/0, b/5 equals b/1
    model, drawn = glsd.load(tmp_path / "pretrained"), {}
    monkeypatch.setattr(look, "draw_neighbors", lambda *args, **more: drawn.update(more))
    look.draw_neighbors_of(model, as_images(tmp_path / "photos"), [0, 3], tmp_path / "x.png")
    assert drawn["class_names"] == ["a", "b"]
    assert drawn["query_labels"].tolist() == [0, 1]
    assert drawn["cosines"].shape == (2, 5)
    assert drawn["cosines"][0, 0] == pytest.approx(1, abs=1e-6)
    assert drawn["neighbor_labels"][0, 0] == 0
    assert sorted(drawn["neighbor_labels"][0].tolist()) == [0, 0, 1, 1, 1]


def test_mistakes(tmp_path):
    trained_networks(tmp_path)
    scene(0).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    run = str(tmp_path / "pretrained")
    with pytest.raises(UserError, match="--matching is of matches, not of pca"):
        show.main(["pca", run, str(tmp_path), "--matching", "similarity"])
    with pytest.raises(UserError, match="matches need a run of pretraining"):
        show.main(["matches", str(tmp_path / "tuned"), str(tmp_path / "0.png")])
    with pytest.raises(UserError, match="is no run with training images"):
        look.training_images(Model(replace(glsd.load(run).loaded, config=None)))
    with pytest.raises(UserError, match="the run's training images: no shards given"):
        show.main(["pca", run])
    with pytest.raises(UserError, match="need two images or more"):
        show.main(["neighbors", run, str(tmp_path / "0.png")])
    with pytest.raises(UserError, match="--count is 0"):
        show.main(["pca", run, str(tmp_path), "--count", "0"])
    with pytest.raises(UserError, match=r"1\.png cannot be read"):
        show.main(["pca", run, str(tmp_path / "0.png"), str(tmp_path / "1.png")])
