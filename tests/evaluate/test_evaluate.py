"""The evaluation story: runs, checkpoints and weights files, both protocols, one and two ranks, clear mistakes."""

import io
import json
import os
import socket
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from glsd.config.evaluate import EvalConfig, EvalDataConfig
from glsd.config.parse import dump
from glsd.config.pretrain import (
    DataConfig,
    HeadConfig,
    ModelConfig,
    PretrainConfig,
    TimmArg,
)
from glsd.data.transform import choose_sizes
from glsd.errors import UserError
from glsd.evaluate.run import evaluate
from glsd.models.backbone import build_backbone
from glsd.packing.write import pack_samples
from glsd.runtime import checkpoint
from tests.helpers.warm_python import warm_python

SCRIPT = Path(__file__).parents[2] / "launch" / "evaluate.py"
TINY: dict[str, TimmArg] = {"patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
TRAINED = PretrainConfig(
    seed=5,
    data=DataConfig(global_size=32, local_size=16),
    model=ModelConfig(backbone="vit_tiny_patch16_224", timm_args=TINY),
    head=HeadConfig(num_prototypes=16),
)


def samples(n, *, seed, broken=()):
    """Images of three classes: a bright disc, square or stripe in noise. Even an untrained network sees some of it."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(n):
        label = i % 3
        image = torch.randint(0, 120, (36, 40, 3), dtype=torch.uint8, generator=generator)
        x, y = (torch.randint(4, 20, (2,), generator=generator)).tolist()
        image[y : y + 14, x : x + (14 if label == 0 else 6)] += 60 if label < 2 else 130
        file = io.BytesIO()
        Image.fromarray(image.numpy()).save(file, "png")
        yield (b"no image" if i in broken else file.getvalue()), "png", label


def pixels_of(raw):
    """The means of the 4 x 4 squares of the center crop of 32 x 32 pixels, by hand."""
    image = torch.from_numpy(np.array(Image.open(io.BytesIO(raw)).convert("RGB"))).permute(2, 0, 1)
    crop = image[:, 2:34, 4:36].float() / 255  # of 36 x 40
    return torch.stack(
        [crop[:, y : y + 4, x : x + 4].mean((1, 2)) for y in range(0, 32, 4) for x in range(0, 32, 4)]
    )


def network(seed):
    return build_backbone("vit_tiny_patch16_224", image_size=32, timm_args=TINY, seed=seed)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards of both sets, one run with a checkpoint of two known networks, and a weights file of one of them."""
    root = tmp_path_factory.mktemp("evaluate")
    pack_samples(samples(90, seed=1), root, prefix="train", classes=["a", "b", "c"])
    pack_samples(samples(31, seed=2, broken=(4,)), root, prefix="val", classes=["a", "b", "c"])
    run = root / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump(TRAINED))
    tensors = {
        name: {
            "global_head.unused": torch.zeros(1),
            **{f"backbone.{key}": value for key, value in network(seed).state_dict().items()},
        }
        for name, seed in (("teacher", 1), ("student", 2))
    }
    for step in (3, 7):
        checkpoint.save(
            run / "checkpoints", step=step, tensors=tensors, state={"step": step}, optimizer={}, keep=2
        )
    save_file(
        {key.removeprefix("net."): v for key, v in network(1).state_dict().items()}, root / "w.safetensors"
    )
    return root


@pytest.fixture
def cfg(world, tmp_path):
    data = EvalDataConfig(
        train_shards=str(world / "train-*.tar"),
        val_shards=str(world / "val-*.tar"),
        resize=36,
        crop=32,
        batch_size=16,
        num_workers=0,
    )
    return EvalConfig(
        model=str(world / "run"), k=[1, 5], linear_epochs=5, data=data, out=str(tmp_path / "out")
    )


