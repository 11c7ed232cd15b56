"""evaluate/judges.py: what is kept of each example, and that figures are of the right samples."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from semflow_jax import parallel
from semflow_jax.evaluate import distances
from semflow_jax.evaluate.features import FeatureNet, LpipsNet
from semflow_jax.evaluate.judges import Judges

COLOURS = FeatureNet(
    "colours", (8, 8), 3, "none", "abc", {"scale": np.ones(3, np.float32)},
    lambda params, images: params["scale"] * images.astype(jnp.float32).mean((1, 2)),
)  # fmt: skip
GAP = LpipsNet("gap", "abc", "def", {}, lambda params, x, y: jnp.abs(x - y).mean((1, 2, 3)))
RNG = np.random.default_rng(0)
REAL = RNG.integers(0, 256, (6, 8, 8, 3), np.uint8)
SAMPLES = RNG.integers(0, 256, (3, 6, 8, 8, 3), np.uint8)
VALID = np.arange(6) < 5  # the last is padding
IDS = ["a", "b", "c", "d/1", "e", ""]


@pytest.fixture
def judges(tmp_path):
    return Judges([COLOURS], GAP, parallel.make_mesh(), tmp_path / "pictures")


def look(judges):
    return judges.look(jnp.asarray(REAL), jnp.asarray(SAMPLES), VALID, IDS)


def test_padding_is_left_out(judges):
    kept = look(judges)
    np.testing.assert_allclose(kept["real/colours"], REAL[:5].mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(kept["samples/colours"], SAMPLES[:, :5].mean((2, 3)).swapaxes(0, 1), rtol=1e-5)


def test_lpips_of_samples_to_the_real_image_and_to_each_other(judges):
    kept = look(judges)
    real, samples = REAL[:5] / 127.5, SAMPLES[:, :5] / 127.5
    to_real = np.abs(samples - real).mean((0, 2, 3, 4))
    pairs = [np.abs(samples[i] - samples[j]).mean((1, 2, 3)) for i, j in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(kept["lpips_real"], to_real, rtol=1e-5)
    np.testing.assert_allclose(kept["lpips_diversity"], np.mean(pairs, axis=0), rtol=1e-5)
    found = judges.figures(kept)
    assert found["lpips_real"] == pytest.approx(to_real.mean(), rel=1e-5)


def test_distances_are_of_the_first_samples_and_of_all(judges):
    found = judges.figures(look(judges))["distances"]["colours"]
    real = REAL[:5].mean((1, 2))

    def frechet(samples):
        features = samples.mean((-3, -2)).reshape(-1, 3)
        return distances.frechet_distance(*(distances.Moments.empty(3).add(x) for x in (real, features)))

    assert found["frechet"] == pytest.approx(frechet(SAMPLES[0, :5]), rel=1e-4)
    assert found["all_samples"]["frechet"] == pytest.approx(frechet(SAMPLES[:, :5]), rel=1e-4)
    assert (found["num_real"], found["num_samples"], found["all_samples"]["num_samples"]) == (5, 5, 15)


def test_pictures_are_lossless_and_named_by_id(judges):
    look(judges)
    names = {path.name for path in judges.pictures.iterdir()}
    assert names == {f"{id}-{k}.png" for id in ("a", "b", "c", "d_1", "e") for k in range(3)}
    np.testing.assert_array_equal(Image.open(judges.pictures / "d_1-2.png"), SAMPLES[2, 3])


def test_the_protocol_names_every_network(judges):
    found = judges.protocol()
    assert found["features"]["colours"]["sha256"] == "abc" and found["lpips"]["lin_sha256"] == "def"
    assert Judges([], None, parallel.make_mesh()).protocol()["lpips"] is None
