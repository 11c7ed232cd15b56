"""data/pipeline.py: order, epochs, processes, resuming, corrupt records, padding."""

import collections
import functools
import logging
import time

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_records import corrupt_shard, encode

from semflow_jax.data import pipeline
from semflow_jax.data.builders import write_records
from semflow_jax.data.info import VOID, DataInfo
from semflow_jax.data.pipeline import TrainBatches, make_eval_batches, make_stream, make_train_iterator
from semflow_jax.data.records import CorruptRecord, Healthy, open_records
from semflow_jax.errors import UserError

NUM, SIZE = 10, (16, 24)


@functools.cache
def make_pair(i: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and label of example i: its number in channel 0, left and right halves of classes 1 and 2."""
    image = np.random.default_rng(i).integers(0, 256, (*SIZE, 3), np.uint8)
    image[..., 0] = i
    label = np.ones(SIZE, np.uint8)
    label[:, SIZE[1] // 2 :] = 2
    label[0] = VOID
    return image, label


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    def examples(num):
        for i in range(num):
            image, label = make_pair(i)
            yield {"image": encode(image), "label": encode(label), "id": f"n{i}"}

    path = tmp_path_factory.mktemp("data") / "set"
    info = DataInfo(name="numbers", class_names=("a", "l_b", "r_b"), size=SIZE, flip_pairs=((1, 2),))
    write_records(path, info, {"train": examples(NUM), "val": examples(7)}, progress=False)
    return path


def take(data_dir, num: int, batch_size: int = 1, seen: int = 0, **options) -> list[dict]:
    with make_train_iterator(data_dir, batch_size, **options) as batches:
        batches.seek(seen)
        return [next(batches) for _ in range(num)]


def numbers(batches: list[dict]) -> list[int]:
    return np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches]).tolist()


def assert_equal(left: list[dict], right: list[dict]):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_batches_hold_the_records(data_dir):
    for batch in take(data_dir, 4, 3, flip=0.0):
        assert batch.keys() == {"image", "label", "index"}
        assert batch["image"].shape == (3, *SIZE, 3) and batch["label"].shape == (3, *SIZE, 1)
        assert batch["image"].dtype == batch["label"].dtype == np.uint8
        for image, label in zip(batch["image"], batch["label"], strict=True):
            wanted_image, wanted_label = make_pair(int(image[0, 0, 0]))
            np.testing.assert_array_equal(image, wanted_image)
            np.testing.assert_array_equal(label[..., 0], wanted_label)


def test_every_epoch_is_a_new_permutation(data_dir):
    order = numbers(take(data_dir, 4 * NUM))
    epochs = [tuple(order[i * NUM : (i + 1) * NUM]) for i in range(4)]
    assert all(sorted(epoch) == list(range(NUM)) for epoch in epochs)
    assert len({*epochs, tuple(range(NUM))}) == 5


def test_seed_decides(data_dir):
    assert_equal(take(data_dir, 9, 4, seed=3), take(data_dir, 9, 4, seed=3))
    assert numbers(take(data_dir, 9, 4, seed=3)) != numbers(take(data_dir, 9, 4, seed=4))


def test_epochs_run_on_through_batches(data_dir):
    """Nothing is dropped where the batch size does not divide the split, nor where the split is smaller."""
    counts = collections.Counter(numbers(take(data_dir, 5, 4)))
    assert set(counts.values()) == {2} and len(counts) == NUM
    assert set(collections.Counter(numbers(take(data_dir, 1, 3 * NUM))).values()) == {3}


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_one_stream(data_dir, process_count):
    """Order, flips and crops together are those of one process with the global batch."""
    options = {"flip": 0.5, "crop_scale": (0.4, 1.0), "seed": 7}
    whole = take(data_dir, 6, 8, **options)
    parts = [
        take(data_dir, 6, 8 // process_count, process_index=p, process_count=process_count, **options)
        for p in range(process_count)
    ]
    for step, batch in enumerate(whole):
        for key in batch:
            merged = np.stack([part[step][key] for part in parts], axis=1).reshape(batch[key].shape)
            np.testing.assert_array_equal(merged, batch[key])


@pytest.mark.parametrize("options", [{}, {"crop_scale": (0.3, 1.0), "jitter": 0.5}])
@pytest.mark.parametrize("process_count", [1, 3])
def test_resumes_exactly(data_dir, options, process_count):
    shard = {"process_index": process_count - 1, "process_count": process_count}
    with make_train_iterator(data_dir, 4, **options, **shard) as batches:
        assert batches.seen == 0
        for _ in range(5):
            next(batches)
        assert batches.seen == 5 * 4 * process_count  # of all processes; not what was read ahead
        rest = [next(batches) for _ in range(6)]
        assert_equal(take(data_dir, 6, 4, 20 * process_count, **options, **shard), rest)
        batches.seek(20 * process_count)  # back in time
        assert_equal([next(batches) for _ in range(6)], rest)


def test_a_position_far_off_is_reached_at_once(data_dir):
    with make_train_iterator(data_dir, 4) as batches:
        next(batches)
        start = time.perf_counter()
        batches.seek(10**9 + 6)
        far = next(batches)
        assert time.perf_counter() - start < 2
    assert batches.seen == 10**9 + 10
    assert far.pop("index").tolist() == [0, 1, 2, 3]
    near = take(data_dir, 1, 6, 10**9 + 4)[0]
    assert_equal([far], [{name: near[name][2:] for name in far}])
    assert len(set(numbers([far]))) == 4


@pytest.mark.slow
def test_workers_give_the_same_batches_and_resume(data_dir):
    options = {"crop_scale": (0.5, 1.0), "jitter": 0.2}
    wanted = take(data_dir, 7, 4, **options)
    with make_train_iterator(data_dir, 4, num_workers=2, **options) as batches:
        assert_equal([next(batches) for _ in range(3)], wanted[:3])
    assert batches.seen == 12
    assert_equal(take(data_dir, 4, 4, 12, num_workers=1, **options), wanted[3:])
    assert_equal(take(data_dir, 4, 4, 12, **options), wanted[3:])


class Numbers:
    """Records of one pixel that is their number, some of them corrupt."""

    def __init__(self, num: int, corrupt=()):
        self.num, self.corrupt = num, frozenset(corrupt)

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> dict:
        if index in self.corrupt:
            raise CorruptRecord(f"record {index} is corrupt")
        return {"image": np.full((1, 1, 3), index, np.uint8), "label": np.zeros((1, 1, 1), np.uint8), "id": str(index)}


class AddNoise(grain.transforms.RandomMap):
    """Leaves the number alone and draws the rest of the colour."""

    def random_map(self, element: dict, rng: np.random.Generator) -> dict:
        image = element["image"].copy()
        image[..., 1:] = rng.integers(0, 256, 2)
        return element | {"image": image}


def walk(records, steps: list[tuple[int, int]], seen: int = 0, seed: int = 0, limit: int = 0) -> np.ndarray:
    """The global stream [n 3] in pieces: for each step, so many processes take a batch of so many examples."""
    stream = make_stream(Healthy(records, limit), seed, [AddNoise()])
    pieces = [np.zeros((0, 3), np.uint8)]
    for process_count, batch_size in steps:
        parts = []
        for p in range(process_count):
            options = {"process_index": p, "process_count": process_count, "limit": limit}
            with TrainBatches(stream, batch_size, **options) as batches:
                batches.seek(seen)
                parts.append(next(batches)["image"][:, 0, 0])
            assert batches.seen == seen + process_count * batch_size
        seen = batches.seen
        pieces.append(np.stack(parts, axis=1).reshape(-1, 3))
    return np.concatenate(pieces)


@pytest.fixture(scope="module")
def unhurried():
    """Without threads that read ahead, of which a property would start hundreds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "THREADS", grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        yield


few = settings(max_examples=10, deadline=None)
steps_strategy = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 7)), min_size=1, max_size=4)