def test_knn_of_a_run(cfg, capsys):
    record = evaluate(cfg)
    printed = capsys.readouterr().out
    assert record["model"] == f"teacher of {cfg.model}"
    assert record["step"] == 7
    assert (record["train"]["images"], record["val"]["images"], record["val"]["unreadable"]) == (90, 30, 1)
    assert list(record["result"]) == ["k=1", "k=5"]
    assert 0.4 < record["result"]["k=5"]["top1"] <= record["result"]["k=5"]["top5"] <= 1.0
    for words in (
        "resize 36 bicubic, center crop 32, class token of the last layer, width 48, float32",
        "votes weighted exp(cos / 0.07)",
        "1 val images cannot be read",
        f"k=5       top-1 {100 * record['result']['k=5']['top1']:.2f} %",
        "step 7",
    ):
        assert words in printed
    assert json.loads((Path(cfg.out) / "evals.json").read_text()) == [record]


def test_pixels_are_measured_plain_and_centered(cfg, capsys):
    record = evaluate(replace(cfg, model="pixels:8"))
    assert list(record["result"]) == ["k=1", "k=5", "k=1, mean-centered", "k=5, mean-centered"]
    assert "pixels of the image at 8 x 8, width 192" in capsys.readouterr().out
    sets = {
        name: torch.stack(
            [pixels_of(raw) for raw, *_ in samples(count, seed=seed, broken=broken) if raw != b"no image"]
        )
        for name, count, seed, broken in (("train", 90, 1, ()), ("val", 31, 2, (4,)))
    }
    labels = {"train": [n % 3 for n in range(90)], "val": [n % 3 for n in range(31) if n != 4]}
    for what, mean in (("", 0), (", mean-centered", sets["train"].mean(0))):
        train, val = (F.normalize((sets[name] - mean).flatten(1), dim=1) for name in ("train", "val"))
        nearest = (val @ train.T).argmax(1)
        hits = sum(labels["train"][n] == labels["val"][i] for i, n in enumerate(nearest.tolist()))
        assert record["result"][f"k=1{what}"]["top1"] == pytest.approx(hits / 30), what
    for key, value in (("which", "best"), ("features", "student"), ("pool", "mean")):
        with pytest.raises(UserError, match=f"^{key} chooses a network"):
            evaluate(replace(cfg, model="pixels", **{key: value}))
    for wrong in ("pixels:0", "pixels:x", "pixels:225"):
        with pytest.raises(UserError, match="pixels:SIDE"):
            evaluate(replace(cfg, model=wrong))


def test_records_are_appended_and_repeatable(cfg):
    first = evaluate(cfg)
    second = evaluate(
        replace(
            cfg, protocol="linear", linear_lr=[0.1, 1.0], data=replace(cfg.data, num_workers=2, batch_size=7)
        )
    )
    third = evaluate(replace(cfg, data=replace(cfg.data, num_workers=1)))
    assert json.loads((Path(cfg.out) / "evals.json").read_text()) == [first, second, third]
    assert third["result"] == first["result"]
    assert second["result"]["linear"]["top1"] > 0.4
    assert "SGD momentum 0.9" in second["protocol"]
    assert sorted(path.name for path in Path(cfg.out).iterdir()) == [".evals.json.lock", "evals.json"]


def test_each_way_to_name_a_network(cfg, world):
    teacher = evaluate(cfg)
    student = evaluate(replace(cfg, features="student"))
    by_folder = evaluate(replace(cfg, model=str(world / "run" / "checkpoints" / "step_00000003")))
    latest = evaluate(replace(cfg, model=str(world / "run" / "checkpoints" / "latest")))
    initial = evaluate(replace(cfg, features="initial"))
    assert (by_folder["step"], latest["step"], initial["step"]) == (3, 7, 0)
    assert by_folder["result"] == latest["result"] == teacher["result"]
    assert student["model"] == f"student of {cfg.model}"
    seeds = {"teacher": 1, "student": 2, "initial": TRAINED.seed}
    for name, record in (("teacher", teacher), ("student", student), ("initial", initial)):
        assert record["result"] == measure(cfg, network(seeds[name]))


