"""data/pipeline.py and data/transforms.py: order, epochs, processes, resuming, augmentation, padding."""

import collections
import functools
import itertools
import json
import pickle

import numpy as np
import pytest
from test_records import encode

from semflow_jax.data.builders import write_records
from semflow_jax.data.info import VOID, DataInfo
from semflow_jax.data.pipeline import make_eval_batches, make_train_iterator
from semflow_jax.data.transforms import RandomFlip, RandomResizedCrop
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


def take(data_dir, num: int, batch_size: int = 1, start: dict | None = None, **options) -> list[dict]:
    batches = make_train_iterator(data_dir, batch_size, **options)
    if start is not None:
        batches.set_state(start)
    taken = [next(batches) for _ in range(num)]
    batches.close()
    return taken


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
        assert batch.keys() == {"image", "label"}
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


@pytest.mark.parametrize("options", [{}, {"crop_scale": (0.3, 1.0)}, {"process_index": 1, "process_count": 3}])
def test_resumes_exactly(data_dir, options):
    batches = make_train_iterator(data_dir, 4, **options)
    for _ in range(5):
        next(batches)
    state = batches.get_state()
    rest = [next(batches) for _ in range(6)]
    assert_equal(take(data_dir, 6, 4, json.loads(json.dumps(state)), **options), rest)
    batches.set_state(state)  # back in time, in the same iterator
    assert_equal([next(batches) for _ in range(6)], rest)
    batches.close()


def test_resumes_on_another_number_of_processes(data_dir):
    batches = make_train_iterator(data_dir, 8)
    for _ in range(3):
        next(batches)
    state = batches.get_state()
    wanted = next(batches)
    parts = [take(data_dir, 1, 4, state, process_index=p, process_count=2)[0] for p in (0, 1)]
    merged = np.stack([part["image"] for part in parts], axis=1).reshape(wanted["image"].shape)
    np.testing.assert_array_equal(merged, wanted["image"])
    batches.close()


@pytest.mark.slow
def test_workers_give_the_same_batches_and_resume(data_dir):
    options = {"crop_scale": (0.5, 1.0)}
    wanted = take(data_dir, 7, 4, **options)
    batches = make_train_iterator(data_dir, 4, num_workers=2, **options)
    assert_equal([next(batches) for _ in range(3)], wanted[:3])
    state = batches.get_state()
    batches.close()
    assert_equal(take(data_dir, 4, 4, state, num_workers=2, **options), wanted[3:])


def test_flip_mirrors_and_swaps_sides():
    image, label = make_pair(3)
    example = {"image": image, "label": label[..., None]}
    flipped = RandomFlip(1.0, ((1, 2),)).random_map(example, np.random.default_rng(0))
    np.testing.assert_array_equal(flipped["image"], image[:, ::-1])
    np.testing.assert_array_equal(flipped["label"][..., 0], label)  # left and right half trade places twice
    unpaired = RandomFlip(1.0).random_map(example, np.random.default_rng(0))
    np.testing.assert_array_equal(unpaired["label"][..., 0], label[:, ::-1])
    again = RandomFlip(1.0, ((1, 2),)).random_map(flipped, np.random.default_rng(0))
    assert_equal([again], [example])


def test_flip_happens_as_often_as_asked(data_dir):
    batches = take(data_dir, 40, 10, flip=0.3)
    images = [image for batch in batches for image in batch["image"]]
    flipped = [not np.array_equal(image, make_pair(int(image[0, 0, 0]))[0]) for image in images]
    assert 0.2 < np.mean(flipped) < 0.4  # 400 draws: 0.3 +- 4 standard deviations
    for image in images:
        wanted = make_pair(int(image[0, 0, 0]))[0]
        assert np.array_equal(image, wanted) or np.array_equal(image, wanted[:, ::-1])


def test_crop_moves_image_and_label_together():
    label = np.zeros((48, 64), np.uint8)
    label[10:30, 20:50], label[25:, :15] = 90, 200
    example = {"image": np.repeat(label[..., None], 3, -1), "label": label[..., None]}
    crop = RandomResizedCrop((0.2, 1.0))
    seen = set()
    for seed in range(30):
        out = crop.random_map(example, np.random.default_rng(seed))
        image, cropped = out["image"], out["label"][..., 0]
        assert image.shape == (48, 64, 3) and set(np.unique(cropped)) <= {0, 90, 200}  # nearest: no ids between ids
        inner = np.ones(cropped.shape, bool)
        for shift in itertools.product(range(-3, 4), repeat=2):
            inner &= cropped == np.roll(cropped, shift, (0, 1))
        assert inner.mean() > 0.2
        np.testing.assert_array_equal(image[..., 0][inner], cropped[inner])
        seen.add(cropped.tobytes())
    assert len(seen) > 20


def test_crop_share_of_the_area():
    """A ramp tells how much of the width and the height is left."""
    ramp = np.stack(np.meshgrid(np.arange(200), np.arange(100)), axis=-1).astype(np.uint8)
    example = {"image": np.dstack([ramp, ramp[..., :1]]), "label": np.zeros((100, 200, 1), np.uint8)}
    out = RandomResizedCrop((0.25, 0.25)).random_map(example, np.random.default_rng(0))["image"].astype(int)
    assert abs(np.ptp(out[..., 0]) - 100) <= 2 and abs(np.ptp(out[..., 1]) - 50) <= 2
    whole = RandomResizedCrop((1.0, 1.0)).random_map(example, np.random.default_rng(0))
    assert_equal([whole], [example])


def test_transforms_are_picklable_and_repeatable():
    image, label = make_pair(1)
    example = {"image": image, "label": label[..., None]}
    for transform in (RandomFlip(0.5, ((1, 2),)), RandomResizedCrop((0.5, 0.9))):
        copy = pickle.loads(pickle.dumps(transform))
        assert copy == transform
        assert_equal(
            [transform.random_map(example, np.random.default_rng(4))],
            [copy.random_map(example, np.random.default_rng(4))],
        )


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
