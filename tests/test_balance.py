"""data/balance.py: what weighs how much, that epochs keep to it, and that the stream stays one for all processes."""

import shutil
from unittest import mock

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline import Numbers, assert_equal, numbers, take
from test_records import corrupt_shard, encode

from configs import base
from semflow_jax import parallel
from semflow_jax.data import balance
from semflow_jax.data.balance import Balanced, example_weights, find_classes
from semflow_jax.data.builders import write_records
from semflow_jax.data.info import VOID, DataInfo
from semflow_jax.data.pipeline import make_stream, make_train_iterator
from semflow_jax.data.records import Records, load_info, open_records
from semflow_jax.errors import UserError
from semflow_jax.train import loop
from semflow_jax.train.setup import Setup

NUM = 12
CLASSES = [[0, 1], [0], [0], [0, 2], *[[0]] * 6, [], [0, 1, 2]]  # 11, 2 and 2 of 12


def write(path, classes=CLASSES):
    """Examples of 4 x 6 with a row for each class, the rest void, and their number in channel 0."""

    def examples():
        for i, ids in enumerate(classes):
            image, label = np.full((4, 6, 3), i, np.uint8), np.full((4, 6), VOID, np.uint8)
            for row, k in enumerate(ids):
                label[row] = k
            yield {"image": encode(image), "label": encode(label), "id": f"n{i}"}

    info = DataInfo(name="numbers", class_names=("a", "b", "c", "nowhere"), size=(4, 6))
    write_records(path, info, {"train": examples()}, progress=False)
    return path


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write(tmp_path_factory.mktemp("balance") / "set")


def test_classes_are_found_once(data_dir, monkeypatch, tmp_path):
    assert find_classes(data_dir, "train", progress=False) == CLASSES
    monkeypatch.setattr(Records, "classes", None)  # calling it would fail
    assert find_classes(data_dir, "train", progress=False) == CLASSES
    assert load_info(data_dir).num_classes == 4 and len(open_records(data_dir, "train")) == NUM
    monkeypatch.undo()
    (data_dir / balance.FOLDER).rename(tmp_path / balance.FOLDER)  # as if the records had been made anew
    other = write(tmp_path / "other", CLASSES[::-1])
    (tmp_path / balance.FOLDER).rename(other / balance.FOLDER)
    assert find_classes(other, "train", progress=False) == CLASSES[::-1]


def test_a_stop_while_counting_is_no_loss(tmp_path, monkeypatch):
    data_dir, seen, classes = write(tmp_path / "set"), [], Records.classes
    monkeypatch.setattr(balance, "EXAMPLES_PER_CHUNK", 5)

    def stop(self, index):
        if index == 7 and 7 not in seen:
            seen.append(index)
            raise KeyboardInterrupt
        seen.append(index)
        return classes(self, index)

    monkeypatch.setattr(Records, "classes", stop)
    with pytest.raises(KeyboardInterrupt):
        find_classes(data_dir, "train", progress=False)
    assert find_classes(data_dir, "train", progress=False) == CLASSES
    assert seen[:8] == [*range(8)] and sorted(seen[8:]) == [*range(5, 12)]


def test_a_corrupt_example_has_no_classes(data_dir, tmp_path):
    damaged = corrupt_shard(data_dir, tmp_path / "damaged", "train")
    shutil.rmtree(damaged / balance.FOLDER, ignore_errors=True)
    found = find_classes(damaged, "train", progress=False)
    assert [a != b for a, b in zip(found, CLASSES, strict=True)].count(True) == 1 and found.count([]) == 2


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_weights_by_hand(exponent):
    """The rarest class of an example decides; without any, it weighs no more than with one that all have."""
    rare, common = 6**exponent, (12 / 11) ** exponent
    expected = [rare, common, common, rare, *[common] * 6, 1, rare]
    np.testing.assert_allclose(example_weights(CLASSES, exponent), expected)
    np.testing.assert_array_equal(example_weights([[], []], exponent), [1, 1])
    np.testing.assert_array_equal(example_weights(CLASSES, 0.0), np.ones(NUM))


few = settings(max_examples=20, deadline=None)


def count(weights: list[float], num_epochs: int, seed: int) -> np.ndarray:
    """How often each epoch has each example: [e n]."""
    num = len(weights)
    order = Balanced(grain.MapDataset.range(num), np.array(weights), seed)
    epochs = [[order[e * num + k] for k in range(num)] for e in range(num_epochs)]
    return np.stack([np.bincount(epoch, minlength=num) for epoch in epochs])