def measure(cfg, backbone):
    """The parts put together by hand."""
    from glsd.data.eval_loader import eval_loader
    from glsd.evaluate.sets import embed
    from glsd.metrics.knn import knn_accuracy
    from glsd.shards.store import open_shards

    sets: list[torch.Tensor] = []
    for patterns in (cfg.data.train_shards, cfg.data.val_shards):
        loader = eval_loader(
            open_shards(patterns), resize=36, crop=32, batch_size=90, rank=0, world_size=1, num_workers=0
        )
        sets += embed(lambda images: backbone.eval()(images)[0], loader, device=torch.device("cpu"))[:2]
    return {f"k={k}": shares for k, shares in knn_accuracy(*sets, k_list=cfg.k).items()}


def test_run_folder_gets_the_file_when_out_is_unset(cfg, world):
    evaluate(replace(cfg, out="", data=replace(cfg.data, limit=40)))
    (record,) = json.loads((world / "run" / "evals.json").read_text())
    assert record["train"]["images"] == 40


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": ""}, "model is not set"),
        ({"model": "no/such"}, "'no/such': no such run"),
        ({"model": "timm:vit_tinny_patch16_224"}, "vit_tinny_patch16_224"),
        ({"k": [91]}, "--k holds 91: expected 1 to 90, the number of train images"),
        ({"out": "/proc/nowhere"}, "cannot write evals.json to /proc/nowhere"),
        (
            {"data.train_shards": ""},
            "data.train_shards is not set: give labeled shards, e.g. --data.train_shards 'shards/train-*",
        ),
        ({"data.val_shards": ""}, "e.g. --data.val_shards 'shards/val-*.tar'"),
        ({"protocol": "linear", "seed": -1}, "seed is -1: expected 0 to"),
        ({"data.val_shards": "no-such-*.tar"}, "no-such-*.tar"),
        ({"data.crop": 30}, "data.crop 30 is not a multiple of the patch size 8"),
        ({"data.resize": 16}, "crop 32"),
        (
            {"protocol": "linear", "linear_lr": [-1.0]},
            "linear_lr is [-1.0]: expected one or more numbers above 0",
        ),
    ],
)
def test_mistakes_are_one_clear_line(cfg, changes, words):
    data = {key.removeprefix("data."): value for key, value in changes.items() if key.startswith("data.")}
    plain = {key: value for key, value in changes.items() if not key.startswith("data.")}
    with pytest.raises(UserError) as caught:
        evaluate(replace(cfg, **plain, data=replace(cfg.data, **data)))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overlapping_sets_and_classes_of_other_numbers(cfg, tmp_path):
    with pytest.raises(UserError, match=r"data\.train_shards and data\.val_shards have 1 shards in common"):
        evaluate(replace(cfg, data=replace(cfg.data, val_shards=cfg.data.train_shards)))
    names = ["zebra", "c", "a", "b"]
    turned = ((raw, kind, names.index("abc"[label])) for raw, kind, label in samples(31, seed=2, broken=(4,)))
    pack_samples(turned, tmp_path / "other", prefix="val", classes=names)
    other = replace(cfg.data, val_shards=str(tmp_path / "other" / "*.tar"))
    for protocol in ("knn", "linear"):
        expected = evaluate(replace(cfg, protocol=protocol))["result"]
        assert evaluate(replace(cfg, protocol=protocol, data=other))["result"] == expected
    pack_samples(samples(31, seed=2), tmp_path / "plain", prefix="val")
    plain = replace(cfg.data, val_shards=str(tmp_path / "plain" / "*.tar"))
    with pytest.raises(
        UserError, match=r"^data\.train_shards has class names .* but data\.val_shards in .* only numbers"
    ):
        evaluate(replace(cfg, data=plain))


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_classes_that_training_never_saw(cfg, tmp_path, capsys, protocol):
    """Half of the images are of a class without a name in train: they count as wrong, and are told."""
    half = [*samples(30, seed=2), *((raw, kind, label + 3) for raw, kind, label in samples(30, seed=2))]
    names = ["a", "b", "c", "aa", "bb", "cc"]
    for name, rows in (("known", half[:30]), ("half", half), ("none", half[30:])):
        pack_samples(rows, tmp_path / name, prefix="val", classes=names)
    known, both, none = (
        replace(cfg, protocol=protocol, data=replace(cfg.data, val_shards=str(tmp_path / name / "*.tar")))
        for name in ("known", "half", "none")
    )
    full = evaluate(known)["result"]
    assert "warning" not in capsys.readouterr().out
    record = evaluate(both)
    assert {key: shares["top1"] for key, shares in record["result"].items()} == {
        key: shares["top1"] / 2 for key, shares in full.items()
    }
    told = "warning: 3 of 6 classes of data.val_shards are not in data.train_shards: 30 of 60 images count as wrong\n"
    assert told in capsys.readouterr().out
    assert record["protocol"].endswith(
        "; 30 of 60 val images have a class that train lacks, and count as wrong"
    )
    with pytest.raises(UserError, match=r"^no class of data\.val_shards is in data\.train_shards"):
        evaluate(none)


