"""weights/orbax_file.py: parameters in Orbax's format, and the weights of a run that is not finished."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import break_checkpoint, data_dir, iterator  # noqa: F401
from test_pipeline_model import make_tiny_flow

from semflow_jax.errors import UserError
from semflow_jax.pipeline import SemFlow, save_frozen
from semflow_jax.train.checkpoint import Checkpoints
from semflow_jax.weights.orbax_file import load_averaged, load_orbax, save_orbax

PARAMS = {"a.weight": jnp.arange(6.0).reshape(2, 3), "b.bias": jnp.ones(3, jnp.bfloat16) / 3}


def make_abstract(params):
    return {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in params.items()}


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        assert found[path].dtype == x.dtype
        np.testing.assert_array_equal(found[path], x)


def test_round_trip(tmp_path):
    save_orbax(tmp_path / "x.orbax", PARAMS)
    check_same(load_orbax(tmp_path / "x.orbax", make_abstract(PARAMS)), PARAMS)
    later = {path: x + 1 for path, x in PARAMS.items()}
    save_orbax(tmp_path / "x.orbax", later)
    check_same(load_orbax(tmp_path / "x.orbax", make_abstract(PARAMS)), later)


@pytest.mark.parametrize(
    "other",
    [
        PARAMS | {"a.weight": jnp.zeros((2, 4))},
        PARAMS | {"a.weight": jnp.zeros((2, 2))},
        PARAMS | {"c.weight": jnp.zeros(3)},
        {"a.weight": PARAMS["a.weight"]},
    ],
    ids=["longer", "shorter", "more", "fewer"],
)
def test_parameters_of_another_config(tmp_path, other):
    save_orbax(tmp_path / "x.orbax", PARAMS)
    with pytest.raises(UserError, match="x.orbax: a whole checkpoint of this config expected, found") as caught:
        load_orbax(tmp_path / "x.orbax", make_abstract(other))
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(UserError, match="x.orbax: a whole checkpoint of this config expected"):
        load_orbax(tmp_path / "x.orbax", make_abstract(PARAMS))


@pytest.fixture(scope="module")
def flow():
    return make_tiny_flow()


@pytest.fixture
def workdir(flow, tmp_path, iterator):  # noqa: F811
    """A run at its tenth step; what the state holds beside the averaged weights must not matter."""
    save_frozen(tmp_path / "export", flow.config, flow.codec, flow.code, flow.context)
    checkpoints = Checkpoints(tmp_path)
    for step in (9, 10):
        ema = {path: x + step for path, x in flow.params.items()}
        checkpoints.save({"step": jnp.int32(step), "params": flow.params, "ema": ema, "opt_state": (ema,)}, iterator)
    checkpoints.close()
    return tmp_path


def test_a_run_that_is_not_finished(flow, workdir, caplog):
    with caplog.at_level(logging.WARNING):
        opened = SemFlow.from_pretrained(workdir)
    assert f"{workdir} is not finished: these are the weights of step 10" in caplog.text
    check_same(opened.params, {path: x + 10 for path, x in flow.params.items()})
    step, params = load_averaged(workdir / "checkpoints", make_abstract(flow.params))
    assert step == 10
    check_same(params, opened.params)


def test_a_checkpoint_that_is_broken(flow, workdir):
    break_checkpoint(workdir, 10)
    with pytest.raises(UserError, match="checkpoints/10/state: a whole checkpoint of this config expected") as caught:
        SemFlow.from_pretrained(workdir)
    assert "\n" not in str(caught.value)


def test_a_run_without_a_checkpoint(workdir):
    (workdir / "checkpoints").rename(workdir / "gone")
    with pytest.raises(UserError, match="checkpoints: a checkpoint expected, found none yet; wait for the first"):
        SemFlow.from_pretrained(workdir)
