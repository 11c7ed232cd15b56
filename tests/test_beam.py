"""data/beam.py: what an Apache Beam pipeline prepares is what the process pool does."""

import collections
import functools
import json
import os
import sys

import pytest
import tensorflow_datasets as tfds
from test_folder import make_folder

from semflow_jax.data import beam, prepare
from semflow_jax.data.inspect import inspect
from semflow_jax.data.records import count_records, load_info
from semflow_jax.errors import UserError

SIZE = (16, 24)
IN_MEMORY = "--runner=DirectRunner"
PROCESSES = "--runner=DirectRunner --direct_num_workers=2 --direct_running_mode=multi_processing"


@pytest.fixture
def needs_beam():
    pytest.importorskip("apache_beam", reason="apache-beam is not installed")


def run(root, out_dir, engine="beam", beam_options=IN_MEMORY, **options):
    if engine == "beam":
        options |= {"beam_options": beam_options}
    return prepare.prepare("folder", out_dir, source=root, size=SIZE, engine=engine, progress=False, **options)


def read_bytes(out_dir, split):
    """Image and label of each record, as they are stored, by id."""
    encoded = {name: tfds.decode.SkipDecoding() for name in ("image", "label")}
    records = tfds.builder_from_directory(out_dir).as_data_source(split, decoders=encoded)
    return {record["id"]: (record["image"], record["label"]) for record in records}


def fail(*_, **options):
    raise AssertionError("called again")


def check_equal(left, right):
    """Two prepared folders with the same facts and records, however they are ordered and divided."""
    facts = [load_info(out_dir).replace(checksums={}) for out_dir in (left, right)]
    assert facts[0] == facts[1] and count_records(left) == count_records(right)
    for split in facts[0].pixels:
        assert read_bytes(left, split) == read_bytes(right, split)
    infos = [json.loads((out_dir / "dataset_info.json").read_text()) for out_dir in (left, right)]
    for info in infos:
        for split in info["splits"]:
            del split["shardLengths"]
    assert infos[0] == infos[1]
    assert (left / "features.json").read_text() == (right / "features.json").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("needs_beam")
def test_records_and_facts_are_those_of_the_pool(tmp_path, monkeypatch):
    """In three shards, without a bad file, which is counted."""
    counted: collections.Counter = collections.Counter()
    monkeypatch.setattr(beam, "_count", lambda name, num: counted.update({name: num}))
    config = functools.partial(tfds.download.DownloadConfig, num_shards=3)
    monkeypatch.setattr(tfds.download, "DownloadConfig", config)
    root = make_folder(tmp_path / "toys", 40)
    (root / "labels" / "07.png").write_bytes(b"<html>")
    with pytest.raises(UserError, match="07.png: must be a whole image file"):
        run(root, tmp_path / "beam")
    assert sorted(os.listdir(tmp_path)) == ["beam.partial", "toys"]
    info = run(root, tmp_path / "beam", max_skipped=0.1)
    assert counted == {"read": 40, "skipped": 1, "written": 39}  # the check was done already
    assert info == load_info(tmp_path / "beam") and info.class_names == ("class_0", "class_1", "class_2")
    assert len(list((tmp_path / "beam").glob("*train*"))) == 3
    assert list(json.loads((tmp_path / "beam" / prepare.SKIPPED).read_text())) == ["07"]
    inspect(tmp_path / "beam", verify=True)
    run(root, tmp_path / "pool", "pool", max_skipped=0.1)
    check_equal(tmp_path / "beam", tmp_path / "pool")
    assert sorted(os.listdir(tmp_path)) == ["beam", "pool", "toys"]
    assert run(root, tmp_path / "pool", max_skipped=0.1) == load_info(tmp_path / "pool")  # whoever made it


@pytest.mark.slow
@pytest.mark.usefixtures("needs_beam")
def test_a_stopped_preparation_leaves_nothing_and_goes_on(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "toys", 20)

    def stop(path):
        assert path.is_file() and not (tmp_path / "beam").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(beam, "digest_file", stop)
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "beam")
    assert sorted(os.listdir(tmp_path)) == ["beam.partial", "toys"]
    monkeypatch.undo()
    monkeypatch.setattr(prepare, "check_items", fail)  # that was done
    run(root, tmp_path / "beam")
    assert sum(count_records(tmp_path / "beam").values()) == 20


@pytest.mark.slow
@pytest.mark.usefixtures("needs_beam")
def test_two_worker_processes(tmp_path):
    """In processes of their own, which take what they need from the pipeline alone."""
    root = make_folder(tmp_path / "toys", 30)
    (root / "labels" / "07.png").write_bytes(b"<html>")
    run(root, tmp_path / "beam", beam_options=PROCESSES, max_skipped=0.1)
    run(root, tmp_path / "pool", "pool", max_skipped=0.1)
    check_equal(tmp_path / "beam", tmp_path / "pool")


@pytest.mark.usefixtures("needs_beam")
@pytest.mark.parametrize("text", ["--direct_num_workers=two", "--runner='"])
def test_bad_options(text):
    with pytest.raises(UserError, match="beam_options: must be options of Apache Beam, got .*; correct them"):
        beam.make_options(text)


def test_engines_are_checked(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "toys")
    with pytest.raises(UserError, match="engine: must be one of pool, beam, got 'spark'"):
        run(root, tmp_path / "out", "spark")
    with pytest.raises(UserError, match="beam_options: only the engine beam has some"):
        prepare.prepare("folder", tmp_path / "out", source=root, beam_options=IN_MEMORY)
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"engine: beam needs Apache Beam, .*pip install 'semflow_jax\[beam\]'"):
        run(root, tmp_path / "out")
    assert os.listdir(tmp_path) == ["toys"]