def test_a_limit_that_loses_classes_is_told(cfg, tmp_path, capsys):
    sorted_rows = sorted(samples(30, seed=3), key=lambda row: row[2])
    pack_samples(sorted_rows, tmp_path / "train", classes=["a", "b", "c"])
    data = replace(cfg.data, train_shards=str(tmp_path / "train" / "*.tar"), limit=6)
    record = evaluate(replace(cfg, k=[1], data=data))
    assert (record["train"]["images"], record["val"]["images"]) == (6, 6)
    assert "warning" not in capsys.readouterr().out
    pack_samples(sorted_rows[19:21], tmp_path / "val", prefix="val", classes=["a", "b", "c"])
    few = replace(data, limit=2, val_shards=str(tmp_path / "val" / "*.tar"))
    evaluate(replace(cfg, k=[1], data=few))
    assert capsys.readouterr().out.startswith(
        "warning: 1 of 2 classes of data.val_shards are not in data.train_shards (its 2 images, spread evenly, have 2 of its 3 "
        "classes): 1 of 2 images count as wrong\n"
    )


def test_sizes_follow_the_model(cfg, world):
    """A run is measured at the size it was trained for, others at 224, both with the margin of 256 : 224."""
    unset = replace(cfg.data, resize=None, crop=None)
    record = evaluate(replace(cfg, data=unset))
    assert record["protocol"].startswith("resize 37 bicubic, center crop 32,")
    assert evaluate(replace(cfg, data=replace(unset, resize=36)))["result"] == evaluate(cfg)["result"]
    record = evaluate(replace(cfg, data=replace(unset, crop=40)))
    assert record["protocol"].startswith("resize 46 bicubic, center crop 40,")
    assert choose_sizes(224) == (256, 224)


@pytest.mark.slow
def test_one_rank_that_fails_keeps_no_other_waiting(cfg, tmp_path):
    """A mistake that one rank sees before they talk ends all; after they have talked, rank 0 is on its own."""
    body = f"""
        import os, sys, time
        from pathlib import Path
        from glsd.cli.door import run
        from glsd.evaluate import run as story
        from glsd.evaluate.protocols import Protocol
        from glsd.errors import UserError

        rank, left = int(os.environ["RANK"]), Path({str(tmp_path / "left")!r})
        case = sys.argv.pop(1)

        def opening(cfg):
            raise UserError("no shard matches on this machine")

        def protocol(*arguments):
            while not left.exists():
                time.sleep(0.1)
            raise RuntimeError("a fault of ours")

        if case == "before" and rank == 1:
            story.PROTOCOLS["knn"] = Protocol(opening, protocol)
        if case == "after":
            story.PROTOCOLS["knn"] = story.PROTOCOLS["knn"]._replace(measure=protocol)

        def main(argv):
            from glsd.config.parse import load
            from glsd.config.evaluate import EvalConfig
            from glsd.cluster import shutdown
            story.evaluate(load(EvalConfig, argv))
            left.touch()
            shutdown.finish()

        run(main)
    """
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(body))
    for case, codes in (("before", [2, 2]), ("after", [1, 0])):
        done = two_processes([str(script), case, *command(cfg)[1:]])
        assert [code for code, _ in done] == codes, done
        words = "error: no shard matches on this machine" if case == "before" else "a fault of ours"
        assert [words in text for _, text in done].count(True) == 1


