"""What people import: the rooms' public functions, with tensors and with arrays, equal to formulas written out."""

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import glsd
from glsd.errors import UserError
from glsd.losses import patch_loss


@pytest.mark.parametrize("room", ["losses", "metrics"])
def test_every_public_name_is_there_and_explained(room):
    module = getattr(glsd, room)
    for name in module.__all__:
        found = getattr(module, name)
        assert callable(found)
        assert len(found.__doc__.splitlines()[0]) > 20, name
        # A file of the same name would take its place as soon as it is imported.
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"glsd.{room}.{name}")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def written_out(student, teacher, prototypes, centers, radius, center, *, hinge):
    """The local loss, patch by patch, in float64: nearest teacher patch of each other view, rejected beyond the radius."""
    views, teachers = len(student), len(teacher)
    losses = []
    for v in range(views):
        for q in range(teachers):
            if v == q:
                continue
            for image in range(student[v].shape[0]):
                total = 0.0
                for n, vector in enumerate(student[v][image]):
                    distance = np.linalg.norm(centers[q][image] - centers[v][image][n], axis=1)
                    near = int(distance.argmin())
                    if hinge and distance[near] >= max(radius[v], radius[q]):
                        continue
                    logits = prototypes @ teacher[q][image][near]
                    target = np.exp((logits - center) / 0.04 - ((logits - center) / 0.04).max())
                    logs = prototypes @ vector / 0.1
                    logs = logs - logs.max() - np.log(np.exp(logs - logs.max()).sum())
                    total -= (target / target.sum()) @ logs
                losses.append(total / len(student[v][image]))
    return np.mean(losses)


@pytest.mark.parametrize("hinge", [True, False])
def test_patch_loss_is_the_formula(hinge):
    generator = torch.Generator().manual_seed(0)

    def unit(*shape):
        return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)

    b, e, k = 2, 5, 7
    globals_, locals_ = unit(2, b, 9, e), unit(3, b, 4, e)
    teacher, prototypes, center = unit(2, b, 9, e), unit(k, e), unit(k)
    boxes = [
        torch.rand(2, b, 4, generator=generator, dtype=torch.float64) * 20
        + torch.tensor([0.0, 0.0, 40.0, 50.0]),
        torch.rand(3, b, 4, generator=generator, dtype=torch.float64) * 20
        + torch.tensor([30.0, 0.0, 0.0, 30.0]),
    ]
    centers, radius = [], []
    for part, grid in zip(boxes, (3, 2), strict=True):
        for view in part.numpy():
            steps = (np.arange(grid) + 0.5) / grid
            points = []
            for x0, y0, x1, y1 in view:
                y, x = np.meshgrid(y0 + steps * (y1 - y0), x0 + steps * (x1 - x0), indexing="ij")
                points.append(np.stack([x.ravel(), y.ravel()], 1) - 0.5)
            centers.append(points)
            radius.append(
                np.array([np.hypot((x1 - x0) / grid, (y1 - y0) / grid) / 2 for x0, y0, x1, y1 in view])
            )
    student = [view.numpy() for part in (globals_, locals_) for view in part]
    settings = {"crop_sizes": [24, 16], "stride": 8, "hinge": hinge, "center": center}
    # One image at a time: a radius belongs to a box.
    expected = np.mean(
        [
            written_out(
                [view[i : i + 1] for view in student],
                [view[i : i + 1] for view in teacher.numpy()],
                prototypes.numpy(),
                [view[i : i + 1] for view in centers],
                [r[i] for r in radius],
                center.numpy(),
                hinge=hinge,
            )
            for i in range(b)
        ]
    )
    globals_.requires_grad_()
    result = patch_loss([globals_, locals_], teacher, prototypes, prototypes, boxes=boxes, **settings)
    assert float(result.loss.detach()) == pytest.approx(expected, rel=1e-9)
    result.loss.backward()
    assert globals_.grad is not None
    assert float(globals_.grad.abs().sum()) > 0
    arrays = patch_loss(
        [globals_.detach().numpy(), locals_.numpy()],
        teacher.numpy(),
        prototypes.numpy(),
        prototypes.numpy(),
        boxes=[part.numpy() for part in boxes],
        **settings | {"center": center.numpy()},
    )
    assert float(arrays.loss) == pytest.approx(expected, rel=1e-9)


def test_patch_loss_by_both_matches_is_the_mean_of_both():
    torch.manual_seed(0)
    student, teacher = (
        F.normalize(torch.randn(2, 2, 4, 6), dim=-1),
        F.normalize(torch.randn(2, 2, 4, 6), dim=-1),
    )
    prototypes = F.normalize(torch.randn(8, 6), dim=-1)
    boxes = [torch.tensor([0.0, 0.0, 30.0, 30.0]).expand(2, 2, 4)]
    common = {"center": torch.zeros(8), "crop_sizes": [16], "stride": 8}
    pairs = [student], teacher, prototypes, prototypes
    place = patch_loss(*pairs, boxes=boxes, **common).loss
    likeness = patch_loss(*pairs, features=([student], teacher), **common).loss
    both = patch_loss(*pairs, boxes=boxes, features=([student], teacher), **common).loss
    assert float(both) == pytest.approx(float(place + likeness) / 2, rel=1e-6)
    assert float(place) != pytest.approx(float(likeness), rel=1e-3)
    with pytest.raises(UserError, match="give boxes"):
        patch_loss(*pairs, **common)


def test_measures_take_arrays():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(40, 6)).astype(np.float32), np.arange(40) % 4
    tensors = torch.from_numpy(features), torch.from_numpy(labels)
    from glsd.metrics import knn_accuracy, rankme, retrieval_scores

    assert rankme(features) == rankme(tensors[0])
    arrays = knn_accuracy(features[:30], labels[:30], features[30:], labels[30:], k_list=[3])
    assert arrays == knn_accuracy(
        tensors[0][:30], tensors[1][:30], tensors[0][30:], tensors[1][30:], k_list=[3]
    )
    cosine = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosine = cosine @ cosine.T - 2 * np.eye(40)
    hit = np.mean(labels[cosine.argmax(1)] == labels)
    assert retrieval_scores(features, labels, recall_at=[1]).recall[1] == pytest.approx(hit)
