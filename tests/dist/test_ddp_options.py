"""Two gloo ranks under each option of launch.start have the gradients of one process with the whole batch."""

from pathlib import Path

import pytest
import torch
from tests.helpers.launched import run, warm_launch_line
from tests.helpers.warm_python import warm_python


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_one(tmp_path):
    body = str(Path(__file__).parent / "ddp_options.py")
    environment, command = warm_launch_line()
    alone = run([warm_python(), body, str(tmp_path / "one.pt")])
    assert alone.returncode == 0, alone.stderr
    together = run([*command, body, str(tmp_path / "two.pt")], environment)
    assert together.returncode == 0, together.stderr
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert (one.pop("world"), two.pop("world")) == (1, 2)
    assert one.keys() == two.keys()
    for name, steps in one.items():
        for first, second in zip(steps, two[name], strict=True):
            error = float((first - second).norm() / first.norm())
            if name == "bf16":  # 8 bits of mantissa: 2^-9 at most for each number, really sent
                assert 1e-5 < error < 2**-8
            else:
                assert error < 1e-10, name