def two_processes(arguments):
    """Run two ranks without a launcher, which would end one when the other fails; return exit codes and stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    shared |= {
        "OMP_NUM_THREADS": "1",
    }
    running = [
        subprocess.Popen(
            [warm_python(), *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        stderr = [process.communicate(timeout=90)[1] for process in running]
    finally:
        for process in running:
            process.kill()  # does nothing to one that has ended
    return [(process.returncode, text) for process, text in zip(running, stderr, strict=True)]


def test_weights_files_need_a_backbone_and_must_fit(cfg, world):
    weights = str(world / "w.safetensors")
    with pytest.raises(UserError, match="does not say which network it is: set backbone"):
        evaluate(replace(cfg, model=weights))
    with pytest.raises(UserError, match=r"features 'student': .* is not a run"):
        evaluate(replace(cfg, model=weights, backbone="vit_tiny_patch16_224", features="student"))
    with pytest.raises(UserError, match="not of this network"):
        evaluate(replace(cfg, model=weights, backbone="vit_tiny_patch16_224"))


def test_damaged_evals_file_and_unlabeled_shards(cfg, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "evals.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        evaluate(cfg)
    pack_samples([(raw, ext, None) for raw, ext, _ in samples(3, seed=0)], tmp_path, prefix="bare")
    with pytest.raises(UserError, match=r"data\.val_shards: 3 of 3 images have no label"):
        evaluate(replace(cfg, data=replace(cfg.data, val_shards=str(tmp_path / "bare-*.tar"))))


def test_a_run_of_another_architecture_names_the_tensor(cfg, tmp_path, world):
    other = replace(TRAINED, model=replace(TRAINED.model, timm_args={**TINY, "embed_dim": 96}))
    run = tmp_path / "other"
    run.mkdir()
    (run / "config.yaml").write_text(dump(other))
    (run / "checkpoints").symlink_to(world / "run" / "checkpoints")
    with pytest.raises(UserError, match=r"checkpoint .* tensor net\.\S+ is \(.*48.*\), expected \(.*96"):
        evaluate(replace(cfg, model=str(run)))
    (run / "checkpoints").unlink()
    with pytest.raises(UserError, match="no checkpoint yet"):
        evaluate(replace(cfg, model=str(run)))


def command(cfg, **more):
    flags = {"model": cfg.model, "k": "[1,5]", "out": cfg.out, **more}
    flags |= {f"data.{key}": value for key, value in vars(cfg.data).items()}
    return [str(SCRIPT), *(f"--{key}={value}" for key, value in flags.items())]


@pytest.mark.slow
def test_a_mistake_on_the_command_line_is_one_line_and_code_2(cfg):
    bad = subprocess.run([sys.executable, *command(cfg, model="no/such")], capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: model 'no/such'")
    assert len(bad.stderr.splitlines()) == 1


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one(cfg):
    evaluate(cfg)
    launcher = (
        f"{Path(sys.executable).parent}/accelerate launch --multi_gpu --num_processes 2 --num_machines 1"
    )
    launcher += " --mixed_precision no --dynamo_backend no --main_process_port 0"
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHON_EXEC"] = warm_python()  # of the ranks
    done = subprocess.run([*launcher.split(), *command(cfg)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("k=5       top-1") == 1  # one rank talks
    one, two = json.loads((Path(cfg.out) / "evals.json").read_text())
    del one["time"], two["time"]
    assert two == one


def brute_force(features, labels, others, other_labels, *, own: bool, euclidean: bool):
    """Recall@1, Recall@2, MAP@R, R-precision by sorting everything."""
    vectors, references = features.double(), others.double()
    if not euclidean:
        vectors, references = (torch.nn.functional.normalize(x, dim=1) for x in (vectors, references))
    hits, maps, precisions = [], [], []
    for i, vector in enumerate(vectors):
        order = (references - vector).norm(dim=1).argsort().tolist()
        same = [int(other_labels[j] == labels[i]) for j in order if not (own and j == i)]
        relevant = sum(same)
        hits.append([any(same[:k]) for k in (1, 2)])
        precisions.append(sum(same[:relevant]) / relevant)
        maps.append(sum(same[k] * sum(same[: k + 1]) / (k + 1) for k in range(relevant)) / relevant)
    return (*torch.tensor(hits).double().mean(dim=0).tolist(), *(sum(x) / len(x) for x in (maps, precisions)))


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_retrieval_by_hand(cfg, world, distance, capsys):
    searches: dict[str, dict[str, str]] = {
        "leave-one-out": {"test_shards": str(world / "train-*.tar")},
        "query/gallery": {
            "query_shards": str(world / "val-*.tar"),
            "gallery_shards": str(world / "train-*.tar"),
        },
    }
    for name, keys in searches.items():
        data = replace(cfg.data, train_shards="", val_shards="", **keys)
        asked = replace(
            cfg, protocol="retrieval", data=data, recall_at=[1, 2], distance=distance, nmi_seeds=2
        )
        record = evaluate(asked)
        found = record["result"][distance]
        sets = {role: features_of(pattern) for role, pattern in keys.items()}
        query = sets.get("test_shards") or sets["query_shards"]
        gallery = sets.get("gallery_shards") or query
        own = name == "leave-one-out"
        expected = brute_force(*query, *gallery, own=own, euclidean=distance == "euclidean")
        ours = tuple(found[key] for key in ("recall@1", "recall@2", "map_at_r", "r_precision"))
        assert ours == pytest.approx(expected, abs=1e-12)
        assert 0 <= found["nmi"] <= 1
        assert len(found["nmi_by_seed"]) == 2
        assert ("self excluded by index" in record["protocol"]) == own
        assert "share of all queries with an item of their class among the first K" in capsys.readouterr().out


def features_of(pattern):
    from glsd.data.eval_loader import eval_loader
    from glsd.evaluate.sets import embed
    from glsd.shards.store import open_shards

    loader = eval_loader(
        open_shards(pattern), resize=36, crop=32, batch_size=90, rank=0, world_size=1, num_workers=0
    )
    teacher = network(1).eval()
    return embed(lambda images: teacher(images)[0], loader, device=torch.device("cpu"))[:2]


@pytest.mark.parametrize(
    ("changes", "data", "expected"),
    [
        ({}, {}, "but none is set"),
        ({}, {"query_shards": "val"}, "but data.query_shards is set"),
        ({}, {"query_shards": "val", "gallery_shards": "val"}, "have 1 shards in common"),
        ({"recall_at": [0]}, {"test_shards": "val"}, "recall_at is [0]"),
        ({"nmi_seeds": -1}, {"test_shards": "val"}, "nmi_seeds is -1"),
        ({"seed": -1}, {"test_shards": "val"}, "seed is -1"),
    ],
)
def test_retrieval_mistakes_are_one_line(cfg, world, changes, data, expected):
    shards = {key: str(world / f"{name}-*.tar") for key, name in data.items()}
    with pytest.raises(UserError) as caught:
        evaluate(
            replace(
                cfg,
                protocol="retrieval",
                data=replace(cfg.data, train_shards="", val_shards="", **shards),
                **changes,
            )
        )
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
