"""train/start.py: what `c.init` names is what a run starts from, and goes on with."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_folder import make_folder
from test_pipeline_model import CLASS_NAMES, SIZE

from configs import base
from semflow_jax import parallel
from semflow_jax.data.pipeline import make_train_iterator
from semflow_jax.data.prepare import prepare
from semflow_jax.errors import UserError
from semflow_jax.pipeline import SemFlow
from semflow_jax.train import guard, loop
from semflow_jax.train.optim import make_optimizer
from semflow_jax.train.setup import begin, make_setup
from semflow_jax.train.start import find_start
from semflow_jax.train.step import make_state, make_train_step


def make_data(root, size, num_classes=3):
    source = make_folder(root / "toys", 20, num_classes, size)
    (source / "classes.json").write_text(json.dumps(CLASS_NAMES[:num_classes]))
    prepare("folder", root / "data", source=source, size=size, progress=False)
    return str(root / "data")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("small"), SIZE)


@pytest.fixture(scope="module")
def large_data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("large"), (64, 64))


def make_config(data_dir, init, **changes):
    """A config of few steps; `changes` by dotted key."""
    c = base.get_config()
    with c.unlocked():
        c.init = str(init)
        c.data.dir = data_dir
        c.batch_size = 2
        c.num_steps = 2
        c.checkpoint_every = 1
        c.log_every = 1
        c.optim.warmup = 0
        c.optim.lr = 1e-4
        c.sampling.steps = 1
        c.eval.batch_size = 2
        c.eval.limit = 2
        c.update_from_flattened_dict(changes)
    return c


def to_json(config):
    return json.loads(json.dumps(config))


def check_same(found, expected):
    assert found.keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, dict(found), dict(expected))


def test_from_a_flow_of_ours(flow, saved, data_dir, tmp_path):
    """Network, codec and mask code are the flow's, whatever the config says of them."""
    setup = make_setup(make_config(data_dir, saved, **{"model.remat": "blocks"}), tmp_path)
    assert setup.config.mask_code.name != flow.config["mask_code"]["name"] == setup.model["mask_code"]["name"]
    assert setup.model["mask_code"] == flow.config["mask_code"]
    assert setup.start.unet == dataclasses.replace(flow.unet, remat="blocks") and not setup.start.drawn
    check_same(setup.start.make_params(), flow.params)
    jax.tree.map(np.testing.assert_array_equal, setup.sampler.frozen, flow.frozen)


def test_a_type_that_stores(flow, saved, data_dir):
    start = find_start(make_config(data_dir, saved, **{"model.param_dtype": "bfloat16", "model.dtype": "bfloat16"}))
    assert (start.unet.dtype, start.unet.param_dtype) == ("bfloat16", "bfloat16")
    check_same(start.make_params(), {path: x.astype(jnp.bfloat16) for path, x in flow.params.items()})


@pytest.mark.long
@pytest.mark.slow
def test_a_run_from_a_flow_of_ours(flow, saved, data_dir, tmp_path, monkeypatch):
    """Is opened before its end, goes on, and is what a whole run would have been."""

    def train(workdir):
        return loop.train(make_setup(make_config(data_dir, saved), workdir), workdir)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(guard.StopSignals, "asked", lambda self, step: True)
        train(tmp_path / "parts")
    assert caught.value.code == 0
    half = SemFlow.from_pretrained(tmp_path / "parts")
    assert half.config["mask_code"] == flow.config["mask_code"]
    changes = {path: np.abs(half.params[path] - x).max() for path, x in flow.params.items()}
    assert 0 < min(changes.values()) <= max(changes.values()) < 1e-3
    again, whole = train(tmp_path / "parts"), train(tmp_path / "whole")
    assert int(again["step"]) == 2
    check_same(again["params"], whole["params"])
    check_same(SemFlow.from_pretrained(tmp_path / "parts").params, whole["ema"])


def test_a_run_goes_on_before_its_first_checkpoint(flow, saved, data_dir, tmp_path):
    first = make_setup(make_config(data_dir, saved), tmp_path)
    begin(first, tmp_path)
    again = make_setup(make_config(data_dir, saved), tmp_path)
    assert to_json(again.model) == to_json(first.model)
    assert again.start.unet == first.start.unet and not again.start.drawn
    check_same(again.start.make_params(), flow.params)
    jax.tree.map(np.testing.assert_array_equal, again.sampler.frozen, first.sampler.frozen)


