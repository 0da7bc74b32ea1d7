"""Meters: means, totals, exact continuation, and what is written where."""

import json
import math
import time

import pytest
import torch
from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

from glsd.runtime import meters as meters_module
from glsd.runtime.meters import Meters
from glsd.runtime.run import rewind
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")


def make(folder, *, start_step=0) -> Meters:
    return Meters(folder, total_steps=10, start_step=start_step, device=CPU)


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_clock(rows):
    return [{name: value for name, value in row.items() if name != "timing"} for row in rows]


def test_means_totals_and_extras(tmp_path):
    meters = make(tmp_path)
    for step, loss in enumerate((1.0, 2.0, 6.0), start=1):
        meters.add("loss", torch.tensor(loss, requires_grad=True))
        if step > 1:
            meters.add("share", 0.5 * step)
        meters.count("broken", step)
        meters.advance(step, images=4)
    row = meters.flush(3, epoch=0, lr=0.1)
    expected = {"step": 3, "epoch": 0, "lr": 0.1, "loss": 3.0, "share": 1.25, "broken": 6.0}
    assert without_clock([row]) == [expected]
    meters.add("loss", torch.tensor(5.0))
    assert meters.flush(4)["loss"] == 5.0  # the window before is forgotten
    assert "broken" not in meters.flush(5)
    meters.close()
    assert without_clock(rows_of(tmp_path))[0] == expected
    assert [row["step"] for row in rows_of(tmp_path)] == [3, 4, 5]


def test_the_sum_is_kept_in_float64(tmp_path):
    meters = make(tmp_path)
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    for value in values:
        meters.add("loss", value)
    assert meters.flush(1)["loss"] == pytest.approx(float(values.double().mean()), rel=1e-14)


def test_adding_does_not_wait_for_the_device(tmp_path):
    meters = Meters(tmp_path, total_steps=10, start_step=0, device=torch.device("meta"))
    for _ in range(2):
        meters.add("loss", torch.zeros((), device="meta"))  # a meta tensor has no value to wait for
    with pytest.raises((RuntimeError, NotImplementedError)):
        meters.flush(1)


def test_going_on_from_the_state_gives_the_same_row_to_the_bit(tmp_path):
    values = torch.randn(7, generator=torch.Generator().manual_seed(0))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    straight, first = make(tmp_path / "a"), make(tmp_path / "b")
    for step, value in enumerate(values, start=1):
        straight.add("loss", value)
        straight.count("broken", 1)
        if step <= 3:
            first.add("loss", value)
            first.count("broken", 1)
    saved = json.loads(json.dumps(first.state()))
    second = make(tmp_path / "b", start_step=3)
    second.load_state(saved)
    for value in values[3:]:
        second.add("loss", value)
        second.count("broken", 1)
    assert without_clock([second.flush(7)]) == without_clock([straight.flush(7)])


def test_timing_stands_apart(tmp_path):
    meters = make(tmp_path)
    with meters.waiting():
        time.sleep(0.05)
    meters.advance(2, images=8)
    start = time.perf_counter()
    timing = meters.flush(2)["timing"]
    assert timing.keys() == {"images_per_s", "data_wait", "step_s", "elapsed_s"}
    assert 0 < timing["data_wait"] <= 1
    assert timing["step_s"] >= 0.025
    assert timing["images_per_s"] == pytest.approx(8 / (2 * timing["step_s"]))
    assert start > 0
    again = meters.flush(3)["timing"]
    assert again["images_per_s"] == again["data_wait"] == 0


def test_what_is_not_finite_is_readable_json(tmp_path):
    meters = make(tmp_path)
    meters.add("loss", torch.tensor(math.nan))
    meters.add("norm", math.inf)
    row = meters.flush(1)
    assert math.isnan(row["loss"])
    meters.close()
    saved = rows_of(tmp_path)[0]
    assert (saved["loss"], saved["norm"]) == ("nan", "inf")
    assert math.isnan(float(saved["loss"]))


def test_rows_are_in_the_file_before_it_is_closed_and_after_a_resume(tmp_path):
    first = make(tmp_path)
    first.write({"step": 0, "knn": 0.5})
    assert rows_of(tmp_path) == [{"step": 0, "knn": 0.5}]
    second = make(tmp_path, start_step=1)
    second.write({"step": 2, "knn": 0.75})
    second.sync()
    assert [row["knn"] for row in rows_of(tmp_path)] == [0.5, 0.75]


