"""A map over many items that outlives a stop: they pass in chunks, and each chunk leaves its result on disk.

A result is filed under a digest of the work and of its items, files' sizes and times among them. So the same call goes
on where it was stopped, and does again exactly what has changed since.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import filelock
from tqdm import tqdm

from semflow_jax.data.source import Item

ChunkFn = Callable[[Sequence[Item], pathlib.Path], dict[str, Any]]
WORTH_WORKERS = 300  # items that are done while worker processes start


class Chunks:
    """Runs functions of (items, path) in worker processes and keeps what they return, a JSON object, in `workdir`.

    Where a `suffix` is given, the function also writes the file `path`, which is kept beside its result.

    Args:
        workdir: a folder; whoever made it may delete it when everything is done.
        num_workers: processes; 1 works in this one.
        progress: show bars.
    """

    def __init__(self, workdir: pathlib.Path, num_workers: int, progress: bool = True):
        self.workdir = workdir
        self.num_workers = num_workers
        self.progress = progress
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> "Chunks":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(
        self, function: ChunkFn, items: Sequence[Item], chunk_size: int, key: str, title: str, suffix: str = ""
    ) -> list[tuple[dict[str, Any], pathlib.Path]]:
        """Results, and their files, in the order of the items.

        Args:
            key: what the results depend on besides the items.
            title: of the progress bar.
        """
        chunks = [items[start : start + chunk_size] for start in range(0, len(items), chunk_size)]
        places = [self.workdir / _digest(key, chunk) for chunk in chunks]
        # A file is renamed before its result is written, so a result vouches for its file unless that was moved on.
        done = [_result(place).is_file() and (not suffix or _file(place, suffix).is_file()) for place in places]
        todo = [(chunk, place) for chunk, place, is_done in zip(chunks, places, done, strict=True) if not is_done]
        num_done = len(items) - sum(len(chunk) for chunk, _ in todo)
        with tqdm(total=len(items), initial=num_done, desc=title, unit="img", disable=not self.progress) as bar:
            for count in self._run(function, todo, suffix):
                bar.update(count)
        return [(json.loads(_result(place).read_text()), _file(place, suffix)) for place in places]

    def _run(
        self, function: ChunkFn, todo: Sequence[tuple[Sequence[Item], pathlib.Path]], suffix: str
    ) -> Iterator[int]:
        if self.num_workers == 1 or len(todo) < 2 or sum(len(chunk) for chunk, _ in todo) < WORTH_WORKERS:
            yield from (run_chunk(function, *task, suffix) for task in todo)
            return
        if self._pool is None:
            # A fork would copy the locks of this process's threads as they happen to stand.
            spawn = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(self.num_workers, spawn, _follow_parent)
        waiting: set[concurrent.futures.Future[int]] = set()
        tasks = iter(todo)
        with contextlib.suppress(StopIteration):
            while True:
                while len(waiting) < 2 * self.num_workers:
                    waiting.add(self._pool.submit(run_chunk, function, *next(tasks), suffix))
                done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in concurrent.futures.as_completed(waiting))


def run_chunk(function: ChunkFn, chunk: Sequence[Item], place: pathlib.Path, suffix: str) -> int:
    """Leaves the result, and the file, at `place`; the number of items."""
    temp = place.with_name(f"{place.name}.tmp-{os.getpid()}")
    result = function(chunk, temp)
    if suffix:
        temp.rename(_file(place, suffix))
    temp.write_text(json.dumps(result))
    temp.rename(_result(place))
    return len(chunk)


@contextlib.contextmanager
def alone(partial: pathlib.Path) -> Iterator[None]:
    """Makes the folder, and keeps other processes out while this one works in it."""
    lock = filelock.FileLock(partial / "lock")
    waiting = False
    while not lock.is_locked:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0.5 if waiting else 0)
        except filelock.Timeout:
            if not waiting:
                print(f"{partial}: another process is at it, waiting")
            waiting = True
        except FileNotFoundError:  # the other has finished, and the folder is no more
            pass
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            (partial / "lock").unlink(missing_ok=True)
            partial.rmdir()  # where nothing was done in it


def _digest(key: str, chunk: Sequence[Item]) -> str:
    return hashlib.sha256("\n".join((key, *(item.stamp() for item in chunk))).encode()).hexdigest()[:24]


def _result(place: pathlib.Path) -> pathlib.Path:
    return place.with_name(f"{place.name}.json")


def _file(place: pathlib.Path, suffix: str) -> pathlib.Path:
    return place.with_name(f"{place.name}{suffix}")


def _follow_parent() -> None:
    """Leaves Ctrl-C to the parent, and ends when the parent ends, however that comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
