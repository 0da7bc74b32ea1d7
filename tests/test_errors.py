"""Messages of parts that become messages of a story."""

import pytest

from glsd.errors import UserError, config_keys, one_line, with_config_keys

KEYS = {"image_size": "data.global_size", "size": "data.size", "pool": "model.pool"}


def test_arguments_become_keys():
    with pytest.raises(UserError) as raised, config_keys(KEYS):
        raise UserError("image_size is 100: give a multiple of 16, or another size.")
    assert str(raised.value) == "data.global_size is 100: give a multiple of 16, or another data.size."


def test_only_whole_names_are_replaced():
    text = "pooling of 'pool' in data.pool, --pool, my_pool, pool.tar and runs/pool"
    assert with_config_keys(text, KEYS) == text
    assert with_config_keys(text, {}) == text


def test_another_error_goes_through():
    with pytest.raises(ValueError, match=r"^size$"), config_keys(KEYS):
        raise ValueError("size")


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        (OSError(2, "No such file or directory", "a.jpg"), "No such file or directory"),
        (OSError("image file is truncated"), "image file is truncated"),
        (ValueError("while parsing\n  in line 2,\x1b[0m column 3"), "while parsing in line 2, [0m column 3"),
        (
            RuntimeError("timed out after 3 s\nException raised from wait (most recent call first):\n"),
            "timed out after 3 s",
        ),
        (KeyError(), "KeyError"),
        ("a" * 400, "a" * 300),
    ],
)
def test_an_error_becomes_one_line(problem, line):
    assert one_line(problem) == line