def test_tensorboard_shows_the_rows_and_forgets_what_a_resumed_run_repeats(tmp_path):
    first = make(tmp_path)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": float(step), "timing": {"step_s": 0.1}})
    first.close()
    time.sleep(1.1)  # event files are ordered by the second they were made in
    second = make(tmp_path, start_step=1)
    second.write({"step": 2, "loss": 20.0})
    second.close()
    board = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == {"1_loss/loss", "5_timing/step_s"}
    assert [(event.step, event.value) for event in board.Scalars("1_loss/loss")] == [(1, 1.0), (2, 20.0)]


def test_a_probe_that_is_made_again_is_shown_once_and_the_row_of_its_step_stays(tmp_path):
    first = make(tmp_path)
    for row in (
        {"step": 3, "loss": 3.0, "grad_norm": math.inf},
        {"step": 3, "probe": {"rankme": 0.5}},
        {"step": 4, "loss": 4.0},
    ):
        first.write(row)
    first.close()
    rewind(tmp_path, 3)
    time.sleep(1.1)  # event files are ordered by the second they were made in
    second = make(tmp_path, start_step=3)
    second.write({"step": 3, "probe": {"rankme": 0.25}})
    second.write({"step": 4, "loss": 5.0})
    second.close()
    board = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("3_probe/rankme")] == [(3, 0.25)]
    assert [(event.step, event.value) for event in board.Scalars("1_loss/loss")] == [(3, 3.0), (4, 5.0)]
    assert [(event.step, event.value) for event in board.Scalars("2_health/grad_norm")] == [(3, math.inf)]


def test_a_batch_job_gets_plain_lines(tmp_path, capsys):
    meters = make(tmp_path)
    meters.add("loss", 1.5)
    meters.advance(5, images=10)
    meters.flush(5)
    meters.say("hello")
    meters.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 5/10  loss 1.5000  images/s ")
    assert "data wait 0%" in first
    assert "left 00:0" in first
    assert second == "hello"


def test_a_terminal_gets_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(meters_module.sys.stderr, "isatty", lambda: True, raising=False)
    meters = make(tmp_path, start_step=2)
    meters.add("loss", 1.5)
    meters.advance(5, images=10)
    meters.flush(5)
    meters.say("hello")
    meters.close()
    out, err = capsys.readouterr()
    assert out == "hello\n"
    assert "5/10" in err
    assert "loss=1.5000" in err


@pytest.mark.slow
def test_ranks_are_averaged_and_one_writes(tmp_path):
    run_ranks(
        """
        import json
        from glsd.runtime.meters import Meters

        def make():
            return Meters(folder, total_steps=4, start_step=0, device=torch.device("cpu"))

        meters = make()
        meters.add("loss", torch.tensor(1.0 + rank))
        meters.advance(1, images=4)
        if rank == 1:  # names that only one rank has must not upset the others
            meters.add("odd", 7.0)
            meters.count("broken", 2)
        state = json.loads(json.dumps(meters.state()))
        assert len(state) == 2 and state[1]["totals"] == {"broken": 2}
        row = meters.flush(1)
        timing = row.pop("timing")
        assert row == {"step": 1, "loss": 1.5, "odd": 7.0, "broken": 2.0}, row
        assert timing["images_per_s"] > 0
        same = make()
        same.load_state(state)
        row = same.flush(1)
        row.pop("timing")
        assert row == {"step": 1, "loss": 1.5, "odd": 7.0, "broken": 2.0}, row
        fewer = make()
        fewer.load_state([*state, *state, state[0]])  # from five ranks to two
        row = fewer.flush(1)
        assert abs(row["loss"] - (1 + 2 + 1 + 2 + 1) / 5) < 1e-12 and row["broken"] == 4
        more = make()
        more.load_state([{"sums": {"loss": 3.0}, "counts": {"loss": 3}, "totals": {}}])  # three steps of one rank
        more.add("loss", 5.0)
        assert more.flush(4)["loss"] == 2.0, "a step counts once, however many ranks took it"
        """,
        tmp_path,
    )
    assert [row["step"] for row in rows_of(tmp_path)] == [
        1,
        1,
        1,
        4,
    ]  # four flushes by rank 0, none by rank 1
