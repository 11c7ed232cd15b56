"""The engine of `semflow prepare --engine beam`: its work goes to the workers of an Apache Beam pipeline.

The check runs in the same chunks as in the process pool, and its results outlive a stop as they do there. The records
are written by a TFDS builder. That shuffles them by a hash of their names, so a set has the records (names, bytes) that
the process pool writes, but in another order and in other shards; a stopped writing starts over.

DirectRunner works on this machine. Workers elsewhere must see the source and the output under the same paths, and have
semflow_jax installed.
"""

import contextlib
import functools
import importlib
import io
import json
import pathlib
import shlex
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

from semflow_jax.data.builders import Shards, digest_file, make_features
from semflow_jax.data.chunks import ChunkFn, Chunks, run_chunk
from semflow_jax.data.examples import Reader, count_ids, encode_example, fit_pair
from semflow_jax.data.info import DataInfo
from semflow_jax.data.source import Item, Source
from semflow_jax.errors import UserError

NAMESPACE = "semflow"  # of the counters that runners show: read, skipped, written


class BeamChunks(Chunks):
    """`Chunks` whose functions run in a pipeline.

    Args:
        options: Beam's, as on a command line: "--runner=DirectRunner --direct_num_workers=4 ...".

    Raises:
        UserError: Apache Beam is not installed, or it does not take the options.
    """

    def __init__(self, workdir: pathlib.Path, options: str, progress: bool = True):
        super().__init__(workdir, 1, progress)
        self.options = make_options(options)

    def _run(
        self, function: ChunkFn, todo: Sequence[tuple[Sequence[Item], pathlib.Path]], suffix: str
    ) -> Iterator[int]:
        if todo:
            beam = _import("apache_beam")
            with beam.Pipeline(options=self.options) as pipeline:
                run = functools.partial(run_chunk, functools.partial(_counted, function=function), suffix=suffix)
                _ = pipeline | beam.Create(todo) | beam.Reshuffle() | beam.MapTuple(run)
        yield sum(len(chunk) for chunk, _ in todo)


class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """The examples of a source as TFDS makes a data set of them.

    Args:
        data_dir: where it goes, as pictures/1.0.0.
        counts: a file for the pixels by class id of every split.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded; looking for a list of it takes a package that TFDS does not bring

    def __init__(self, raw: Source, info: DataInfo, data_dir: pathlib.Path, counts: pathlib.Path):
        self._raw = raw
        self._facts = info
        self._counts = counts
        super().__init__(data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=make_features(self._facts))

    def _split_generators(self, dl_manager: Any, pipeline: Any) -> dict[str, Any]:
        beam = _import("apache_beam")
        made = {split: pipeline | split >> self._generate_examples(split) for split in self._raw.splits}
        write = functools.partial(_write_counts, path=self._counts)
        pixels = [outputs.pixels for outputs in made.values()]
        _ = pixels | beam.Flatten() | beam.CombinePerKey(sum) | beam.combiners.ToList() | "pixels" >> beam.Map(write)
        return {split: outputs.examples for split, outputs in made.items()}

    def _generate_examples(self, split: str) -> Any:
        """A transform that makes (name, example), and beside them (split, pixels by class id)."""
        beam = _import("apache_beam")
        size, fit = self._facts.size, self._facts.fit
        make = functools.partial(_make_example, split=split, read=self._raw.read, size=size, fit=fit)
        make_all = beam.FlatMap(make).with_outputs("pixels", main="examples")
        return beam.Create(list(self._raw.splits[split])) | beam.Reshuffle() | make_all


def write_shards(raw: Source, info: DataInfo, chunks: BeamChunks) -> Shards:
    """The shards of every split; of a split's facts, its bytes and its pixels by class id are with its first shard."""
    folder = chunks.workdir / "beam"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    counts = folder / "pixels.json"
    builder = Pictures(raw, info, folder, counts)
    config = tfds.download.DownloadConfig(beam_options=chunks.options, try_download_gcs=False)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS tells of a download, and of a place that is not the last
        builder.download_and_prepare(download_config=config, file_format="array_record")
    pixels = json.loads(counts.read_text())
    shards = {}
    for name, split in builder.info.splits.items():
        totals = [{"num_bytes": split.num_bytes, "pixels": pixels[name]}]
        totals += [{"num_bytes": 0, "pixels": [0] * 256}] * (split.num_shards - 1)
        shards[name] = [
            (total | {"num": num, "sha256": digest_file(path)}, path)
            for total, num, path in zip(totals, split.shard_lengths, map(pathlib.Path, split.filepaths), strict=True)
        ]
    return shards


def make_options(text: str) -> Any:
    """Beam's options from a command line.

    Raises:
        UserError: Apache Beam is not installed, or it does not take them.
    """
    module = _import("apache_beam.options.pipeline_options")
    try:
        options = module.PipelineOptions(shlex.split(text))
        options.get_all_options()
    except (SystemExit, ValueError) as error:  # argparse, shlex
        raise UserError(f"beam_options: must be options of Apache Beam, got {text!r}; correct them") from error
    return options


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        rule = "engine: beam needs Apache Beam"
        raise UserError(f"{rule}, found {error}; pip install 'semflow_jax[beam]' or use the engine pool") from error


def _count(name: str, num: int) -> None:
    _import("apache_beam").metrics.Metrics.counter(NAMESPACE, name).inc(num)


def _counted(items: Sequence[Item], path: pathlib.Path, function: ChunkFn) -> dict[str, Any]:
    result = function(items, path)
    _count("read", len(items))
    _count("skipped", len(result.get("problems", ())))
    return result


def _make_example(item: Item, split: str, read: Reader, size: tuple[int, int], fit: str) -> Iterator[Any]:
    image, label = fit_pair(*read(item), size, fit)
    yield item.name, encode_example(image, label, item.name)
    yield _import("apache_beam").pvalue.TaggedOutput("pixels", (split, count_ids(label)))
    _count("written", 1)


def _write_counts(pixels: Sequence[tuple[str, Int[np.ndarray, "256"]]], path: pathlib.Path) -> None:
    path.write_text(json.dumps({split: counts.tolist() for split, counts in pixels}))
