"""Records -> batches, with grain: per process, numpy, one order for every number of processes and workers."""

import os
from typing import Any

import grain
import numpy as np
from absl import flags

from semflow_jax.data import transforms
from semflow_jax.data.info import VOID
from semflow_jax.data.records import Records, load_info, open_records, spread_indices
from semflow_jax.errors import UserError

# The elements that grain buffers are whole batches here, so a few are plenty; its defaults would hold 500 of them.
NUM_THREADS = max(2, min(4, os.cpu_count() or 1))
THREADS = grain.ReadOptions(num_threads=NUM_THREADS, prefetch_buffer_size=NUM_THREADS)
THREADS_OF_WORKER = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


def make_train_iterator(
    data_dir: str | os.PathLike,
    batch_size: int,
    *,
    seed: int = 0,
    flip: float = 0.5,
    crop_scale: tuple[float, float] | None = None,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    split: str = "train",
) -> grain.DatasetIterator:
    """Endless batches {"image": uint8 [b h w 3], "label": uint8 [b h w 1]}, in a new order each epoch.

    All processes walk one shuffled, augmented stream, of which each takes every `process_count`-th example: batch k of
    all of them together depends on `seed` and the global batch size only. `get_state` and `set_state` resume exactly.

    Args:
        data_dir: a prepared folder.
        batch_size: examples per batch and process.
        seed: of the order and the augmentations, 0 <= seed < 2**32.
        flip: probability of a mirror image.
        crop_scale: share of the area that a random crop keeps, (smallest, largest); None leaves cropping out.
        num_workers: worker processes; 0 reads with threads, which is enough for small images. The state of one kind is
            not for the other. With workers, close the iterator.

    Raises:
        UserError: not a prepared folder, or an argument out of range.
    """
    _check_processes(batch_size, process_index, process_count)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed: must be at least 0 and below 2**32, got {seed}; choose another")
    if not 0 <= flip <= 1:
        raise UserError(f"flip: must be a probability in [0, 1], got {flip}; 0.5 is usual")
    if crop_scale is not None and not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise UserError(f"crop_scale: must be 0 < smallest <= largest <= 1, got {crop_scale}; (0.5, 1.0) is usual")
    stream = grain.MapDataset.source(open_records(data_dir, split)).seed(seed).shuffle().repeat().map(_without_id)
    if flip:
        stream = stream.random_map(transforms.RandomFlip(flip, load_info(data_dir).flip_pairs))
    if crop_scale is not None:
        stream = stream.random_map(transforms.RandomResizedCrop(tuple(crop_scale)))
    # Grain's generators are keyed by position in the stream: sliced any earlier, all processes would flip alike.
    batches = stream[process_index::process_count].batch(batch_size, drop_remainder=True)
    if not num_workers:
        return iter(batches.to_iter_dataset(THREADS))
    if not flags.FLAGS.is_parsed():  # grain reads absl flags when it starts workers, also where there is no absl app
        flags.FLAGS.mark_as_parsed()
    return iter(batches.to_iter_dataset(THREADS_OF_WORKER).mp_prefetch(grain.MultiprocessingOptions(num_workers)))


def make_eval_batches(
    data_dir: str | os.PathLike,
    split: str,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    limit: int | None = None,
) -> grain.DatasetIterator:
    """One pass over a split, in order: {"image", "label", "valid": bool [b], "id": list of b str}.

    Every process gets the same number of batches. Batch k of all processes, one after another, is the k-th piece of the
    split; where it ends, batches are padded with black images, void labels, `valid` False and empty ids.

    Args:
        limit: so many examples, evenly over the split, for neighbours are often alike; None takes all.

    Raises:
        UserError: not a prepared folder, no such split, or an argument out of range.
    """
    _check_processes(batch_size, process_index, process_count)
    if limit is not None and limit < 1:
        raise UserError(f"limit: must be at least 1 or None, got {limit}; None takes all")
    records = open_records(data_dir, split)
    chosen = spread_indices(len(records), limit or len(records))
    global_batch = batch_size * process_count
    starts = range(process_index * batch_size, -(-len(chosen) // global_batch) * global_batch, global_batch)

    def load(k: int) -> dict[str, Any]:
        return _padded_batch(records, chosen[starts[k] : starts[k] + batch_size], batch_size)

    return iter(grain.MapDataset.range(len(starts)).map(load).to_iter_dataset(THREADS))


def _padded_batch(records: Records, indices: list[int], size: int) -> dict[str, Any]:
    examples = [records[i] for i in indices]
    missing = size - len(examples)
    shape = (examples or [records[0]])[0]["image"].shape[:2]
    void = {"image": np.zeros((*shape, 3), np.uint8), "label": np.full((*shape, 1), VOID, np.uint8), "id": ""}
    padded = examples + missing * [void]
    return {
        "image": np.stack([example["image"] for example in padded]),
        "label": np.stack([example["label"] for example in padded]),
        "valid": np.arange(len(padded)) < len(examples),
        "id": [example["id"] for example in padded],
    }


def _without_id(example: dict[str, Any]) -> dict[str, Any]:
    return {"image": example["image"], "label": example["label"]}


def _check_processes(batch_size: int, process_index: int, process_count: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size: must be at least 1, got {batch_size}; it counts examples per process")
    if not 0 <= process_index < process_count:
        rule = f"must be at least 0 and below process_count, {process_count}"
        raise UserError(f"process_index: {rule}, got {process_index}; pass jax.process_index()")
