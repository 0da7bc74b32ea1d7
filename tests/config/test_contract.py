"""The contract as properties of random command lines and files, and the examples of docs/configuration.md."""

import ast
import dataclasses
import random
import re
import shlex
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from glsd.config.evaluate import EvalConfig
from glsd.config.finetune import FinetuneConfig
from glsd.config.keys import keys_of
from glsd.config.parse import dump, load, load_file
from glsd.config.pretrain import PretrainConfig
from glsd.config.values import PathText

# The type checks of the tests draw which item of a list they look at.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")
CLASSES = (PretrainConfig, FinetuneConfig, EvalConfig)
PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
SOME = settings(max_examples=40, deadline=None, derandomize=True)
NAMES = st.from_regex(r"[a-zA-Z_][a-z0-9_]{0,7}", fullmatch=True)
NUMBERS = st.floats(allow_nan=False)
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | NUMBERS | st.text()


def values(kind: Any, texts: st.SearchStrategy[str]) -> st.SearchStrategy:
    """All values of a type; texts: of those that are texts."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind == PathText:
        return texts.filter(lambda text: text.strip() and not text.startswith("~"))
    if origin is typing.Literal:
        return st.sampled_from(parts)
    if origin is list:
        return st.lists(values(parts[0], texts), max_size=4)
    if origin is tuple:
        return st.tuples(*(values(part, texts) for part in parts))
    if origin is dict:
        return st.dictionaries(NAMES, PLAIN | st.lists(PLAIN, max_size=3), max_size=3)
    if parts:
        return st.one_of(*(values(part, texts) for part in parts))
    scalars: dict[Any, st.SearchStrategy] = {
        type(None): st.none(),
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**63),
        float: NUMBERS,
        str: texts,
    }
    return scalars[kind]


def configurations(kind: Any) -> st.SearchStrategy:
    fields = {
        field.name: configurations(field.type)
        if dataclasses.is_dataclass(field.type)
        else values(field.type, st.text())
        for field in dataclasses.fields(kind)
    }
    return st.builds(kind, **fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("contract")


@pytest.mark.parametrize("kind", CLASSES)
@given(data=st.data())
@SOME
def test_dump_load_dump_is_the_identity(kind, folder, data):
    """Whatever the texts hold: 1e-3, no, $x, line ends, quotes."""
    cfg = data.draw(configurations(kind))
    text = dump(cfg)
    (folder / "c.yaml").write_text(text, encoding="utf-8")
    again = load_file(kind, folder / "c.yaml")
    assert again == cfg
    assert dump(again) == text
    # Equal is not enough: 1 == 1.0 == True.
    assert repr(again) == repr(cfg)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, last = key.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return tree


def as_flag(value: Any, shuffled: random.Random) -> list[str]:
    """A value as people write it, in one of the ways."""
    if isinstance(value, bool):
        return [shuffled.choice(("true", "yes", "on", "True") if value else ("false", "no", "off", "False"))]
    if value is None:
        return [shuffled.choice(("null", "~", "None"))]
    if isinstance(value, list | tuple) and value and not isinstance(value[0], str):
        words = [str(item) for item in value]
        return shuffled.choice(
            (words, [",".join(words)], [f"[{', '.join(words)}]"], [f"({', '.join(words)})"])
        )
    if isinstance(value, list | dict | tuple):
        return [yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()]
    return [str(value)]


def flat_asdict(cfg: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if dataclasses.is_dataclass(value):
            found |= flat_asdict(value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = list(value) if isinstance(value, tuple) else value
    return found


SIMPLE = st.from_regex(r"[a-z][a-z0-9_/.*-]{0,9}", fullmatch=True).filter(
    lambda text: text not in ("none", "null", "no", "yes", "on", "off", "true", "false", "y", "n")
)


@pytest.mark.parametrize("kind", CLASSES)
@given(data=st.data(), seed=st.integers(0, 2**32))
@SOME
def test_any_order_of_flags_and_files_gives_the_same(kind, folder, data, seed):
    """Defaults, then files in order, then flags: as a literal merge of dicts has it."""
    keys, shuffled = keys_of(kind), random.Random(seed)
    chosen = st.lists(st.sampled_from(sorted(keys)), unique=True, max_size=5)
    simple = {
        name: values(key.kind, SIMPLE)
        for name, key in keys.items()
        if typing.get_origin(key.kind) is not dict
    }
    sources = [
        {name: data.draw(simple[name]) for name in data.draw(chosen) if name in simple} for _ in range(3)
    ]
    expected = flat_asdict(kind())
    for source in sources:
        expected |= {name: list(v) if isinstance(v, tuple) else v for name, v in source.items()}
    files = []
    for number, source in enumerate(sources[:2]):
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in source.items()}
        tree = shuffled.choice((nested, dict))(plain)
        (folder / f"{number}.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        files.append(f"--config={folder / f'{number}.yaml'}")
    # The order of the files counts; everything else may stand anywhere.
    words = [
        (shuffled.random(), [f"--{name}", *as_flag(value, shuffled)]) for name, value in sources[2].items()
    ]
    places = sorted(shuffled.random() for _ in files)
    words += [(place, [file]) for place, file in zip(places, files, strict=True)]
    argv = [word for _, part in sorted(words) for word in part]
    assert flat_asdict(load(kind, argv)) == expected


@pytest.mark.parametrize("kind", CLASSES)
def test_every_flag_that_help_all_shows_is_accepted(kind, capsys):
    with pytest.raises(SystemExit):
        load(kind, ["--help", "all"])
    shown = re.findall(r"^  --(\S+) \(type: .*, default: (.*)\)$", capsys.readouterr().out, re.M)
    assert [name for name, _ in shown] == list(keys_of(kind))
    argv = [word for name, default in shown for word in (f"--{name}", default.strip("'"))]
    assert load(kind, argv) == kind()
    for name, default in shown:
        assert load(kind, [f"--{name}={default.strip(chr(39))}"]) == kind()


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("form", ["--print_config", "--print_config=skip_default", "--print-config"])
def test_what_is_printed_can_be_read(kind, form, tmp_path, capsys):
    argv = ["--seed", "3", "--out", "a$$b", "--data.num_workers", "7"]
    with pytest.raises(SystemExit):
        load(kind, [*argv[:2], form, *argv[2:]])
    (tmp_path / "c.yaml").write_text(text := capsys.readouterr().out)
    assert load_file(kind, tmp_path / "c.yaml") == load(kind, argv)
    if "skip" in form:
        assert yaml.safe_load(text) == {"seed": 3, "out": "a$$b", "data": {"num_workers": 7}}


def table(title: str) -> list[list[str]]:
    """The rows of the table in a section of the page, without marks."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in section.splitlines()
        if line[:1] == "|"
    ]
    return [[cell.strip("`") for cell in row] for row in rows[2:]]


