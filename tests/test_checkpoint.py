"""train/checkpoint.py: what is kept, what is restored, and what happens when a file is broken."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_folder import make_folder

from semflow_jax.data.pipeline import make_train_iterator
from semflow_jax.data.prepare import prepare
from semflow_jax.errors import UserError
from semflow_jax.train.checkpoint import Checkpoints


def make_state(step: int):
    return {
        "step": jnp.int32(step),
        "params": {"a.weight": jnp.arange(6.0).reshape(2, 3) * step, "b.bias": jnp.ones(3, jnp.bfloat16) * step},
        "opt_state": (jnp.float32(step), {"mu": jnp.full(4, step)}),
    }


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype, found, expected))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint")
    prepare("folder", root / "data", source=make_folder(root / "toys", 20), size=(4, 6), progress=False)
    return root / "data"


@pytest.fixture
def iterator(data_dir):
    with make_train_iterator(data_dir, 2) as batches:
        yield batches


@pytest.fixture
def saved(tmp_path, iterator):
    """Steps 1 to 5, of which 2 was the best; returns the batches that follow steps 4 and 5."""
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 6):
        next(iterator)
        checkpoints.save(make_state(step), iterator, {"miou": 1 - abs(step - 2) / 10})
    checkpoints.close()
    return tmp_path


def break_checkpoint(workdir, step: int):
    """Cuts every array file of the state in half, as a full disk or a crash would."""
    files = [f for f in (workdir / "checkpoints" / str(step) / "state").rglob("*") if f.is_file() and "/d/" in str(f)]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def restore(workdir, iterator=None):
    checkpoints = Checkpoints(workdir)
    try:
        return checkpoints.restore(jax.tree.map(jnp.zeros_like, make_state(0)), iterator)
    finally:
        checkpoints.close()


def test_nothing_to_restore(tmp_path):
    assert restore(tmp_path) is None


def test_keeps_the_newest_two_and_the_best(saved):
    assert sorted(int(path.name) for path in (saved / "checkpoints").iterdir()) == [2, 4, 5]


def test_restores_the_newest_bit_by_bit(saved):
    assert_equal(restore(saved), make_state(5))


def test_restores_from_shapes_alone(saved):
    checkpoints = Checkpoints(saved)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), make_state(0))
    assert_equal(checkpoints.restore(shapes), make_state(5))
    checkpoints.close()


def test_checkpoints_without_metrics_are_never_the_best(tmp_path, iterator):
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 6):
        checkpoints.save(make_state(step), iterator, {"miou": 0.5} if step == 1 else None)
    checkpoints.close()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [1, 4, 5]


def test_the_iterator_goes_on_where_it_was(data_dir, saved):
    expected = make_train_iterator(data_dir, 2)
    batches = [next(expected) for _ in range(8)]
    resumed = make_train_iterator(data_dir, 2)
    next(resumed)
    restore(saved, resumed)
    assert resumed.seen == 10
    for batch in batches[5:]:
        jax.tree.map(np.testing.assert_array_equal, next(resumed), batch)
    assert any((batches[5]["image"] != batch["image"]).any() for batch in batches[:5])


def test_the_position_is_one_number(saved):
    """Whoever goes on, with however many processes and examples at a time, understands it."""
    assert json.loads((saved / "checkpoints" / "5" / "data" / "metadata").read_text()) == {"seen": 10}


def test_a_broken_newest_gives_way_to_the_one_before(data_dir, saved, caplog):
    break_checkpoint(saved, 5)
    resumed = make_train_iterator(data_dir, 2)
    with caplog.at_level(logging.WARNING, "semflow_jax"):
        assert_equal(restore(saved, resumed), make_state(4))
    first, second = [record.getMessage() for record in caplog.records if record.name.startswith("semflow_jax")]
    assert first.startswith("checkpoint 5 of ") and "can't be read" in first and "\n" not in first
    assert second == f"moved checkpoint 5 to {saved / 'unreadable'}"
    (aside,) = (saved / "unreadable").iterdir()  # nothing is lost
    assert aside.name.startswith("5-") and (aside / "state").is_dir()
    expected = make_train_iterator(data_dir, 2)
    batches = [next(expected) for _ in range(5)]
    jax.tree.map(np.testing.assert_array_equal, next(resumed), batches[4])


@pytest.mark.parametrize("next_step", [5, 6])
def test_a_run_that_fell_back_saves_again(saved, iterator, next_step):
    """Also at the step of the broken one, which it replaces."""
    break_checkpoint(saved, 5)
    checkpoints = Checkpoints(saved)
    checkpoints.restore(make_state(0))
    checkpoints.save(make_state(next_step), iterator)
    checkpoints.close()
    assert_equal(restore(saved), make_state(next_step))


def test_all_broken(saved, caplog):
    for step in (2, 4, 5):
        break_checkpoint(saved, step)
    with pytest.raises(UserError) as caught:
        restore(saved)
    message = str(caught.value)
    assert "none of steps [5, 4, 2] is" in message and "\n" not in message
    assert [record.getMessage()[:12] for record in caplog.records if record.name.startswith("semflow_jax")] == [
        "checkpoint 5",
        "checkpoint 4",
        "checkpoint 2",
    ]


def test_another_configs_shapes_are_refused_and_nothing_is_lost(saved):
    checkpoints = Checkpoints(saved)
    other = make_state(0) | {"params": {"a.weight": jnp.zeros((5, 3)), "b.bias": jnp.zeros(3, jnp.bfloat16)}}
    with pytest.raises(UserError, match="whole and of this config's shapes"):
        checkpoints.restore(other)
    checkpoints.close()
    assert_equal(restore(saved), make_state(5))


def test_a_half_written_checkpoint_is_no_checkpoint(saved):
    """What a kill in the middle of writing leaves."""
    newest = saved / "checkpoints" / "5"
    newest.rename(newest.with_name("5.orbax-checkpoint-tmp"))
    assert_equal(restore(saved), make_state(4))


def test_a_step_is_saved_once(tmp_path, iterator):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(3), iterator)
    checkpoints.save(make_state(3), iterator)
    checkpoints.wait()
    assert checkpoints.manager.all_steps() == [3]
    checkpoints.close()