@few
@given(num=st.integers(1, 12), process_count=st.integers(1, 4), batch_size=st.integers(1, 7), seed=st.integers(0, 99))
def test_epochs_are_partitions(unhurried, num, process_count, batch_size, seed):
    """Every example exactly once in each epoch, over all processes; batches run on through the ends of epochs."""
    num_steps = -(-2 * num // (process_count * batch_size))
    stream = make_stream(Healthy(Numbers(num), 0), seed)
    parts = []
    for p in range(process_count):
        with TrainBatches(stream, batch_size, process_index=p, process_count=process_count) as batches:
            parts.append(np.concatenate([next(batches)["image"][:, 0, 0, 0] for _ in range(num_steps)]))
    order = np.stack(parts, axis=1).reshape(-1)
    for epoch in (order[:num], order[num : 2 * num]):
        assert sorted(epoch) == list(range(num))


def test_examples_know_their_place_and_name(data_dir):
    """Over all processes the indices of a batch are 0 to n - 1, and lead to the example's name."""
    labels = {example["id"]: example["label"] for example in open_records(data_dir, "train")}
    indices = []
    for p in range(2):
        with make_train_iterator(data_dir, 3, flip=0.0, process_index=p, process_count=2) as batches:
            batches.seek(12)
            batch, names = next(batches), batches.ids(12, 6)
            indices += batch["index"].tolist()
            for i, label in zip(batch["index"], batch["label"], strict=True):
                np.testing.assert_array_equal(label, labels[names[i]])
    assert sorted(indices) == list(range(6))


@few
@given(num=st.integers(1, 12), steps=steps_strategy, seen=st.integers(0, 50), seed=st.integers(0, 99))
def test_a_run_goes_on_with_other_processes_and_batches(unhurried, num, steps, seen, seed):
    """However the stream is taken, it is the same stream: nothing is lost or repeated, augmentations included."""
    records = Numbers(num)
    found = walk(records, steps, seen, seed)
    np.testing.assert_array_equal(found, walk(records, [(1, seen + len(found))], 0, seed)[seen:])


@few
@given(num=st.integers(2, 12), data=st.data(), steps=steps_strategy)
def test_corrupt_records_give_way_to_the_next(unhurried, num, data, steps):
    corrupt = data.draw(st.sets(st.integers(0, num - 1), min_size=1, max_size=num - 1))
    found = walk(Numbers(num, corrupt), steps, limit=len(corrupt))
    whole = walk(Numbers(num), steps)
    for ours, theirs in zip(found, whole, strict=True):  # every other example, and the place of each, are as without
        wanted = next(i % num for i in range(theirs[0], 2 * num) if i % num not in corrupt)
        assert ours.tolist() == [wanted, *theirs[1:]]


def test_corrupt_records_are_told_of_once_and_counted(caplog):
    stream = make_stream(Healthy(Numbers(10, {3, 4, 8}), 3), 0)
    with TrainBatches(stream, 4, limit=3) as batches, caplog.at_level(logging.WARNING, "semflow_jax"):
        batch = [next(batches) for _ in range(10)][0]
    assert batch.keys() == {"image", "label", "index"}
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"record {i} is corrupt (the next one takes its place)" for i in (3, 4, 8)
    ]
    with TrainBatches(stream, 4, limit=2) as batches, pytest.raises(UserError) as caught:
        [next(batches) for _ in range(10)]
    assert str(caught.value).endswith("is corrupt, or raise data.max_corrupt, by which 2 such records are left out")


