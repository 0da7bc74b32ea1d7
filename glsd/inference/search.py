"""The story of ``glsd search``: the most similar images of a file of vectors, for images of any kind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from glsd.errors import BrokenImage, UserError, pick
from glsd.inference.images import Images, as_images, open_again
from glsd.inference.index import Index, cosines_of, normalized, read_index, search_index
from glsd.inference.model import Model, load
from glsd.inference.rerank import CANDIDATES, RERANKERS, reranked
from glsd.inference.run import network_digest
from glsd.inference.vectors import VectorTable, read_vectors
from glsd.metrics.knn import nearest_neighbors
from glsd.show.neighbors import draw_found

MOST_DRAWN = 20  # queries in a picture


class Neighbor(NamedTuple):
    """One image that was found."""

    rank: int  # from 1
    cosine: float
    name: str
    label: str | None
    number: int  # place among the images that were embedded


class Found(NamedTuple):
    """The neighbors of one query, and how they were found."""

    query: str
    neighbors: list[Neighbor]


class Answer(NamedTuple):
    """What a search came to."""

    found: list[Found]
    model: str
    how: str  # "exact", or the kind of the index and how it is searched
    vectors: int  # how many were searched
    lost: int  # images that the picture lacks, because they are not there any more


def search(
    file: str | Path,
    images: Any,
    *,
    k: int = 10,
    exact: bool = False,
    rerank: str | None = None,
    model: str | None = None,
    device: str | torch.device = "cpu",
    picture: str | Path | None = None,
) -> Answer:
    """Return the k nearest images of each query in a file that ``glsd embed`` wrote.

    images: the queries, in any form that ``model.embed`` takes. They are embedded with the model of the file. exact: leave out
    the index beside the file. Exact search compares every vector; cosines are computed in float64. rerank: "diffusion" orders
    the 200 nearest anew. model: where the model is now, if it has moved. picture: a file for a picture of queries and neighbors.
    Raises UserError for a k outside 1..n, a query that cannot be read, a model that is not the one of the file, and what
    cannot be read or written.
    """
    table = read_vectors(file)
    if not 1 <= k <= len(table.names):
        raise UserError(f"k is {k}: expected 1 to {len(table.names)}, the number of vectors in {file}")
    if rerank is not None:
        pick(RERANKERS, rerank, "rerank")
    queries = as_images(images)
    index = None if exact else read_index(Path(file), table)
    network = load_model_of(table.record, model).to(device)
    query = normalized(network.embed(images, precision=table.record["precision"]))
    vectors = normalized(table.vectors)
    wanted = k if rerank is None else max(k, min(CANDIDATES, len(vectors)))
    rows, how = _find(query, vectors, wanted, index)
    if rerank is not None:
        rows = reranked(rerank, query, vectors, rows, k)
        how += f", re-ranked by {rerank}"
    found = _described(table, queries, query, vectors, rows)
    lost = 0 if picture is None else _draw(Path(picture), found, table, queries, network)
    return Answer(found, network.name, how, len(vectors), lost)


def load_model_of(record: Mapping[str, Any], path: str | None = None) -> Model:
    """Load the model that made a file of vectors. path: where it is now; None = where it was.

    Raises UserError if it is gone, or is another one.
    """
    try:
        model = load(path or record["model"], **record["loading"])
    except UserError as error:
        if path is not None:
            raise
        raise UserError(
            f"the model of the vectors ({record['model_name']}) cannot be loaded: {error}; "
            "if it has moved, name it with --model"
        ) from error
    for what, then, now in (
        ("network", record["network"], network_digest(model)),
        ("transform", record["transform"], repr(model.transform)),
    ):
        if then != now:
            raise UserError(
                f"{path or record['model']} is not the model of the vectors ({record['model_name']}): its {what} differ; "
                "name the right one with --model, or embed the images again"
            )
    return model


def _find(
    query: Float32[np.ndarray, "q d"], vectors: Float32[np.ndarray, "n d"], k: int, index: Index | None
) -> tuple[Int64[np.ndarray, "q k"], str]:
    """Return the rows of the k nearest vectors, and how they were found."""
    few = ""
    if index is not None:
        nearest = search_index(index.index, query, vectors, k)
        if nearest is not None:
            return nearest[1], f"index {index.told['kind']}, {index.told['effort']}"
        few = f", because the index finds fewer than {k}"
    found = nearest_neighbors(torch.from_numpy(query), torch.from_numpy(vectors), k=k)[1]
    return found.numpy(), f"exact{few}"


def _described(
    table: VectorTable,
    queries: Images,
    query: Float32[np.ndarray, "q d"],
    vectors: Float32[np.ndarray, "n d"],
    rows: np.ndarray,
) -> list[Found]:
    cosines = cosines_of(query, vectors, rows).round(9)
    return [
        Found(
            name,
            [
                Neighbor(
                    rank,
                    float(cosine),
                    table.names[row],
                    table.labels[row] if table.labels else None,
                    int(table.numbers[row]),
                )
                for rank, (row, cosine) in enumerate(zip(of_query.tolist(), of_cosines, strict=True), 1)
            ],
        )
        for name, of_query, of_cosines in zip(queries.names, rows, cosines, strict=True)
    ]


def _draw(file: Path, found: list[Found], table: VectorTable, queries: Images, model: Model) -> int:
    """Draw the first queries and their neighbors, read from where ``glsd embed`` read them; return how many are gone."""
    shown = found[:MOST_DRAWN]
    square = model.transform.square
    pixels = open_again(table.record["place"])
    lost = []

    def neighbor(entry: Neighbor) -> UInt8[Tensor, "3 s s"] | None:
        try:
            return square(pixels(entry.number, entry.name))
        except BrokenImage:
            lost.append(entry)
            return None

    images = [[neighbor(entry) for entry in each.neighbors] for each in shown]
    if len(lost) == sum(map(len, images)):
        raise UserError(
            f"cannot draw {file}: none of the images that were found is still in {table.record['images_title']}"
        )
    draw_found(
        file,
        [square(queries.pixels(number)) for number in range(len(shown))],
        images,
        query_titles=[each.query for each in shown],
        titles=[[_title(entry) for entry in each.neighbors] for each in shown],
    )
    return len(lost)


def _title(found: Neighbor) -> str:
    return f"{found.cosine:.3f}\n{found.name if found.label is None else found.label}"
