"""Records -> batches, with grain: per process, numpy, one order for every number of processes and workers.

Training walks one endless stream: all epochs one after another, shuffled and augmented. A position in it is the number
of examples that all processes together have seen. It means the same for every number of processes and workers and every
batch size, so a run may go on with others, without an example lost or repeated.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.sources import RandomAccessDataSource
from jaxtyping import Float

from semflow_jax.data import transforms
from semflow_jax.data.balance import Balanced, example_weights, find_classes
from semflow_jax.data.info import VOID, DataInfo
from semflow_jax.data.records import Records, load_info, open_healthy, open_records, spread_indices, too_many
from semflow_jax.errors import UserError

log = logging.getLogger(__name__)

# The elements that grain buffers are whole batches here, so a few are plenty; its defaults would hold 500 of them.
NUM_THREADS = max(2, min(4, os.cpu_count() or 1))
THREADS = grain.ReadOptions(num_threads=NUM_THREADS, prefetch_buffer_size=NUM_THREADS)
THREADS_OF_WORKER = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


class TrainBatches:
    """Endless batches {"image": uint8 [b h w 3], "label": uint8 [b h w 1], "index": int32 [b]} of a stream; read ahead
    in the background. Of a cache of latents they hold "mean", and "std" of codecs that have one, float16 [b hz wz c],
    for the image, "mask" beside the label where latents of masks are kept, see `latents.py`, and "draw", int32 [b],
    where a flow's own latents are kept, see `transforms.OwnPair`. The index is an example's place in the batch of all
    processes.

    Process p of n takes every n-th example, from p on: what all of them get at a time are the next examples of the
    stream. Close it, or use it as a context; worker processes end then.

    Attributes:
        seen: examples of the stream that all processes together have been handed; equal on all of them.
    """

    def __init__(
        self,
        stream: grain.MapDataset,
        batch_size: int,
        *,
        num_workers: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        limit: int = 0,
    ):
        """Takes an infinite stream, and how many records may be corrupt."""
        _check_processes(batch_size, process_index, process_count)
        self.seen = 0
        self._stream = stream
        self._index = np.arange(batch_size, dtype=np.int32) * process_count + process_index
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._process_index = process_index
        self._process_count = process_count
        self._limit = limit
        self._corrupt: set[str] = set()
        self._iterator: grain.DatasetIterator | None = None

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            self._iterator = self._open()
        batch = next(self._iterator)
        self._note(batch.pop("corrupt"))
        self.seen += self._batch_size * self._process_count
        return batch | {"index": self._index}

    def ids(self, first: int, num: int) -> list[str]:
        """Names of `num` examples of the stream."""
        return [self._stream[k]["id"] for k in range(first, first + num)]

    def seek(self, seen: int) -> None:
        """Goes to a position, at once however far; what was read ahead is forgotten."""
        self.close()
        self.seen = seen

    def close(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None

    def __enter__(self) -> "TrainBatches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> grain.DatasetIterator:
        # Grain's generators are keyed by position in the stream: sliced any earlier, all processes would flip alike.
        examples = self._stream[self.seen + self._process_index :: self._process_count]
        batches = examples.map(_without_id).batch(self._batch_size, drop_remainder=True)
        if not self._num_workers:
            return iter(batches.to_iter_dataset(THREADS))
        if (
            not flags.FLAGS.is_parsed()
        ):  # grain reads absl flags when it starts workers, also where there is no absl app
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(self._num_workers)
        return iter(batches.to_iter_dataset(THREADS_OF_WORKER).mp_prefetch(workers))

    def _note(self, messages: np.ndarray) -> None:
        """Tells of every corrupt record once, and counts them."""
        for message in "\n".join(messages[messages != ""]).splitlines():
            if message in self._corrupt:
                continue
            self._corrupt.add(message)
            if len(self._corrupt) > self._limit:
                raise too_many(message, self._limit)
            log.warning("%s (the next one takes its place)", message)


def make_train_iterator(
    data_dir: str | os.PathLike,
    batch_size: int,
    *,
    seed: int = 0,
    balance: float = 0.0,
    flip: float = 0.5,
    crop_scale: tuple[float, float] | None = None,
    crop_ratio: float = 1.0,
    jitter: float = 0.0,
    share: float = 0.0,
    max_corrupt: float = 0.0,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    split: str = "train",
) -> TrainBatches:
    """Endless batches of a prepared folder, or of its latents, in a new order each epoch: see `TrainBatches`.

    Args:
        data_dir: a prepared folder.
        batch_size: examples per batch and process.
        seed: of the order and the augmentations, 0 <= seed < 2**32.
        balance: how much more often examples with rare classes come, in [0, 1], see `balance.py`; 0: all alike.
        flip: probability of a mirror image.
        crop_scale: share of the area that a random crop keeps, (smallest, largest); None leaves cropping out.
        crop_ratio: how much wider or narrower than the image a crop may be, at least 1.
        jitter: strength of random changes of the image's colours, in [0, 1]; 0 leaves them out.
        share: of a flow's own pairs, where those are kept.
        max_corrupt: share of the split that may be corrupt, in [0, 1], rounded up to one record; such a record is told
            of, and the next takes its place. 0: the first one ends the run.
        num_workers: worker processes; 0 reads with threads, which is enough for small images.

    Raises:
        UserError: not a prepared folder, or an argument out of range; by `next`, more corrupt records than allowed.
    """
    _check_processes(batch_size, process_index, process_count)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed: must be at least 0 and below 2**32, got {seed}; choose another")
    if not 0 <= balance <= 1:
        raise UserError(f"balance: must be an exponent in [0, 1], got {balance}; 0.5 is usual")
    if not 0 <= flip <= 1:
        raise UserError(f"flip: must be a probability in [0, 1], got {flip}; 0.5 is usual")
    if crop_scale is not None and not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise UserError(f"crop_scale: must be 0 < smallest <= largest <= 1, got {crop_scale}; (0.5, 1.0) is usual")
    if crop_ratio < 1:
        raise UserError(f"crop_ratio: must be at least 1, got {crop_ratio}; 1.33 is usual")
    if not 0 <= jitter <= 1:
        raise UserError(f"jitter: must be a strength in [0, 1], got {jitter}; 0.2 is usual")
    records = open_healthy(data_dir, split, max_corrupt)
    augmentations = make_augmentations(load_info(data_dir), flip, crop_scale, crop_ratio, jitter, share)
    weights = example_weights(find_classes(data_dir, split, process_index == 0), balance) if balance else None
    return TrainBatches(
        make_stream(records, seed, augmentations, weights),
        batch_size,
        num_workers=num_workers,
        process_index=process_index,
        process_count=process_count,
        limit=records.limit,
    )


def make_stream(
    records: RandomAccessDataSource,
    seed: int,
    augmentations: Sequence[grain.transforms.RandomMap] = (),
    weights: Float[np.ndarray, " n"] | None = None,
) -> grain.MapDataset:
    """All epochs of some records, one after another, each in an order of its own.

    An example, its augmentations included, depends on its position and the seed only.

    Args: weights: how often the records come, see `balance.py`; None: once an epoch.
    """
    stream = grain.MapDataset.source(records)
    if weights is not None:
        stream = Balanced(stream, weights, seed)
    stream = stream.seed(seed).shuffle().repeat()
    for augmentation in augmentations:
        stream = stream.random_map(augmentation)
    return stream


def make_augmentations(
    info: DataInfo,
    flip: float,
    crop_scale: tuple[float, float] | None,
    crop_ratio: float,
    jitter: float,
    share: float = 0.0,
) -> list[grain.transforms.RandomMap]:
    """What happens to an example, in this order; records that are larger than their data set's size are cut always.

    Raises:
        UserError: crops or colours of latents.
    """
    if info.latent is not None:
        check_only_flips("data.latents", crop_scale, jitter)
        pairs = [transforms.OwnPair(share)] if "own" in info.latent else []
        return [transforms.LatentFlip(flip, info.flip_pairs), *pairs]
    if crop_scale is None and info.fit == "cover":
        crop_scale = (1.0, 1.0)
    augmentations: list[grain.transforms.RandomMap] = []
    if crop_scale is not None:
        augmentations.append(transforms.RandomResizedCrop(info.size, tuple(crop_scale), crop_ratio))
    if flip:
        augmentations.append(transforms.RandomFlip(flip, info.flip_pairs))
    if jitter:
        augmentations.append(transforms.ColourJitter(jitter))
    return augmentations


def check_only_flips(key: str, crop_scale: tuple[float, float] | None, jitter: float) -> None:
    """Raises `UserError` for crops or colours, which what `key` keeps of an image doesn't have."""
    if crop_scale is not None or jitter:
        found = f"crop_scale {crop_scale}, jitter {jitter}"
        raise UserError(f"{key}: only flips are possible with it, found {found}; leave those out")