@few
@given(weights=st.lists(st.floats(1, 50), min_size=1, max_size=12), seed=st.integers(0, 2**32 - 1))
def test_each_epoch_has_the_floor_or_the_ceiling_of_what_is_due(weights, seed):
    due = np.array(weights) / np.mean(weights)
    counts = count(weights, 4, seed)
    assert (counts >= np.floor(due - 1e-9)).all() and (counts <= np.ceil(due + 1e-9)).all()
    assert (counts.sum(1) == len(weights)).all()


@pytest.mark.parametrize("seed", [0, 123])
def test_fractions_come_to_their_due(seed):
    """Far closer than chance would bring them: 50 epochs of independent draws would be off by about 5."""
    weights = example_weights(CLASSES, 0.7)
    counts = count(weights.tolist(), 50, seed)
    np.testing.assert_allclose(counts.sum(0), 50 * weights / weights.mean(), atol=2)
    assert len({tuple(epoch) for epoch in counts.tolist()}) > 1


def test_equal_weights_show_each_example_once_an_epoch():
    assert (count([3.0] * 7, 3, 0) == 1).all()


def test_epochs_are_shuffled_each_by_itself():
    weights = example_weights(CLASSES, 0.5)
    stream = make_stream(Numbers(NUM), 5, weights=weights)
    epochs = [[int(stream[e * NUM + k]["image"][0, 0, 0]) for k in range(NUM)] for e in range(4)]
    assert all(epoch != sorted(epoch) for epoch in epochs) and len({*map(tuple, epochs)}) == 4
    found = np.stack([np.bincount(epoch, minlength=NUM) for epoch in epochs])
    np.testing.assert_array_equal(found, count(weights.tolist(), 4, 5))


def test_zero_leaves_the_order_alone(tmp_path):
    data_dir = write(tmp_path / "set")
    assert_equal(take(data_dir, 5, 4, seed=7, balance=0.0), take(data_dir, 5, 4, seed=7))
    assert not (data_dir / balance.FOLDER).exists()
    order = grain.MapDataset.source(range(NUM)).seed(7).shuffle().repeat()  # as it was before there were weights
    with make_train_iterator(data_dir, 4, seed=7) as batches:
        assert batches.ids(0, 3 * NUM) == [f"n{order[k]}" for k in range(3 * NUM)]
    assert numbers(take(data_dir, 5, 4, seed=7, balance=0.5)) != numbers(take(data_dir, 5, 4, seed=7))


@pytest.mark.parametrize("process_count", [2, 3])
def test_processes_share_one_balanced_stream(data_dir, process_count):
    options = {"seed": 7, "balance": 0.5, "crop_scale": (0.4, 1.0)}
    whole = take(data_dir, 5, 6, **options)
    parts = [
        take(data_dir, 5, 6 // process_count, process_index=p, process_count=process_count, **options)
        for p in range(process_count)
    ]
    for step, batch in enumerate(whole):
        for key in batch:
            merged = np.stack([part[step][key] for part in parts], axis=1).reshape(batch[key].shape)
            np.testing.assert_array_equal(merged, batch[key])


def test_a_balanced_stream_is_resumed_and_tells_names(data_dir):
    options = {"seed": 3, "balance": 1.0}
    whole = take(data_dir, 10, 4, **options)
    assert_equal(take(data_dir, 4, 4, 24, **options), whole[6:])
    rest = np.concatenate([batch["image"] for batch in take(data_dir, 5, 3, 25, **options)])
    np.testing.assert_array_equal(rest, np.concatenate([batch["image"] for batch in whole])[25:40])
    with make_train_iterator(data_dir, 4, **options) as batches:
        assert batches.ids(3, 20) == [f"n{i}" for i in numbers(whole)[3:23]]
        assert batches.ids(10**9, 2) == batches.ids(10**9, 2)


def test_a_run_takes_its_exponent_from_the_config(data_dir):
    c = base.get_config()
    c.data.balance = 0.5
    setup = mock.Mock(spec=Setup, config=c, train_dir=str(data_dir), mesh=parallel.make_mesh(c.mesh))
    with (
        loop.make_batches(setup) as batches,
        make_train_iterator(data_dir, 32, seed=c.seed, balance=0.5) as wanted,
        make_train_iterator(data_dir, 32, seed=c.seed) as plain,
    ):
        assert batches.ids(0, 24) == wanted.ids(0, 24) != plain.ids(0, 24)


@pytest.mark.slow
def test_workers_give_the_same_balanced_batches(data_dir):
    wanted = take(data_dir, 4, 4, balance=0.5)
    assert_equal(take(data_dir, 4, 4, balance=0.5, num_workers=2), wanted)


@pytest.mark.parametrize("value", [-0.5, 1.5])
def test_an_exponent_out_of_range(data_dir, value):
    with pytest.raises(UserError, match=r"balance: must be an exponent in \[0, 1\], got .*; 0.5 is usual"):
        make_train_iterator(data_dir, 4, balance=value)