def damage(data_dir, tmp_path, **options):
    """A copy of a data set with a byte of its last training record flipped."""
    return corrupt_shard(data_dir, tmp_path / "damaged", "train", **options)


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_damaged_file_in_training(data_dir, tmp_path, caplog, num_workers):
    damaged = damage(data_dir, tmp_path)
    wanted = take(data_dir, 5, 4, num_workers=num_workers)
    with caplog.at_level(logging.WARNING, "semflow_jax"):
        found = take(damaged, 5, 4, num_workers=num_workers, max_corrupt=0.01)
    (message,) = [record.getMessage() for record in caplog.records]
    assert (
        message.startswith(f"{damaged}: train: record ") and "(id unknown) must be whole, found RuntimeError" in message
    )
    bad = int(message.split("record ")[1].split()[0])
    for ours, theirs in zip(found, wanted, strict=True):
        replaced = theirs["image"][:, 0, 0, 0] == bad
        np.testing.assert_array_equal(ours["image"][~replaced], theirs["image"][~replaced])
        assert (ours["image"][replaced][:, 0, 0, 0] == (bad + 1) % NUM).all()
    with pytest.raises(UserError, match="must be whole, .* by which 0 such records are left out") as caught:
        take(damaged, 5, 4, num_workers=num_workers)
    assert "\n" not in str(caught.value)


def test_a_file_cut_short_in_training(data_dir, tmp_path):
    damaged = damage(data_dir, tmp_path, cut=True)
    with pytest.raises(UserError, match="record .* must be whole, .* by which 5 such records are left out"):
        take(damaged, 5, 4, max_corrupt=0.5)