def set_by(argv: list[str]) -> Any:
    """The value of the key that the first flag names."""
    name = argv[0].removeprefix("--").partition("=")[0].replace("-", "_")
    cfg = flat_asdict(load(PretrainConfig, argv))
    holder = name if name in cfg else name.rpartition(".")[0]
    value: Any = load(PretrainConfig, argv)
    for part in holder.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("row", table("Values"), ids=lambda row: row[1])
def test_the_values_of_the_page(row):
    assert set_by(shlex.split(row[1])) == ast.literal_eval(row[2])


@pytest.mark.parametrize("row", table("Keys"), ids=lambda row: row[0])
def test_the_keys_of_the_page(row, tmp_path):
    (tmp_path / "c.yaml").write_text(row[0])
    name, value = row[2].split(" = ")
    for argv in (["--config", str(tmp_path / "c.yaml")], row[1].split()):
        assert flat_asdict(load(PretrainConfig, argv)) == flat_asdict(PretrainConfig()) | {
            name: ast.literal_eval(value)
        }


@pytest.mark.parametrize("row", table("Paths"), ids=lambda row: row[0])
def test_the_paths_of_the_page(row, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    assert set_by(shlex.split(row[0])) == row[1]


def test_the_command_lines_of_the_page_are_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("optim: {epochs: 1, lr: 1}\nout: base\n")
    (tmp_path / "mine.yaml").write_text("optim: {epochs: 2, lr: 2}\nout: mine\n")
    lines = re.findall(r"^glsd pretrain ([^#\n]*)", PAGE, re.M)
    first, second = (load(PretrainConfig, shlex.split(line)) for line in lines)
    assert first == second
    assert (first.optim.epochs, first.optim.lr, first.out) == (3, 2.0, "runs/x")
