"""evaluate/tally.py: sums are exact, and go on where they were stopped."""

import numpy as np
import pytest

from semflow_jax.evaluate import tally as tally_module
from semflow_jax.evaluate.tally import tally

BATCHES = [np.arange(3 * i, 3 * i + 3) for i in range(5)]


def count(batch):
    return {"num": np.int32(len(batch)), "half": (batch / 2).astype(np.float32).sum()}, {"each": batch[1:]}


def batches_from(first):
    return iter(BATCHES[first:])


def check(found):
    assert found["num"] == 15 and found["num"].dtype == np.int64
    assert found["half"] == sum(range(15)) / 2 and found["half"].dtype == np.float64
    np.testing.assert_array_equal(found["each"], [x for batch in BATCHES for x in batch[1:]])


def test_counts_are_wide():
    """Sums of int32 don't overflow, nor do many small float32 get lost beside a large one."""
    big = tally(lambda first: [0, 1, 2], lambda _: ({"n": np.int32(2**31 - 1)}, {}))
    assert big["n"] == 3 * (2**31 - 1)
    small = tally(lambda first: range(1001), lambda i: ({"x": np.float32(1e8 if i == 0 else 1)}, {}))
    assert small["x"] == 1e8 + 1000


def test_without_a_file():
    check(tally(batches_from, count))


@pytest.mark.parametrize("stop", range(5))
def test_goes_on_where_it_was_stopped(tmp_path, monkeypatch, stop):
    monkeypatch.setattr(tally_module, "KEEP_SECONDS", -1)
    path = tmp_path / "deep" / "counts.npz"
    seen = []

    def interrupted(first):
        for i, batch in enumerate(batches_from(first)):
            if i == stop:
                raise KeyboardInterrupt
            yield batch

    def watched(first):
        seen.append(first)
        return batches_from(first)

    with pytest.raises(KeyboardInterrupt):
        tally(interrupted, count, path)
    check(tally(watched, count, path))
    check(tally(watched, count, path))  # and once it is done there is nothing left to do
    assert seen == [stop, 5]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"PK" + data])
def test_a_damaged_file_is_counted_anew(tmp_path, caplog, damage):
    path = tmp_path / "counts.npz"
    tally(batches_from, count, path)
    path.write_bytes(damage(path.read_bytes()))
    check(tally(batches_from, count, path))
    assert "can't be read, counting from the start" in caplog.text
