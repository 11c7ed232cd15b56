"""learned_code.py and models/mask_net.py: a code that is learned, told apart from noise, kept and found again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_folder import make_folder
from test_mask_code import CODEC, NUM_CLASSES, make_labels
from test_setup import make_config as make_run_config

from configs import base
from semflow_jax import learned_code, palette
from semflow_jax.data.info import VOID
from semflow_jax.data.prepare import prepare
from semflow_jax.errors import UserError
from semflow_jax.evaluate import calibration
from semflow_jax.mask_code import MaskCode, make_mask_code
from semflow_jax.pipeline import FROZEN, load_frozen, save_frozen
from semflow_jax.plan.programs import make_programs
from semflow_jax.train.setup import begin, make_setup
from semflow_jax.weights.load import load_safetensors, save_safetensors

LABELS = list(make_labels(40))
IMAGES = list(np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8) // np.arange(1, 4, dtype=np.uint8))
TINY = {"width": 32, "pixel_width": 8, "blocks": 1, "steps": 250, "batch_size": 8, "crop": 24, "lr": 5e-3}


def make_config(learned: dict | None = None, **changes) -> ConfigDict:
    c = base.get_config().mask_code
    c.update({"name": "learned", "region": 0.5, **changes, "learned": TINY | (learned or {})})
    return c


def fit(c: ConfigDict, labels=LABELS, seed: int = 0) -> dict[str, np.ndarray]:
    return learned_code.fit(labels, IMAGES, NUM_CLASSES, CODEC, c, seed, progress=False)[0]


@pytest.fixture(scope="module")
def code() -> MaskCode:
    c = make_config()
    return make_mask_code(c, CODEC, NUM_CLASSES, fit(c))


jitted = functools.cache(jax.jit)


def encode(code: MaskCode, label: np.ndarray, key=None) -> np.ndarray:
    return np.asarray(jitted(code.encode)(code.params, {}, label, key))


def logits(code: MaskCode, z1: np.ndarray) -> jax.Array:
    return jitted(code.logits)(code.params, {}, z1)


def decode(code: MaskCode, z1: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.argmax(logits(code, z1), axis=-1, keepdims=True))


def units(code: MaskCode, z1: np.ndarray) -> np.ndarray:
    return (z1 - code.params["image_mean"]) / code.params["image_std"]


def add_noise(code: MaskCode, z1: np.ndarray, level: float) -> np.ndarray:
    return z1 + level * code.params["image_std"] * np.random.default_rng(2).normal(size=z1.shape).astype(np.float32)


@pytest.fixture(scope="module")
def by_codec() -> MaskCode:
    c = make_config({"encoder": "codec", "steps": 120})
    return make_mask_code(c, CODEC, NUM_CLASSES, fit(c))


def test_colours_through_the_codec_with_a_learned_decoder(by_codec):
    label = make_labels(20, seed=1)
    colours = CODEC.encode({}, palette.colourise(jnp.asarray(label), by_codec.colours))
    u = units(by_codec, encode(by_codec, label))
    expected = (colours - by_codec.params["code_mean"]) / by_codec.params["code_std"]
    np.testing.assert_allclose(u, expected, atol=1e-4)
    assert (decode(by_codec, encode(by_codec, label, jax.random.key(0))) == label).mean() > 0.95
    assert (decode(by_codec, add_noise(by_codec, encode(by_codec, label), 0.3)) == label).mean() > 0.9
    assert not [name for name in by_codec.params if name.startswith(("classes", "encoder", "to_latent"))]


def test_what_is_kept_of_a_mask_is_finished_later(by_codec, code):
    label, key = jnp.asarray(make_labels(3, seed=1)), jax.random.key(0)
    f = by_codec.embed({}, label)
    np.testing.assert_array_equal(jitted(by_codec.finish)(by_codec.params, f, label, key), encode(by_codec, label, key))
    assert code.embed is None and code.finish is None  # a small network's work is not worth keeping


@pytest.mark.parametrize("key", [None, jax.random.key(0)])
def test_round_trip_of_masks_it_was_not_fitted_to(code, key):
    label = make_labels(20, seed=1)
    z1 = encode(code, label, key)
    assert z1.shape == (20, *CODEC.latent_shape((32, 32))) and z1.dtype == np.float32
    assert (decode(code, z1) == label).mean() > 0.95


def test_it_bears_noise_and_knows_how_sure_it_is(code):
    label = make_labels(20, seed=1)
    z1 = encode(code, label)
    assert (decode(code, add_noise(code, z1, 0.3)) == label).mean() > 0.93
    for level in (0.25, 0.5):
        probabilities = jax.nn.softmax(logits(code, add_noise(code, z1, level)))
        counts = calibration.calibration_counts(probabilities, jnp.asarray(label))
        assert calibration.expected_calibration_error(counts) < 0.05


def test_latents_have_the_moments_of_image_latents(code):
    images = jnp.asarray(np.stack(IMAGES), jnp.float32) / 127.5 - 1
    wanted = np.asarray(CODEC.encode({}, images)).reshape(-1, CODEC.channels)
    found = encode(code, np.stack(LABELS)).reshape(-1, CODEC.channels)
    np.testing.assert_allclose(found.mean(0), wanted.mean(0), atol=1e-4)
    np.testing.assert_allclose(found.std(0), wanted.std(0), rtol=1e-3)
    assert wanted.std(0).max() > 2 * wanted.std(0).min()


def test_noise_channels_hold_noise_alone():
    c = make_config({"noise_channels": 8, "steps": 60})
    code = make_mask_code(c, CODEC, NUM_CLASSES, fit(c))
    label = np.concatenate([make_labels(20, seed=1)] * 2)
    u = units(code, encode(code, label, jax.random.key(0)))
    rest = u[..., -8:]
    assert abs(rest.mean()) < 0.02 and abs(rest.std() - 1) < 0.02
    assert not np.array_equal(rest[:20], rest[20:])
    plain = units(code, encode(code, label))
    np.testing.assert_allclose(plain[..., -8:], 0, atol=1e-6)
    z1 = encode(code, label)
    changed = z1 + np.r_[np.zeros(CODEC.channels - 8), np.ones(8)].astype(np.float32)
    np.testing.assert_allclose(logits(code, changed), logits(code, z1))
    assert (decode(code, z1) == label).mean() > 0.9


def test_noise_leaves_a_channel_to_the_mask():
    with pytest.raises(UserError, match="mask_code.learned.noise_channels: below 48"):
        fit(make_config({"noise_channels": 48}))


def test_latents_are_bounded(code):
    rng = np.random.default_rng(3)
    noise = rng.integers(0, NUM_CLASSES, (8, 32, 32, 1)).astype(np.uint8)
    y = units(code, encode(code, noise)) * code.params["code_std"] + code.params["code_mean"]
    assert np.abs(y).max() <= 3.0


def test_smoothness_makes_neighbours_alike():
    rough, smooth = (make_config({"smoothness": x, "steps": 60}) for x in (0.0, 3.0))
    label = make_labels(20, seed=1)
    found = []
    for c in (rough, smooth):
        code = make_mask_code(c, CODEC, NUM_CLASSES, fit(c))
        found.append(float(learned_code.roughness(jnp.asarray(units(code, encode(code, label))))))
    assert found[1] < 0.8 * found[0]


def test_roughness_is_one_less_the_correlation_of_neighbours():
    u = np.random.default_rng(0).normal(size=(64, 16, 16, 4)).astype(np.float32)
    assert learned_code.roughness(jnp.asarray(u)) == pytest.approx(1, abs=0.02)
    alike = np.repeat(np.repeat(u, 2, 1), 2, 2)  # of 31 pairs of neighbours 16 are equal
    assert learned_code.roughness(jnp.asarray(alike)) == pytest.approx(15 / 31, abs=0.02)
    assert learned_code.roughness(jnp.ones((2, 1, 1, 3))) == 0


def test_equal_seeds_give_equal_codes():
    c = make_config({"steps": 4})
    ours, again, other = (fit(c, seed=seed) for seed in (1, 1, 2))
    assert ours.keys() == again.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], again[name])
    assert np.abs(ours["classes.weight"] - other["classes.weight"]).max() > 0.01


def test_void_is_encoded_and_not_learned(code):
    label = make_labels(4, seed=1)
    label[:, :8, :8] = VOID
    z1 = encode(code, label, jax.random.key(0))
    assert np.isfinite(z1).all()
    assert (decode(code, z1) == label)[label != VOID].mean() > 0.93
    assert (encode(code, label) != encode(code, make_labels(4, seed=1))).any()
    # Where all is void there is nothing to learn: only the moments are measured.
    nothing = fit(make_config({"steps": 3, "smoothness": 0.0}), [np.full((32, 32, 1), VOID, np.uint8)] * 2)
    start = fit(make_config({"steps": 1, "lr": 0.0}))
    assert all(np.isfinite(x).all() for x in nothing.values())
    for name in start.keys() - set(learned_code.MOMENTS):
        np.testing.assert_array_equal(nothing[name], start[name])


def test_noise_of_a_pixel_and_shift_of_a_region(code):
    label = np.zeros((2, 32, 32, 1), np.uint8)
    label[:, 16:] = 1
    label[1, :, 16:] = VOID

    def shift(**changes):
        other = make_mask_code(make_config(**changes), CODEC, NUM_CLASSES, code.params)
        return units(code, encode(other, label, jax.random.key(3))) - units(code, encode(other, label))

    shifted = shift(pixel=0.0, region=2.0)
    regions = [shifted[0, :4], shifted[0, 4:], shifted[1, :4, :4], shifted[1, 4:, :4]]
    for region in regions:
        np.testing.assert_allclose(region, np.broadcast_to(region[0, 0], region.shape), atol=1e-5)
    directions = np.stack([region[0, 0] for region in regions])
    assert np.abs(directions).max() <= 1 + 1e-5 and directions.std() == pytest.approx(2 / 12**0.5, rel=0.15)
    assert np.abs(directions[0] - directions[1]).max() > 0.5
    np.testing.assert_allclose(shifted[1, :, 4:], 0, atol=1e-6)
    noise = shift(pixel=0.4, region=0.0)
    assert np.abs(noise).max() <= 0.2 + 1e-5 and noise.std() == pytest.approx(0.4 / 12**0.5, rel=0.05)


def test_a_key_for_each_example(code):
    label = make_labels(3)
    keys = jax.random.split(jax.random.key(7), 3)
    together = encode(code, label, keys)
    np.testing.assert_allclose(encode(code, label[1:2], keys[1:2])[0], together[1], atol=1e-5)


def test_saved_and_opened_it_is_the_same_bit_by_bit(code, flow, tmp_path):
    data = flow.config["data"] | {"class_names": [str(i) for i in range(NUM_CLASSES)]}
    save_frozen(tmp_path, flow.config | {"data": data, "mask_code": code.config}, CODEC, code, None)
    _, _, again, _ = load_frozen(tmp_path)
    assert again.config == code.config and again.params.keys() == code.params.keys()
    jax.tree.map(np.testing.assert_array_equal, again.params, dict(code.params))
    label = make_labels(2)
    np.testing.assert_array_equal(encode(again, label, jax.random.key(0)), encode(code, label, jax.random.key(0)))

    arrays = dict(load_safetensors(tmp_path / FROZEN))
    del arrays["code.image_mean"]
    save_safetensors(tmp_path / FROZEN, arrays)
    with pytest.raises(UserError, match="arrays of a learned mask code that don't fit"):
        load_frozen(tmp_path)


def test_a_run_that_goes_on_keeps_its_code(tmp_path, monkeypatch):
    prepare("folder", tmp_path / "data", source=make_folder(tmp_path / "toys", 20), size=(16, 24), progress=False)
    changes = {f"mask_code.learned.{key}": value for key, value in (TINY | {"steps": 2}).items()}
    c = make_run_config(str(tmp_path / "data"), **{"mask_code.name": "learned", **changes})
    first = make_setup(c, tmp_path / "run")
    begin(first, tmp_path / "run")
    monkeypatch.setattr(learned_code, "fit", None)  # calling it would fail
    other = make_setup(c, tmp_path / "other run")
    jax.tree.map(np.testing.assert_array_equal, other.sampler.frozen["code"], first.sampler.frozen["code"])
    assert other.code_seconds == first.code_seconds > 0
    with pytest.raises(TypeError):
        make_setup(
            make_run_config(str(tmp_path / "data"), **{"mask_code.name": "learned", "seed": 1, **changes}), tmp_path
        )
    monkeypatch.setattr("semflow_jax.train.setup.fit_codes", None)
    again = make_setup(c, tmp_path / "run")
    assert again.model == first.model and first.model["mask_code"]["learned"]["steps"] == 2
    jax.tree.map(np.testing.assert_array_equal, again.sampler.frozen["code"], first.sampler.frozen["code"])

    wanted = {name: x.shape for name, x in first.sampler.frozen["code"].items()}
    programs = make_programs(c, jax.devices()[:1], first.info.num_classes)
    assert {name: x.shape for name, x in programs["train"]().args[1]["code"].items()} == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learned": {"steps": 0}}, "mask_code.learned.steps: at least 1, got 0"),
        ({"learned": {"encoder": "postman"}}, "mask_code.learned.encoder: one of .*, got 'postman'"),
        ({"learned": {"noise": -0.1}}, "mask_code.learned.noise: at least 0, got -0.1"),
        ({"pixel": -1.0}, "mask_code.pixel, mask_code.region: at least 0, got -1.0, 0.5"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(UserError, match=message):
        fit(make_config(**changes))