def test_evaluation_has_all_examples_or_none(data_dir, tmp_path):
    damaged = damage(data_dir, tmp_path)
    assert len(list(make_eval_batches(damaged, "val", 4))) == 2
    with pytest.raises(CorruptRecord, match=f"{damaged}: train: record .* must be whole, .*; prepare the data again"):
        list(make_eval_batches(damaged, "train", 4))


def test_records_that_cover_their_size_are_cut_to_it(tmp_path):
    """Without a crop that is asked for: training takes any window, evaluation the one in the middle."""
    examples = []
    for i in range(4):
        image, label = make_pair(i)
        wide = [np.tile(x, (1, 2, 1)[: x.ndim]) for x in (image, label)]
        examples.append({"image": encode(wide[0]), "label": encode(wide[1]), "id": str(i)})
    info = DataInfo(name="wide", class_names=("a", "b", "c"), size=SIZE, fit="cover")
    write_records(tmp_path / "set", info, {"train": examples})
    for batch in take(tmp_path / "set", 2, 3):
        assert batch["image"].shape == (3, *SIZE, 3) and batch["label"].shape == (3, *SIZE, 1)
    (batch,) = make_eval_batches(tmp_path / "set", "train", 4)
    np.testing.assert_array_equal(batch["image"][2], np.roll(make_pair(2)[0], SIZE[1] // 2, axis=1))


def test_flip_happens_as_often_as_asked(data_dir):
    batches = take(data_dir, 40, 10, flip=0.3)
    images = [image for batch in batches for image in batch["image"]]
    flipped = [not np.array_equal(image, make_pair(int(image[0, 0, 0]))[0]) for image in images]
    assert 0.2 < np.mean(flipped) < 0.4  # 400 draws: 0.3 +- 4 standard deviations
    for image in images:
        wanted = make_pair(int(image[0, 0, 0]))[0]
        assert np.array_equal(image, wanted) or np.array_equal(image, wanted[:, ::-1])


@pytest.mark.parametrize(
    ("process_count", "batch_size", "num"), [(1, 3, 7), (1, 7, 7), (2, 2, 7), (3, 1, 7), (2, 8, 7), (2, 2, 3)]
)
def test_eval_is_one_pass_in_order(data_dir, process_count, batch_size, num):
    limit = None if num == 7 else num
    parts = [
        list(make_eval_batches(data_dir, "val", batch_size, process_index=p, process_count=process_count, limit=limit))
        for p in range(process_count)
    ]
    assert {len(part) for part in parts} == {-(-num // (batch_size * process_count))}  # as many for every process
    ids, valid = [], []
    for step in zip(*parts, strict=True):
        for batch in step:
            assert batch["image"].shape == (batch_size, *SIZE, 3) and batch["label"].shape == (batch_size, *SIZE, 1)
            assert batch["valid"].shape == (batch_size,) and batch["valid"].dtype == bool
            assert (batch["label"][~batch["valid"]] == VOID).all() and not batch["image"][~batch["valid"]].any()
            ids += batch["id"]
            valid += batch["valid"].tolist()
            for name, image in zip(batch["id"], batch["image"], strict=True):
                if name:
                    np.testing.assert_array_equal(image, make_pair(int(name[1:]))[0])
    chosen = {7: [0, 1, 2, 3, 4, 5, 6], 3: [0, 2, 4]}[num]  # where there are fewer, they are spread evenly
    assert ids[:num] == [f"n{i}" for i in chosen] and not any(ids[num:])
    assert valid == [bool(name) for name in ids]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: must be at least 1"),
        ({"seed": -1}, "seed: must be"),
        ({"flip": 1.5}, "flip: must be a probability"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale: must be"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale: must be"),
        ({"crop_ratio": 0.5}, "crop_ratio: must be at least 1"),
        ({"jitter": -0.1}, "jitter: must be a strength"),
        ({"max_corrupt": 2.0}, "max_corrupt: must be a share"),
        ({"process_index": 2, "process_count": 2}, "process_index: must be"),
        ({"split": "test"}, "split must be one of train, val"),
    ],
)
def test_bad_arguments(data_dir, options, message):
    with pytest.raises(UserError, match=message):
        make_train_iterator(data_dir, **({"batch_size": 2} | options))


def test_bad_limit(data_dir):
    with pytest.raises(UserError, match="limit: must be at least 1"):
        make_eval_batches(data_dir, "val", 2, limit=0)
