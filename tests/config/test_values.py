"""What people type is taken where it means one thing; anything else is one line that shows how it is written."""

import pytest

from glsd.config.evaluate import EvalConfig
from glsd.config.finetune import FinetuneConfig
from glsd.config.parse import differences, load
from glsd.config.pretrain import PretrainConfig
from glsd.errors import UserError

CLASSES = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "evaluate": EvalConfig}


def changed(kind: str, argv: list[str]) -> dict:
    return differences(load(CLASSES[kind], argv))


def refusal(kind: str, argv: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        changed(kind, argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "words", "expected"),
    [
        ("evaluate", "--k|20", {"k": [20]}),
        ("evaluate", "--k|10|20|100", {"k": [10, 20, 100]}),
        ("evaluate", "--k=10|20", {"k": [10, 20]}),
        ("evaluate", "--k|1,2,4", {"k": [1, 2, 4]}),
        ("evaluate", "--k|1, 2", {"k": [1, 2]}),
        ("evaluate", "--k|[1,|2]", {"k": [1, 2]}),
        ("evaluate", "--k|(1,)", {"k": [1]}),
        ("evaluate", "--k|[]", {"k": []}),
        ("evaluate", "--linear_lr|1e-3|.1|1", {"linear_lr": [0.001, 0.1, 1.0]}),
        ("evaluate", "--data.crop|null", {}),
        ("evaluate", "--data.crop|None", {}),
        ("evaluate", "--data.crop|96", {"data.crop": 96}),
        ("evaluate", "--distance|null", {}),
        ("pretrain", "--data.global_scale|(0.3, 1.0)", {"data.global_scale": (0.3, 1.0)}),
        ("pretrain", "--data.global_scale|0.3|1", {"data.global_scale": (0.3, 1.0)}),
        ("pretrain", "--data.weights|2", {"data.weights": [2.0]}),
        ("finetune", "--loss_args|beta=50", {"loss_args.beta": 50}),
        ("finetune", "--loss_args|beta=50,alpha=1e-3", {"loss_args.beta": 50, "loss_args.alpha": 0.001}),
        ("finetune", "--loss_args|beta=50|on=no", {"loss_args.beta": 50, "loss_args.on": False}),
        ("finetune", "--loss_args|beta: 50", {"loss_args.beta": 50}),
        ("finetune", "--loss_args|{'beta': 50, 'x': None}", {"loss_args.beta": 50, "loss_args.x": None}),
        ("finetune", "--loss_args|{beta:|50}", {"loss_args.beta": 50}),
        ("finetune", "--loss_args.beta|.5", {"loss_args.beta": 0.5}),
        ("finetune", "--mdr.levels|-2|0|2", {"mdr.levels": [-2.0, 0.0, 2.0]}),
        ("finetune", "--optim.milestones|30", {"optim.milestones": [30]}),
        ("pretrain", "--model.timm_args.patch_size|8|16", {"model.timm_args.patch_size": [8, 16]}),
        ("pretrain", "--model.timm_args.patch_size|(8, 16)", {"model.timm_args.patch_size": [8, 16]}),
        ("pretrain", "--model.timm_args.pos_embed|none", {"model.timm_args.pos_embed": "none"}),
        ("pretrain", "--data.shards|a b.tar", {"data.shards": "a b.tar"}),
        ("pretrain", "--data.shards|a.tar|b,c.tar", {"data.shards": ["a.tar", "b,c.tar"]}),
        ("pretrain", "--data.shards|a-[01].tar", {"data.shards": "a-[01].tar"}),
        ("pretrain", "--model.compile", {"model.compile": True}),
        ("pretrain", "--model.compile|0", {"model.compile": False}),
        ("pretrain", "--loss.hinge|N", {"loss.hinge": False}),
        ("pretrain", "--loss.hinge=Off", {"loss.hinge": False}),
        ("pretrain", "--optim.epochs|3.0", {"optim.epochs": 3}),
        ("pretrain", "--optim.clip_grad|inf", {"optim.clip_grad": float("inf")}),
        ("pretrain", "--optim.batch-size|64", {"optim.batch_size": 64}),
        ("pretrain", "--optim|{lr: 2, epochs: 3}", {"optim.lr": 2.0, "optim.epochs": 3}),
        ("pretrain", "--optim.lr|1|--optim|{lr: 2}", {"optim.lr": 1.0}),
    ],
)
def test_what_people_type_is_taken(kind, words, expected):
    assert changed(kind, words.split("|")) == expected


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("evaluate", "--k|many", "--k is 'many': expected whole numbers, e.g. --k 10 20 100 200"),
        ("evaluate", "--k|1,000", "--k is '1,000': expected whole numbers, e.g. --k 10 20 100 200"),
        ("evaluate", "--k", "--k has no value: expected whole numbers, e.g. --k 10 20 100 200"),
        ("evaluate", "--k|10|--k|20", "--k is given twice: give all its values at once, e.g. --k 10 20"),
        ("pretrain", "--data.global_scale|0.4", "expected 2 numbers, e.g. --data.global_scale 0.4 1.0"),
        ("pretrain", "--data.weights|x", "expected numbers, e.g. --data.weights 1 0.25"),
        ("finetune", "--loss_args|beta", "expected names with values, e.g. --loss_args name=4 other=[1,2]"),
        ("finetune", "--loss_args|{beta:50}", "but 'beta:50' is no name, e.g. --loss_args name=4"),
        ("finetune", "--loss_args|{beta: 1, beta: 2}", "key 'beta' stands twice"),
        ("finetune", "--loss_args|beta=1 beta=2", "beta is given twice"),
        ("finetune", "--loss_args|a=1|--loss_args|b=1", "--loss_args is given twice"),
        ("pretrain", "--model.timm_args|{x: {y: 1}}", "x is {y: '1'}: expected a plain value or a list"),
        ("pretrain", "--data.shards|a.tar|--data.shards|b.tar", "e.g. --data.shards a.tar b.tar"),
        ("pretrain", "--optim.epochs|010", "--optim.epochs is '010': expected a whole number"),
        ("pretrain", "--optim.epochs|3.5", "--optim.epochs is '3.5': expected a whole number"),
        ("pretrain", f"--seed|{'9' * 5000}", "expected a whole number"),
        ("pretrain", "--optim.lr|nan", "--optim.lr is 'nan': expected a number"),
        ("pretrain", "--optim.lr|0,001", "--optim.lr is '0,001': expected a number"),
        ("pretrain", "--optim.lr|1|2", "--optim.lr is [1, 2]: expected a number, a single one"),
        ("pretrain", "--optim.lr", "--optim.lr has no value: expected a number"),
        ("pretrain", "--loss.hinge|maybe", "--loss.hinge is 'maybe': expected true or false"),
        ("pretrain", "--matching|Both", "'none'; did you mean 'both'?"),
        ("pretrain", "--out|", "--out is empty: expected a path (leave it out for 'runs/pretrain')"),
        ("finetune", "--out= ", "--out is empty"),
        ("pretrain", "--out|my|runs", "--out is [my, runs]: expected a path, a single one"),
        ("pretrain", "--optim|3", "--optim is '3': give its keys as flags, such as --optim.epochs"),
        ("pretrain", "--optim|{lrr: 3}", "unknown key --optim.lrr; did you mean '--optim.lr'?"),
        ("pretrain", "-lr|3", "unexpected '-lr': flags begin with --"),
        ("pretrain", "small_data", "unexpected 'small_data': give it behind a flag, such as --config small"),
        ("pretrain", "--config", "--config has no value"),
        ("pretrain", "--config|digits.yaml", "did you mean the recipe, --config digits?"),
        ("pretrain", "--print_config|everything", "expected nothing, or skip_default"),
    ],
)
def test_what_means_nothing_or_two_things_is_one_line(kind, words, message):
    assert message in refusal(kind, words.split("|"))


