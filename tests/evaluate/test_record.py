"""evals.json: records that come at the same time, and what is left when writing fails."""

import json
import threading
import time

import pytest

from glsd.errors import UserError
from glsd.evaluate import record
from glsd.evaluate.record import append_record, cannot_write


def test_records_that_come_at_the_same_time_are_all_kept(tmp_path, monkeypatch):
    read = record._read

    def slow(path):
        found = read(path)
        time.sleep(0.02)
        return found

    monkeypatch.setattr(record, "_read", slow)
    threads = [threading.Thread(target=append_record, args=(tmp_path, {"number": i})) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = json.loads((tmp_path / "evals.json").read_text())
    assert sorted(row["number"] for row in records) == list(range(6))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".evals.json.lock", "evals.json"]


def test_a_damaged_file_stays_as_it_is_and_leaves_no_draft(tmp_path):
    assert cannot_write(tmp_path) is None
    (tmp_path / "evals.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        append_record(tmp_path, {"number": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".evals.json.lock", "evals.json"]
    assert "is not JSON" in str(cannot_write(tmp_path))
    assert (tmp_path / "evals.json").read_text() == "{"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".evals.json.lock", "evals.json"]
