"""train/step.py: one step, whatever the slices and the type that computes; test_sharding.py has the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_unet import make_random_params

from configs import base
from semflow_jax import coupling, flow, parallel
from semflow_jax.codec import load_codec
from semflow_jax.data.info import VOID
from semflow_jax.mask_code import make_mask_code
from semflow_jax.models.build import make_velocity_fn
from semflow_jax.models.unet import UNetConfig
from semflow_jax.sampling import Sampler
from semflow_jax.train.optim import make_optimizer
from semflow_jax.train.step import make_state, make_train_step

NUM_CLASSES = 3


def make_config(**changes):
    """A config whose step has no randomness but t; `changes` by dotted key."""
    c = base.get_config()
    with c.unlocked():
        c.mask_code.pixel = 0.0
        c.model.block_out_channels = (8,)
        c.model.attention = (False,)
        c.model.num_heads = (2,)
        c.model.num_groups = 4
        c.optim.schedule = "constant"
        c.optim.warmup = 0
        c.optim.lr = 1e-2
        c.update_from_flattened_dict(changes)
    return c


def mix(params, zt, t, context, d):
    """A network that compiles at once, for what has nothing to do with the network."""
    return jnp.tanh(zt @ params["in"] + t[:, None, None, None]) @ params["out"]


def make_parts(c, velocity_fn, params, optimizer=None):
    """Step, state and frozen parameters."""
    codec = load_codec(c.codec)
    code = make_mask_code(c.mask_code, codec, NUM_CLASSES, {})
    sampler = Sampler(velocity_fn, *coupling.couple(c.objective, codec, code))
    optimizer = optimizer or make_optimizer(c.optim, 100)
    step = make_train_step(sampler, optimizer, c, parallel.make_mesh(c.mesh))
    return step, make_state(params, optimizer), sampler.frozen


def make_mixing(optimizer=None, **changes):
    keys = jax.random.split(jax.random.key(1))
    shapes = {"in": (48, 16), "out": (16, 48)}
    params = {name: 0.2 * jax.random.normal(key, shapes[name]) for name, key in zip(shapes, keys, strict=True)}
    return make_parts(make_config(**changes), mix, params, optimizer)


def make_unet(**changes):
    c = make_config(**changes)
    unet = UNetConfig(in_channels=48, out_channels=48, **c.model)
    return make_parts(c, make_velocity_fn(unet), make_random_params(unet))


def make_batch(num: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (num, 8, 8, 3), np.uint8),
        "label": rng.integers(0, NUM_CLASSES, (num, 8, 8, 1)).astype(np.uint8),
        "index": np.arange(num, dtype=np.int32),
    }


@pytest.fixture(scope="module")
def mixing():
    step, state, frozen = make_mixing()
    return jax.jit(step), state, frozen


@pytest.fixture(scope="module")
def unet():
    step, state, frozen = make_unet()
    return jax.jit(step), state, frozen


@pytest.mark.parametrize("void", [False, True])
def test_accumulated_slices_equal_the_whole_batch(void):
    """Although the slices have different numbers of void pixels, and each example its own time and perturbation."""
    found, batch = {}, make_batch()
    if void:
        batch["label"][:3] = VOID
    for slices in (1, 4):
        changes = {"optim.accum_steps": slices, "mask_code.pixel": 0.1}
        step, state, frozen = make_mixing(optax.sgd(1.0), **changes)
        found[slices] = jax.jit(step)(state, frozen, batch, jax.random.key(0))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(found[4][1][name], found[1][1][name], rtol=1e-5)
    for path, whole in found[1][0]["params"].items():
        np.testing.assert_allclose(found[4][0]["params"][path], whole, atol=1e-6)
        assert jnp.abs(whole - state["params"][path]).max() > 1e-3


def note_velocities(**changes):
    """(t, d) of every call of the network in one step."""
    asked = []

    def velocity_fn(params, zt, t, context, d):
        jax.debug.callback(lambda *x: asked.append([np.asarray(y) for y in x]), t, d, ordered=True)
        return mix(params, zt, t, context, d)

    width = 96 if changes.get("objective") == "symmflow" else 48
    params = {"in": 0.1 * jnp.ones((width, 4)), "out": 0.1 * jnp.ones((4, width))}
    step, state, frozen = make_parts(make_config(**changes), velocity_fn, params)
    _, metrics = jax.jit(step)(state, frozen, make_batch(), jax.random.key(0))
    jax.effects_barrier()
    return asked, metrics


def test_jumps_take_their_share_of_a_batch():
    asked, metrics = note_velocities(**{"model.intervals": True, "loss.shortcut_every": 2})
    (t1, told), (t2, _), (t, d) = asked  # two halves, then the step's own
    assert t1.shape == (4,) and t.shape == (8,)
    np.testing.assert_array_equal(t[::2], t1)
    assert np.all(d[::2] != 0) and np.all(d[1::2] == 0)
    np.testing.assert_allclose(t2, t1 + d[::2] / 2)
    np.testing.assert_array_equal(told, np.where(np.abs(d[::2]) > 1 / 32, d[::2] / 2, 0))
    assert np.isfinite(metrics["loss"])
    (only,), _ = note_velocities()
    assert not np.any(only[1])
    np.testing.assert_array_equal(only[0][1::2], t[1::2])  # the others learn as without jumps


def test_halves_of_the_state_weigh_as_the_config_says():
    """With the weight on one half alone, the other half of the output learns nothing."""
    for weight, silent in ((1.0, slice(48, 96)), (0.0, slice(0, 48))):
        changes = {"objective": "symmflow", "loss.image_weight": weight, "optim.weight_decay": 0.0}
        params = {"in": 0.1 * jnp.ones((96, 4)), "out": 0.1 * jnp.ones((4, 96))}
        step, state, frozen = make_parts(make_config(**changes), mix, params)
        new = jax.jit(step)(state, frozen, make_batch(), jax.random.key(0))[0]["params"]["out"]
        moved = np.abs(np.asarray(new - state["params"]["out"])).max(0) > 1e-4
        assert not moved[silent].any() and moved.sum() == 48


def test_every_example_draws_its_own_time(monkeypatch):
    draw, times = flow.sample_time, []

    def note(key, num, sampling):
        t = draw(key, num, sampling)
        jax.debug.callback(lambda t: times.append(np.asarray(t)), t)
        return t

    monkeypatch.setattr(flow, "sample_time", note)
    step, state, frozen = make_mixing(**{"optim.accum_steps": 4})
    jax.block_until_ready(jax.jit(step)(state, frozen, make_batch(), jax.random.key(0)))
    jax.effects_barrier()
    assert [t.shape for t in times] == [(2,)] * 4
    assert len(np.unique(times)) == 8


def test_moving_average_in_closed_form():
    """e_n = sum over k of (1 - d_k) p_k times the later decays, d_k = min(ema, k / (k + 10))."""
    step, state, frozen = make_mixing(**{"optim.ema": 0.15})
    step, begin = jax.jit(step), state["params"]
    seen = []
    for _ in range(3):
        state, _ = step(state, frozen, make_batch(), jax.random.key(0))
        seen.append(state["params"])
    decays = [1 / 11, 0.15, 0.15]
    shares = [np.prod(decays), *((1 - d) * np.prod(decays[k + 1 :]) for k, d in enumerate(decays))]
    assert sum(shares) == pytest.approx(1)
    for path, average in state["ema"].items():
        expected = sum(share * p[path] for share, p in zip(shares, [begin, *seen], strict=True))
        np.testing.assert_allclose(average, expected, atol=1e-6)
    assert int(state["step"]) == 3


def test_the_error_is_that_of_the_config(mixing):
    """A large delta makes squares of all errors, a small one of none."""
    losses = []
    for delta in (1e4, 0.1):
        step, state, frozen = make_mixing(**{"loss.kind": "huber", "loss.huber_delta": delta})
        losses.append(float(jax.jit(step)(state, frozen, make_batch(), jax.random.key(0))[1]["loss"]))
    step, state, frozen = mixing
    square = float(step(state, frozen, make_batch(), jax.random.key(0))[1]["loss"])
    assert losses[0] == pytest.approx(square, rel=1e-5) and losses[1] < 0.5 * square


@pytest.mark.parametrize("void_rows", [0, 4, 8])
def test_loss_of_a_silent_network(mixing, void_rows):
    """The mean square of z_1 - z_0, over the places that have a class."""
    step, state, frozen = mixing
    silent = state | {"params": jax.tree.map(jnp.zeros_like, state["params"])}
    batch = make_batch()
    batch["label"][:, :void_rows] = VOID
    c = make_config()
    codec = load_codec(c.codec)
    z0 = codec.encode({}, jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1, None)
    z1 = make_mask_code(c.mask_code, codec, NUM_CLASSES, {}).encode({}, {}, jnp.asarray(batch["label"]), None)
    expected = np.square(z1 - z0)[:, void_rows // 4 :]
    found, metrics = step(silent, frozen, batch, jax.random.key(0))
    np.testing.assert_allclose(metrics["loss"], expected.mean() if expected.size else 0, rtol=1e-5)
    assert jax.tree.all(jax.tree.map(lambda x: jnp.isfinite(x).all(), found))


def test_randomness_comes_from_key_and_step_alone(mixing):
    step, state, frozen = mixing
    key = jax.random.key(0)
    state_1, metrics = step(state, frozen, make_batch(), key)
    again, metrics_again = step(state, frozen, make_batch(), key)
    jax.tree.map(np.testing.assert_array_equal, (state_1, metrics), (again, metrics_again))
    assert step(state, frozen, make_batch(), jax.random.key(1))[1]["loss"] != metrics["loss"]
    assert step(state | {"step": state["step"] + 1}, frozen, make_batch(), key)[1]["loss"] != metrics["loss"]


def test_a_repeated_batch_is_learnt(unet):
    step, state, frozen = unet
    losses = []
    for _ in range(60):
        state, metrics = step(state, frozen, make_batch(), jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:3])


def test_bfloat16_computes_and_float32_stores(unet):
    step, state, frozen = make_unet(**{"model.dtype": "bfloat16"})
    found, metrics = jax.jit(step)(state, frozen, make_batch(), jax.random.key(0))
    assert {x.dtype.name for x in (*found["params"].values(), *found["ema"].values())} == {"float32"}
    assert metrics["loss"].dtype == metrics["grad_norm"].dtype == jnp.float32
    expected = unet[0](unet[1], unet[2], make_batch(), jax.random.key(0))[1]["loss"]
    assert metrics["loss"] != expected
    np.testing.assert_allclose(metrics["loss"], expected, rtol=0.02)
