"""glsd search: exact search is brute force, an index says what it misses, and the model is that of the vectors."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import glsd
from glsd.cli.use.search import to_json
from glsd.errors import UserError
from glsd.inference import index as indices
from glsd.inference.index import build_index, normalized, read_index, search_index
from glsd.inference.rerank import CANDIDATES, LINKS, POWER, WALK, diffusion
from glsd.inference.run import embed_files
from glsd.inference.search import search
from glsd.inference.vectors import Rows, read_vectors, write_vectors
from tests.helpers.hard_pictures import hard_pictures
from tests.helpers.trained import trained_networks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Runs, a folder of pictures, and its vectors in x.parquet."""
    root = tmp_path_factory.mktemp("search")
    trained_networks(root)
    hard_pictures(root / "photos")
    embed_files(str(root / "pretrained"), [str(root / "photos")], root / "x.parquet", num_workers=0)
    return root


def write(file: Path, vectors: np.ndarray) -> None:
    """Write vectors as glsd embed does, with made-up names."""
    names = [f"{number}.jpg" for number in range(len(vectors))]
    record = {
        "count": len(vectors),
        "width": vectors.shape[1],
        "crc32": zlib.crc32(vectors.data),
        "labeled": False,
    }
    rows = Rows(vectors, names, np.arange(len(vectors)), None)
    write_vectors(file, {**record, "model": "none"}, lambda: [rows])