def test_a_run_from_nothing_goes_on_before_its_first_checkpoint(data_dir, tmp_path):
    small = {"model.block_out_channels": (8,), "model.attention": (False,), "model.num_heads": (2,)}
    first = make_setup(make_config(data_dir, "", **small), tmp_path)
    begin(first, tmp_path)
    again = make_setup(make_config(data_dir, "", **small), tmp_path)
    assert first.start.drawn and again.start.drawn and first.start.context is None
    check_same(jax.jit(again.start.make_params)(), jax.jit(first.start.make_params)())


def test_other_classes(saved, tmp_path):
    data_dir = make_data(tmp_path, SIZE, num_classes=2)
    with pytest.raises(UserError, match=f"init: {saved} has 3 classes, {data_dir} 2; start from another"):
        make_setup(make_config(data_dir, saved), tmp_path / "run")


def test_a_context_needs_weights(data_dir, tmp_path):
    with pytest.raises(UserError, match="model.cross_attention_dim: a context comes with `init`.* got 7"):
        make_setup(make_config(data_dir, "", **{"model.cross_attention_dim": 7}), tmp_path)


@pytest.mark.parametrize("name", ["float7", ""])
def test_types_that_do_not_exist(saved, data_dir, tmp_path, name):
    with pytest.raises(UserError, match=f"model.param_dtype: one of .*, got '{name}'"):
        make_setup(make_config(data_dir, saved, **{"model.param_dtype": name}), tmp_path)


def test_an_autoencoder_in_half_precision(sd, data_dir):
    """Computes in bfloat16, returns float32."""
    image = jax.random.uniform(jax.random.key(0), (1, 32, 32, 3), minval=-1, maxval=1)
    found = {}
    for dtype in ("float32", "bfloat16"):
        codec = find_start(make_config(data_dir, sd.path, **{"codec.name": "kl", "codec.dtype": dtype})).codec
        assert codec.config["vae"]["dtype"] == dtype
        found[dtype] = codec.encode(codec.params, image)
        assert found[dtype].dtype == codec.decode(codec.params, found[dtype]).dtype == jnp.float32
    error = jnp.abs(found["bfloat16"] - found["float32"]).max()
    assert 0 < error < 0.05 * jnp.abs(found["float32"]).max()
    with pytest.raises(UserError, match=r"^codec.dtype: one of .*, got 'float7'"):
        find_start(make_config(data_dir, sd.path, **{"codec.name": "kl", "codec.dtype": "float7"}))


def test_stable_diffusion_needs_its_own_latents(sd, data_dir, tmp_path):
    with pytest.raises(UserError, match="codec: patch 4 x 4, lossless has latents of 48 channels, the network takes 4"):
        make_setup(make_config(data_dir, str(sd.path)), tmp_path)


@pytest.mark.slow
def test_from_stable_diffusion(sd, sd_flow, large_data_dir, tmp_path):
    """One step from its weights: finite, with its context, and with latents that are drawn."""
    c = make_config(large_data_dir, str(sd.path), **{"codec.name": "kl"})
    setup = make_setup(c, tmp_path)
    params, sampler = setup.start.make_params(), setup.sampler
    check_same(params, sd_flow.params)
    np.testing.assert_array_equal(sampler.context, sd_flow.context)
    check_same(sampler.frozen["codec"], sd_flow.codec.params)
    assert to_json(setup.model["codec"]) == to_json(sd_flow.codec.config)

    optimizer = make_optimizer(c.optim, c.num_steps)
    step = jax.jit(make_train_step(sampler, optimizer, c, parallel.make_mesh()))
    batch = next(make_train_iterator(large_data_dir, 2))
    key = jax.random.key(0)

    def run(**changes):
        frozen = sampler.frozen
        frozen = frozen | {"codec": frozen["codec"] | changes.pop("codec", {})} | changes
        return step(make_state(params, optimizer), frozen, batch, key)

    state, metrics = run()
    assert all(np.isfinite(x) for x in metrics.values()) and metrics["grad_norm"] > 0
    assert all(np.isfinite(x).all() and (x != params[path]).any() for path, x in state["params"].items())
    loss = float(metrics["loss"])
    assert float(run()[1]["loss"]) == loss
    assert float(run(context=2 * sampler.context)[1]["loss"]) != loss
    # The last half of these are logarithms of variances: the mode does not see them, a sample does.
    wide = sampler.frozen["codec"]["quant_conv.bias"].at[4:].add(3)
    assert float(run(codec={"quant_conv.bias": wide})[1]["loss"]) > 1.01 * loss