def make_eval_batches(
    data_dir: str | os.PathLike,
    split: str,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    limit: int | None = None,
    first: int = 0,
) -> grain.DatasetIterator:
    """One pass over a split, in order: {"image", "label", "valid": bool [b], "index": int32 [b], "id": list of b str}.

    Every process gets the same number of batches. Batch k of all processes, one after another, is the k-th piece of the
    split; where it ends, batches are padded with black images, void labels, `valid` False and empty ids.

    Args:
        limit: so many examples, evenly over the split, for neighbours are often alike; None takes all.
        first: the batch to begin with.

    Raises:
        UserError: not a prepared folder, no such split, or an argument out of range; by `next`, a corrupt record:
            figures are of all examples or of none.
    """
    _check_processes(batch_size, process_index, process_count)
    if limit is not None and limit < 1:
        raise UserError(f"limit: must be at least 1 or None, got {limit}; None takes all")
    records, size = open_records(data_dir, split), load_info(data_dir).size
    chosen = spread_indices(len(records), limit or len(records))
    global_batch = batch_size * process_count
    starts = range(process_index * batch_size, -(-len(chosen) // global_batch) * global_batch, global_batch)

    def load(k: int) -> dict[str, Any]:
        return _padded_batch(records, chosen, starts[k], batch_size, size)

    return iter(grain.MapDataset.range(min(first, len(starts)), len(starts)).map(load).to_iter_dataset(THREADS))


def _padded_batch(
    records: Records, chosen: list[int], start: int, batch_size: int, size: tuple[int, int]
) -> dict[str, Any]:
    examples = [transforms.crop_centre(records[i], size) for i in chosen[start : start + batch_size]]
    void = {"image": np.zeros((*size, 3), np.uint8), "label": np.full((*size, 1), VOID, np.uint8), "id": ""}
    padded = examples + (batch_size - len(examples)) * [void]
    return {
        "image": np.stack([example["image"] for example in padded]),
        "label": np.stack([example["label"] for example in padded]),
        "valid": np.arange(len(padded)) < len(examples),
        "index": np.arange(start, start + batch_size, dtype=np.int32),
        "id": [example["id"] for example in padded],
    }


def _without_id(example: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in example.items() if name != "id"}


def _check_processes(batch_size: int, process_index: int, process_count: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size: must be at least 1, got {batch_size}; it counts examples per process")
    if not 0 <= process_index < process_count:
        rule = f"must be at least 0 and below process_count, {process_count}"
        raise UserError(f"process_index: {rule}, got {process_index}; pass jax.process_index()")