def clustered(count: int, width: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centers = generator.normal(size=(count // 20, width))
    vectors = centers[generator.integers(0, len(centers), count)] + 0.7 * generator.normal(
        size=(count, width)
    )
    return vectors.astype(np.float32)


def test_an_image_finds_itself_first_and_all_others_as_brute_force_does(root):
    table = read_vectors(root / "x.parquet")
    queries = [root / "photos" / name for name in table.names]
    answer = search(root / "x.parquet", queries, k=79)
    assert (answer.how, answer.vectors) == ("exact", 79)
    unit = table.vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = unit @ unit.T
    for row, found in enumerate(answer.found):
        assert found.query == str(queries[row])
        first = found.neighbors[0]
        assert (first.rank, first.name, first.label, first.number) == (
            1,
            table.names[row],
            table.names[row][0],
            table.numbers[row],
        )
        assert first.cosine == pytest.approx(1, abs=1e-6)
        told = [entry.cosine for entry in found.neighbors]
        assert told == sorted(told, reverse=True)
        np.testing.assert_allclose(told, np.sort(cosines[row])[::-1], rtol=0, atol=2e-6)
        rows = [table.names.index(entry.name) for entry in found.neighbors]
        assert sorted(rows) == list(range(79))
        np.testing.assert_allclose(told, cosines[row][rows], rtol=0, atol=2e-6)


@pytest.mark.parametrize("form", [".npy", ".csv", ".safetensors"])
def test_every_form_of_file_can_be_searched(root, tmp_path, form):
    embed_files(str(root / "pretrained"), [str(root / "photos")], tmp_path / f"x{form}", num_workers=0)
    query = root / "photos" / "b" / "im 004.png"
    expected = search(root / "x.parquet", query, k=5).found
    assert search(tmp_path / f"x{form}", query, k=5).found == expected


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_an_index_finds_what_it_says_that_it_finds(tmp_path, kind):
    vectors = clustered(4000, 24)
    write(tmp_path / "x.npy", vectors)
    built, why = build_index(tmp_path / "x.npy", kind, CPU)
    assert built is not None
    assert (built.kind, why) == (kind, "")
    table = read_vectors(tmp_path / "x.npy")
    index = read_index(tmp_path / "x.npy", table)
    unit = normalized(vectors)
    assert index is not None
    queries = np.arange(7, 4000, 40)
    cosines = unit[queries].astype(np.float64) @ unit.T.astype(np.float64)
    exact = np.argsort(-cosines, axis=1)[:, :10]
    found = search_index(index.index, unit[queries], unit, 10)
    assert found is not None
    told, rows = found
    np.testing.assert_allclose(told, np.take_along_axis(cosines, rows, 1), rtol=0, atol=1e-12)
    assert (np.diff(told, axis=1) <= 1e-9).all()
    recall = np.mean([len({*a} & {*b}) / 10 for a, b in zip(exact, rows, strict=True)])
    assert built.recall >= indices.WANTED
    assert abs(recall - built.recall) < 0.05
    if kind == "flat":
        assert built.recall == recall == 1
    again, _ = build_index(tmp_path / "x.npy", kind, CPU)
    assert again == built  # it was not built anew


def test_recall_is_the_share_of_the_neighbors_that_were_found():
    import faiss

    unit = normalized(clustered(300, 8))
    rows = np.arange(0, 300, 3)
    cosines = np.sort(unit[rows].astype(np.float64) @ unit.T.astype(np.float64), axis=1)[:, ::-1][:, :11]
    half = faiss.IndexIDMap(faiss.IndexFlatIP(8))
    kept = np.sort(np.random.default_rng(1).choice(300, 150, replace=False))
    half.add_with_ids(unit[kept], kept)
    exact = np.argsort(-(unit[rows] @ unit.T), axis=1)[:, 1:11]
    expected = np.isin(exact, kept).mean()
    # The vector itself is not in the index for about half of the rows: then it counts as one neighbor less.
    missing = ~np.isin(rows, kept)
    found = indices.recall_of(half, unit, rows, cosines)
    assert found == pytest.approx(expected - missing.mean() / 10, abs=0.01)


def test_an_index_of_other_vectors_is_refused(tmp_path):
    write(tmp_path / "x.npy", clustered(200, 8))
    build_index(tmp_path / "x.npy", "flat", CPU)
    write(tmp_path / "x.npy", clustered(200, 8, seed=1))
    with pytest.raises(UserError, match=r"x\.npy\.faiss is not of the vectors in .*x\.npy"):
        read_index(tmp_path / "x.npy", read_vectors(tmp_path / "x.npy"))
    file = tmp_path / "x.npy.faiss"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot read the index .*build it again"):
        read_index(tmp_path / "x.npy", read_vectors(tmp_path / "x.npy"))
    file.with_name("x.npy.faiss.json").unlink()
    with pytest.raises(UserError, match=r"cannot read the index"):
        read_index(tmp_path / "x.npy", read_vectors(tmp_path / "x.npy"))


def test_the_kind_is_chosen_by_the_number_of_vectors(tmp_path, monkeypatch):
    monkeypatch.setattr(indices, "EXACT_UNTIL", 100)
    kinds = {}
    for count in (100, 101):
        write(tmp_path / f"{count}.npy", clustered(count, 8))
        built, why = build_index(tmp_path / f"{count}.npy", "auto", CPU)
        kinds[count] = built.kind if built else why
    assert kinds == {100: "100 vectors are searched exactly", 101: "ivf"}


def test_without_faiss_a_search_is_exact_and_an_index_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "x.npy", clustered(120, 8))
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    monkeypatch.setattr(indices, "EXACT_UNTIL", 100)
    built, why = build_index(tmp_path / "x.npy", "auto", CPU)
    assert built is None
    assert "pip install 'glsd[cpu]'" in why
    with pytest.raises(UserError, match=r"an index needs faiss: pip install 'glsd\[cpu\]', or --index none"):
        indices.check_kind("ivf")


def test_the_model_must_be_the_one_of_the_vectors(root, tmp_path):
    query = root / "photos" / "b" / "im 004.png"
    with pytest.raises(UserError, match=r"tuned is not the model of the vectors \(teacher of .*pretrained\)"):
        search(root / "x.parquet", query, model=str(root / "tuned"))
    moved = tmp_path / "moved"
    shutil.copytree(root / "pretrained", moved)
    embed_files(str(moved), [str(root / "photos" / "b")], tmp_path / "x.npy", num_workers=0)
    here = search(tmp_path / "x.npy", query, k=3).found
    shutil.move(moved, tmp_path / "new place")
    with pytest.raises(UserError, match=r"cannot be loaded: .*; if it has moved, name it with --model"):
        search(tmp_path / "x.npy", query, k=3)
    assert search(tmp_path / "x.npy", query, k=3, model=str(tmp_path / "new place")).found == here


def test_what_cannot_be_searched_is_said(root, tmp_path):
    query = root / "photos" / "b" / "im 004.png"
    (tmp_path / "x.npy").write_bytes(b"x")
    for file, queries, settings, message in (
        (root / "x.parquet", query, {"k": 80}, "k is 80: expected 1 to 79"),
        (root / "x.parquet", query, {"k": 0}, "k is 0"),
        (root / "x.parquet", query, {"rerank": "walk"}, "unknown rerank 'walk'"),
        (root / "x.parquet", root / "photos" / "b" / "broken.png", {}, "broken.png cannot be read"),
        (root / "x.parquet", "none.png", {}, "image none.png: no such file"),
        (tmp_path / "none.parquet", query, {}, "cannot read .*none.parquet"),
        (tmp_path / "x.npy", query, {}, "was not written by glsd embed"),
        (tmp_path / "x.txt", query, {}, "ends in .parquet"),
    ):
        with pytest.raises(UserError, match=message):
            search(file, queries, **settings)


def test_the_picture_shows_what_was_found_where_it_was(root, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(root / "photos", photos)
    embed_files(str(root / "pretrained"), [str(photos)], tmp_path / "x.npy", num_workers=0)
    queries = [photos / "b" / "im 004.png", photos / "c" / "im 005.png"]
    answer = search(tmp_path / "x.npy", queries, k=3, picture=tmp_path / "found.png")
    assert answer.lost == 0
    assert Image.open(tmp_path / "found.png").size == (660, 440)
    first = answer.found[0].neighbors
    (photos / first[1].name).unlink()
    assert search(tmp_path / "x.npy", queries[0], k=3, picture=tmp_path / "again.png").lost == 1
    shutil.move(photos, tmp_path / "moved")
    query = tmp_path / "moved" / "b" / "im 004.png"
    with pytest.raises(UserError, match=rf"none of the images that were found is still in {photos}"):
        search(tmp_path / "x.npy", query, k=3, picture=tmp_path / "no.png")
    assert search(tmp_path / "x.npy", query, k=3).found[0].neighbors == first[:3]
    assert not (tmp_path / "no.png").exists()


def test_the_json_holds_all_of_it(root):
    answer = search(root / "x.parquet", root / "photos" / "a", k=2)
    told = json.loads(to_json(answer))
    assert (told["vectors"], told["how"]) == (79, "exact")
    assert [each["query"] for each in told["found"]] == glsd.list_images(root / "photos" / "a")
    for each, found in zip(told["found"], answer.found, strict=True):
        assert each["neighbors"] == [entry._asdict() for entry in found.neighbors]


def walk_by_steps(query: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The walk written out: affinities pair by pair, then step after step."""
    everything = np.concatenate([query[None], candidates]).astype(np.float64)
    n = len(everything)
    cosines = [
        [max(float(everything[i] @ everything[j]), 0) if i != j else 0 for j in range(n)] for i in range(n)
    ]
    near = [set(np.argsort([-c for c in cosines[i]], kind="stable")[: min(LINKS, n - 1)]) for i in range(n)]
    matrix = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if i == 0 or j == 0:
                linked = max(i, j) in near[0]
            else:
                linked = j in near[i] and i in near[j]
            matrix[i, j] = cosines[i][j] ** POWER if linked else 0
    degree = matrix.sum(axis=1)
    scale = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1)), 0)
    matrix = scale[:, None] * matrix * scale
    start = np.zeros(n)
    start[0] = 1
    spent = start.copy()
    for _ in range(5000):
        spent = WALK * matrix @ spent + (1 - WALK) * start
    return spent[1:]


def test_the_diffusion_is_a_walk_from_the_query():
    unit = normalized(clustered(61, 6, seed=4))
    np.testing.assert_allclose(
        diffusion(unit[0], unit[1:]), walk_by_steps(unit[0], unit[1:]), rtol=1e-6, atol=1e-9
    )


def test_re_ranking_prefers_what_is_linked_with_the_query(tmp_path):
    """Along an arc of a circle a far point of the arc is found before a nearer one that stands alone."""
    angles = np.linspace(0, 1.2, 40)
    arc = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    alone = np.array([[np.cos(1.1), 0, np.sin(1.1)]])
    vectors = np.concatenate([arc[1:], alone]).astype(np.float32)
    score = diffusion(arc[0].astype(np.float32), vectors)
    assert score[38] > score[39]
    assert arc[39] @ arc[0] < alone[0] @ arc[0]


def test_re_ranked_search_keeps_the_cosines(root):
    query = root / "photos" / "b" / "im 004.png"
    plain = search(root / "x.parquet", query, k=79).found[0].neighbors
    again = search(root / "x.parquet", query, k=79, rerank="diffusion")
    cosine_of = {entry.name: entry.cosine for entry in plain}
    found = again.found[0].neighbors
    assert again.how == "exact, re-ranked by diffusion"
    assert {entry.name: entry.cosine for entry in found} == cosine_of
    assert [entry.name for entry in found] != [entry.name for entry in plain]
    assert CANDIDATES > 79


def test_a_run_that_went_on_is_searched_with_the_checkpoint_of_the_vectors(tmp_path):
    from glsd.runtime import checkpoint

    trained_networks(tmp_path)
    hard_pictures(tmp_path / "photos")
    embed_files(str(tmp_path / "pretrained"), [str(tmp_path / "photos")], tmp_path / "x.npy", num_workers=0)
    query = tmp_path / "photos" / "b" / "im 004.png"
    before = search(tmp_path / "x.npy", query, k=3).found
    saved = checkpoint.load_latest(tmp_path / "pretrained" / "checkpoints")
    assert saved is not None
    tensors = {
        role: {name: x + 0.1 for name, x in of_role.items()} for role, of_role in saved.tensors.items()
    }
    checkpoint.save(
        tmp_path / "pretrained" / "checkpoints", step=9, tensors=tensors, state={}, optimizer={}, keep=5
    )
    assert glsd.load(tmp_path / "pretrained").loaded.step == 9
    assert search(tmp_path / "x.npy", query, k=3).found == before
    with pytest.raises(UserError, match=r"the model was .*7', now .*9'"):
        embed_files(
            str(tmp_path / "pretrained"), [str(tmp_path / "photos")], tmp_path / "x.npy", num_workers=0
        )
