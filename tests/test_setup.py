"""train/setup.py: every value is checked before anything long begins, and a run goes on with its first config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_folder import make_folder

from configs import base
from semflow_jax.data.prepare import prepare
from semflow_jax.errors import UserError
from semflow_jax.pipeline import load_frozen
from semflow_jax.train.setup import begin, check_unchanged, make_setup
from semflow_jax.weights.export import to_torch
from semflow_jax.weights.load import save_safetensors


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("loop")
    prepare("folder", root / "data", source=make_folder(root / "toys", 20), size=(16, 24), progress=False)
    return str(root / "data")


def make_config(data_dir, **changes):
    """A config that fits the data; `changes` by dotted key."""
    c = base.get_config()
    with c.unlocked():
        c.data.dir = data_dir
        c.data.size = (16, 24)
        c.model.block_out_channels = (8, 8)
        c.model.attention = (False, False)
        c.model.num_heads = (2, 2)
        c.model.num_groups = 4
        c.codec.whiten = 0.5
        c.mask_code.name = "linear"
        c.update_from_flattened_dict(changes)
    return c


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_steps", 0, "num_steps: at least 1, got 0"),
        ("log_every", 0, "log_every: at least 1, got 0"),
        ("eval_every", -1, "eval_every: at least 1, got -1"),
        ("checkpoint_every", 0, "checkpoint_every: at least 1, got 0"),
        ("eval.num_samples", 1, "eval.num_samples: at least 2, .*got 1"),
        ("optim.schedule", "zigzag", "optim.schedule: one of .*, got 'zigzag'"),
        ("optim.accum_steps", 5, "optim.accum_steps: batch_size 32 must be a multiple"),
        ("objective", "both", "objective: one of .*, got 'both'"),
        ("loss.image_weight", 1.5, "loss.image_weight: in .*, got 1.5"),
        ("loss.shortcut_every", 4, "loss.shortcut_every: 0, or above it with model.intervals; got 4 with .* False"),
        ("loss.time_sampling", "dawn", "loss.time_sampling: one of .*, got 'dawn'"),
        ("loss.kind", "l3", "loss.kind: one of .*, got 'l3'"),
        ("loss.huber_delta", 0.0, "loss.huber_delta: above 0, got 0.0; 1.0 is usual"),
        ("sampling.solver", "magic", "solver: one of .*, got 'magic'"),
        ("sampling.steps", 0, "steps: at least 1, got 0"),
        ("codec.name", "vqgan", "codec.name: one of .*, got 'vqgan'"),
        ("codec.factor", 16, "size: height and width must be multiples of 32 .*, got 16 x 24"),
        ("codec.factor", 5, "size: height and width must be multiples of 10 .*, got 16 x 24"),
        ("codec.factor", 1, "'linear' needs a codec of at least 5 channels"),
        ("mask_code.name", "one_hot", "mask_code.name: one of .*, got 'one_hot'"),
        ("mask_code.balance", "zscore", "mask_code.balance: one of .*, got 'zscore'"),
        ("mask_code.balance", "minmax", "mask_code.balance: 'none' for the code 'linear', got 'minmax'"),
        ("mask_code.palette", "rainbow", "palette: one of .*, got 'rainbow'"),
        ("model.num_heads", (2,), "model: block_out_channels, attention and num_heads need one entry per level"),
        ("model.num_groups", 3, "model.block_out_channels: each must be a multiple of num_groups"),
    ],
)
def test_bad_values(data_dir, tmp_path, key, value, message):
    with pytest.raises(UserError, match=message) as caught:
        make_setup(make_config(data_dir, **{key: value}), tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "num_arrays"), [({}, 3), ({"mask_code.name": "colour", "mask_code.balance": "minmax"}, 2)]
)
def test_a_run_keeps_what_it_was_fitted_to(data_dir, tmp_path, monkeypatch, changes, num_arrays):
    first = make_setup(make_config(data_dir, **changes), tmp_path)
    begin(first, tmp_path)
    monkeypatch.setattr("semflow_jax.train.setup.fit_codes", None)  # calling it would fail
    again = make_setup(make_config(data_dir, **changes), tmp_path)
    assert again.model == first.model
    assert {name: len(arrays) for name, arrays in first.sampler.frozen.items()} == {"codec": 3, "code": num_arrays}
    jax.tree.map(np.testing.assert_array_equal, again.sampler.frozen, first.sampler.frozen)


def test_jumps_divide_the_batch_of_a_device(data_dir, tmp_path):
    c = make_config(data_dir, **{"model.intervals": True, "loss.shortcut_every": 3})
    with pytest.raises(UserError, match=r"loss.shortcut_every: must divide .*, 32 / \(1 x 1\), got 3"):
        make_setup(c, tmp_path)


def test_a_state_of_image_and_mask_is_kept_with_its_objective(data_dir, tmp_path):
    c = make_config(data_dir, objective="symmflow")
    first = make_setup(c, tmp_path)
    begin(first, tmp_path)
    assert first.start.unet.in_channels == first.sampler.codec.channels == 96
    config, codec, code, _ = load_frozen(tmp_path / "export")
    assert config["objective"] == "symmflow" and (codec.channels, codec.noise_channels) == (96, 48)
    again = make_setup(c, tmp_path)
    label = jnp.zeros((1, 16, 24, 1), jnp.uint8)
    z1, same = (s.encode_mask(s.frozen, label, jax.random.key(0)) for s in (first.sampler, again.sampler))
    np.testing.assert_array_equal(z1, same)
    save_safetensors(tmp_path / "export/model.safetensors", to_torch(jax.jit(again.start.make_params)(), "float32"))
    with pytest.raises(UserError, match="objective: init has 'symmflow', got 'semflow'"):
        make_setup(make_config(data_dir, init=str(tmp_path)), tmp_path / "other")


def test_only_free_keys_may_change(data_dir, tmp_path):
    c = make_config(data_dir)
    check_unchanged(c, tmp_path)
    (tmp_path / "config.json").write_text(c.to_json_best_effort())
    check_unchanged(make_config(data_dir, **{"log_every": 7, "eval.limit": 3, "sampling.steps": 9}), tmp_path)
    with pytest.raises(UserError, match="changed: seed, optim.lr; undo that") as caught:
        check_unchanged(make_config(data_dir, **{"seed": 7, "optim.lr": 3.0}), tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_size_that_does_not_fit_is_refused_before_data_are_prepared(monkeypatch, tmp_path):
    monkeypatch.setenv("SEMFLOW_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="size: height and width must be multiples of 8 .*, got 18 x 18"):
        make_setup(make_config(None, **{"data.name": "avatars", "data.size": (18, 18)}), tmp_path)
    assert not list(tmp_path.iterdir())
