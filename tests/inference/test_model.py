"""The face: what a trained network says of pictures is what evaluation says of the same pictures, whatever form they have."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import glsd
from glsd.data.decode import decode
from glsd.data.eval_loader import eval_loader
from glsd.errors import UserError
from glsd.geometry import patch_sides
from glsd.loading import Loaded
from glsd.models.backbone import build_backbone
from glsd.packing.folder import pack_folder
from glsd.shards.store import open_shards
from tests.helpers.small_shards import scene
from tests.helpers.trained import TINY, trained_networks


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs, and a folder of seven pictures of different sizes in two classes, packed too."""
    root = tmp_path_factory.mktemp("model")
    trained_networks(root)
    for number in range(7):
        path = root / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = scene(number, width=64 - 3 * number, height=40 + number)
        image.save(path)
    pack_folder(root / "photos", root / "shards", workers=0)
    return root


def by_hand(root, model, **sizes):
    """The vectors that evaluation would measure, by file name."""
    shards = open_shards(str(root / "shards" / "train-*.tar"))
    loader = eval_loader(shards, batch_size=3, rank=0, world_size=1, num_workers=0, **sizes)
    rows: dict[str, np.ndarray] = {}
    for batch in loader:
        features = model.features(batch.images)
        rows |= {
            shards.key(int(i)): f.numpy() for i, f in zip(batch.indices, features, strict=True) if i >= 0
        }
    return [rows[key] for key in sorted(rows)], shards


@pytest.mark.parametrize(("run", "sizes", "width"), [("pretrained", (37, 32), 32), ("tuned", (50, 40), 6)])
def test_vectors_are_those_of_evaluation(root, run, sizes, width):
    model = glsd.load(root / run)
    resize, crop = sizes
    assert (model.transform.resize, model.transform.crop, model.width) == (resize, crop, width)
    expected, shards = by_hand(root, model, resize=resize, crop=crop)
    names = glsd.list_images(root / "photos")
    vectors = model.embed(root / "photos", batch_size=3)
    assert vectors.shape == (7, width)
    assert vectors.dtype == np.float32
    assert names == sorted(names)
    packed = model.embed(str(root / "shards" / "train-*.tar"), batch_size=2)
    np.testing.assert_allclose(packed, np.stack([expected[i] for i in range(7)]), rtol=0, atol=1e-6)
    # The packed order is shuffled; a row of the folder is the row of the same bytes.
    for row, name in zip(vectors, names, strict=True):
        raw = (root / "photos" / name).read_bytes()
        (index,) = [i for i in range(7) if shards.read(i) == raw]
        np.testing.assert_allclose(row, packed[index], rtol=0, atol=1e-6)


def test_every_form_of_an_image_gives_the_same_vector(root):
    model = glsd.load(root / "pretrained")
    path = root / "photos" / glsd.list_images(root / "photos")[0]
    picture = Image.open(path)
    array = np.asarray(picture.convert("RGB"))
    forms = [path, str(path), picture, array, torch.from_numpy(array.copy()).permute(2, 0, 1)]
    (first,) = model.embed(path)
    rows = model.embed(forms)
    for row in rows:
        np.testing.assert_allclose(row, rows[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(model.embed(picture)[0], first, rtol=0, atol=1e-6)
    one = model.features(model.transform(picture)[None])[0].numpy()
    np.testing.assert_allclose(one, first, rtol=0, atol=1e-6)


def test_a_picture_is_turned_upright_and_left_as_it_was(root):
    model = glsd.load(root / "pretrained")
    stored = scene(3, width=60, height=40)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    stored.save(file, "png", exif=exif)
    picture = Image.open(io.BytesIO(file.getvalue()))
    assert torch.equal(model.transform.square(picture), model.transform.square(decode(file.getvalue())))
    assert picture.size == (60, 40)


def test_patches_stand_in_rows_and_columns(root):
    model = glsd.load(root / "pretrained")
    images = torch.randn(2, 3, 32, 48)
    patches = model.patches(images)
    assert patches.shape == (2, 4, 6, 32)
    flat = model.backbone(images)[1]
    assert torch.equal(patches[1, 2, 3], flat[1, 2 * 6 + 3])


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_attention_is_that_of_queries_and_keys(backbone, monkeypatch):
    """Against the softmax written out: of the whole row, including class token and registers, one."""
    args = TINY if "dinov3" not in backbone else {"depth": 2, "embed_dim": 48, "num_heads": 2}
    built = build_backbone(backbone, image_size=32, timm_args=args, seed=3).eval()
    model = glsd.Model(Loaded(network=built, name="x", crop=32))
    images = torch.randn(2, 3, 32, 32)
    queries = []

    def watched(q, k, v, **settings):
        queries.append((q, k, settings.get("scale")))
        return original(q, k, v, **settings)

    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model.features(images)
    (q, k, _), prefix = queries[-1], built.net.num_prefix_tokens
    shares = (q.double() @ k.double().mT / q.shape[-1] ** 0.5).softmax(-1)[:, :, 0, prefix:]
    side = 32 // patch_sides(built.stride)[0]
    attention = model.attention(images)
    assert attention.shape == (2, q.shape[1], side, side)
    torch.testing.assert_close(attention.double().flatten(2), shares, rtol=1e-4, atol=1e-6)
    assert built.net.blocks[-1].attn.fused_attn  # as it was


def test_attention_needs_a_class_token():
    built = build_backbone("resnet18", image_size=32, seed=3).eval()
    with pytest.raises(UserError, match="without class token"):
        glsd.Model(Loaded(network=built, name="x", crop=32)).attention(torch.randn(1, 3, 32, 32))


def test_what_is_no_image_is_named(root, tmp_path):
    model = glsd.load(root / "pretrained")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    for wrong, message in (
        ([str(broken)], r"broken\.png cannot be read: "),
        (["nowhere.jpg"], r"image nowhere\.jpg: no such file"),
        ([], "the list is empty"),
        (np.zeros((4, 4, 3), np.float32), r"float32 of shape \(4, 4, 3\): expected uint8 RGB"),
        (np.zeros((4, 4, 4), np.uint8), r"of shape \(4, 4, 4\)"),
        (3, "images are a int: expected a folder"),
        ([3], "an image is a int"),
        (tmp_path / "none", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            model.embed(wrong)


def test_the_face_is_fast_and_lazy():
    code = "import sys, glsd; assert 'torch' not in sys.modules; print(glsd.__version__, 'load' in dir(glsd))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [glsd.__version__, "True"]
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        glsd.lod  # noqa: B018