@pytest.mark.parametrize(
    ("kind", "flag", "meant"),
    [
        ("pretrain", "--optim.learning_rate", "--optim.lr"),
        ("finetune", "--learning-rate", "--optim.lr"),
        ("pretrain", "--wd", "--optim.weight_decay"),
        ("pretrain", "--bs", "--optim.batch_size"),
        ("pretrain", "--Optim.LR", "--optim.lr"),
        ("pretrain", "--optim.num_workers", "--data.num_workers"),
        ("finetune", "--output_dir", "--out"),
        ("pretrain", "--arch", "--model.backbone"),
        ("evaluate", "--arch", "--backbone"),
        ("evaluate", "--image_size", "--data.crop"),
        ("pretrain", "--image_size", "--data.global_size"),
        ("pretrain", "--data.shards+", "--data.shards"),
        ("pretrain", "--optim.epoch", "--optim.epochs"),
        ("pretrain", "--model.timm_arg", "--model.timm_args"),
        ("pretrain", "--xyzzy", None),
        ("pretrain", "--optim.patience", None),
    ],
)
def test_a_hint_names_what_was_meant_or_nothing(kind, flag, meant):
    said = refusal(kind, [flag, "1"])
    assert said.startswith(f"unknown flag {flag}")
    assert ("did you mean" in said) == (meant is not None)
    if meant:
        assert f"did you mean '{meant}'?" in said


def test_of_a_flag_that_stands_twice_the_last_counts_and_a_line_says_so(capsys):
    assert changed("pretrain", ["--optim.lr", "1", "--resume", "auto", "--optim.lr=2"])["optim.lr"] == 2
    assert capsys.readouterr().err == "note: --optim.lr is given twice: the last one counts, '2'\n"
    changed("pretrain", ["--optim.lr", "1", "--optim.lr=1"])
    assert capsys.readouterr().err == ""
