"""configs/: each recipe of a data set trains, from the files as they are downloaded."""

import importlib

import jax
import numpy as np
import pytest
import raw_trees
from jax.sharding import Mesh

from configs import base
from semflow_jax import parallel
from semflow_jax.models.build import abstract_unet
from semflow_jax.train import loop
from semflow_jax.train.optim import make_optimizer
from semflow_jax.train.setup import check_mesh, check_values, make_setup
from semflow_jax.train.step import make_state, make_train_step
from semflow_jax.train.writer import read_metrics

SMALL = {
    "batch_size": 2,
    "num_steps": 2,
    "log_every": 1,
    "checkpoint_every": 1,
    "data.num_train": 8,
    "data.num_val": 2,
    "data.num_workers": 0,
    "eval.batch_size": 2,
    "eval.limit": 2,
    "sampling.steps": 1,
}


def load(name: str, **changes):
    c = importlib.import_module(f"configs.{name}").get_config()
    with c.unlocked():
        c.update_from_flattened_dict(changes)
    return c


def prepare(name: str, size: tuple[int, int], sd, tmp_path):
    """The set-up of a recipe on a small tree of the data set's files, from a small Stable Diffusion."""
    getattr(raw_trees, f"make_{name}")(tmp_path / "raw", 24)
    changes = SMALL | {"init": str(sd.path), "data.source": str(tmp_path / "raw"), "data.size": size}
    c = load(name, **changes, **{"data.dir": str(tmp_path / "data")})
    setup = make_setup(c, tmp_path / "run")
    assert setup.info.name == name and setup.info.fit == c.data.fit and setup.final_split in ("test", "val")
    return setup


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ade20k", *(pytest.param(x, marks=pytest.mark.long) for x in ("celebamask_hq", "coco_stuff"))]
)
def test_recipes_of_data_sets_fit_together(sd, tmp_path, name):
    """Files, codec, network and step, on shapes."""
    setup = prepare(name, (64, 64), sd, tmp_path)
    optimizer = make_optimizer(setup.config.optim, 2)
    state = jax.eval_shape(lambda params: make_state(params, optimizer), abstract_unet(setup.start.unet))
    with loop.make_batches(setup) as batches:
        batch = next(batches)
    step = make_train_step(setup.sampler, optimizer, setup.config, setup.mesh)
    new, metrics = jax.eval_shape(step, state, setup.sampler.frozen, batch, jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, new) == jax.tree.map(lambda x: x.shape, state)
    assert metrics.keys() == {"loss", "grad_norm"}


@pytest.mark.long
@pytest.mark.slow
def test_a_recipe_trains(sd, tmp_path):
    """Two steps of the one whose pictures are no squares."""
    setup = prepare("cityscapes", (64, 128), sd, tmp_path)
    loop.train(setup, tmp_path / "run")
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert len(losses) == 2 and np.isfinite(losses).all()


@pytest.mark.parametrize("num_devices", [8, 16, 64])
def test_the_recipe_of_a_pod_fits_it(num_devices):
    c = load("coco_stuff_pod")
    mesh = Mesh(np.resize(np.array(jax.devices()), (num_devices // 8, 8, 1)), parallel.AXES)
    check_values(c)
    check_mesh(c, mesh)


RECIPES = ("ade20k", "avatars", "camvid", "celebamask_hq", "cityscapes", "coco_stuff", "coco_stuff_pod", "folder")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_know_only_keys_of_base(name):
    """A key that base does not explain would be read by nothing."""

    def keys(c, prefix=""):
        for key, value in c.items():
            yield from keys(value, f"{prefix}{key}.") if hasattr(value, "items") else [f"{prefix}{key}"]

    assert set(keys(load(name))) == set(keys(base.get_config()))
