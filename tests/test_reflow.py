"""reflow.py and what reads its pairs: they are the teacher's, the step makes their masks again, paths get straight."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_start
from test_latents import make_code, make_codec, make_data
from test_pipeline_model import make_tiny_flow
from test_step import make_config

from semflow_jax import flow, latents, noise, parallel, reflow, solve
from semflow_jax.data.pipeline import make_train_iterator
from semflow_jax.data.records import load_info, open_records
from semflow_jax.data.transforms import mirror_label
from semflow_jax.errors import UserError
from semflow_jax.evaluate.geometry import straightness
from semflow_jax.latents import ensure_latents
from semflow_jax.models.unet import UNetConfig
from semflow_jax.sampling import Sampler
from semflow_jax.train import loop, setup
from semflow_jax.train.setup import make_setup
from semflow_jax.train.start import find_start
from semflow_jax.train.step import make_state, make_train_step

STEPS, DRAWS = 25, 2
UNET = UNetConfig()  # whose shape pairs are filed under; the network is `bend`


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Pairs that one test has made are there for the others."""
    return make_data(tmp_path_factory.mktemp("sides"))


def bend(params, zt, t, context=None, d=None):
    """A network that compiles at once, with curved paths."""
    return jnp.tanh(zt @ params["in"] + 2 * t[:, None, None, None]) @ params["out"]


@functools.cache
def make_teacher(kind: str):
    codec = make_codec(kind)
    shapes = {"in": (codec.channels, 32), "out": (32, codec.channels)}
    keys = jax.random.split(jax.random.key(1))
    params = {name: 0.5 * jax.random.normal(key, shapes[name]) for name, key in zip(shapes, keys, strict=True)}
    return Sampler(bend, codec, make_code(codec)), params


def make_section(**changes):
    return make_config(**{f"reflow.{key}": x for key, x in ({"steps": STEPS, "draws": DRAWS} | changes).items()}).reflow


def make_pairs(data_dir, kind="patch", params=None, **changes):
    sampler, weights = make_teacher(kind)
    return reflow.ensure_pairs(data_dir, sampler, UNET, params or weights, make_section(**changes), False)


@jax.jit
def integrate(params, z):
    """Euler's method from 1 to 0."""

    def step(i, z):
        return z - bend(params, z, jnp.full(len(z), 1 - i / STEPS), None) / STEPS

    return jax.lax.fori_loop(0, STEPS, step, z)


@functools.partial(jax.jit, static_argnums=0)
def encode(sampler, label, draw):
    return sampler.encode_mask(sampler.frozen, label, noise.example_keys(jax.random.key(reflow.SEED), draw))


@pytest.mark.parametrize("kind", ["patch", "kl"])
def test_pairs_are_the_ends_of_the_teachers_paths(data_dir, kind):
    sampler, params = make_teacher(kind)
    pairs = open_records(make_pairs(data_dir, kind), "train")
    images, flip_pairs = (
        open_records(ensure_latents(data_dir, sampler.codec, False), "train"),
        load_info(data_dir).flip_pairs,
    )
    assert len(pairs) == len(images) and flip_pairs == ((1, 2),)
    draws = []
    for pair, image in zip(pairs, images, strict=True):
        assert pair["id"] == image["id"] and set(pair) == set(image) | {"own", "draw"}
        for name, x in image.items():
            np.testing.assert_array_equal(pair[name], x)
        sides = np.stack([image["label"], mirror_label(image["label"], flip_pairs)])
        z1 = encode(sampler, jnp.asarray(sides.repeat(DRAWS, axis=0)), jnp.asarray(pair["draw"].ravel()))
        own = pair["own"].reshape(z1.shape)
        assert own.dtype == np.float16 and len({x.tobytes() for x in own}) == 2 * DRAWS
        np.testing.assert_allclose(own, integrate(params, z1), rtol=2e-3, atol=2e-3)
        draws += pair["draw"].ravel().tolist()
    assert sorted(draws) == list(range(2 * DRAWS * len(pairs)))


@pytest.mark.parametrize("kind", ["patch", "kl"])
def test_the_step_joins_own_latents_to_their_masks(data_dir, kind, monkeypatch):
    """What it interpolates between: ends of one path of the teacher's, or what it would have without reflow."""
    sampler, params = make_teacher(kind)
    joined = []

    def note(z0, z1):
        jax.debug.callback(lambda *ends: joined.append(ends), z0, z1)
        return z1 - z0

    monkeypatch.setattr(flow, "velocity", note)
    optimizer = optax.sgd(0.0)
    step = jax.jit(make_train_step(sampler, optimizer, make_config(), parallel.make_mesh()))
    state = make_state(params, optimizer)
    with make_train_iterator(make_pairs(data_dir, kind), 16, share=0.5) as batches:
        batch = next(batches)
    without = {name: x for name, x in batch.items() if name != "draw"}
    for inputs in (batch, without, batch | {"draw": np.full(16, -1, np.int32)}):
        jax.block_until_ready(step(state, sampler.frozen, inputs, jax.random.key(0)))
        jax.effects_barrier()
    (z0, z1), real, (z0_real, z1_real) = joined
    own = batch["draw"] >= 0
    assert 3 < own.sum() < 13
    np.testing.assert_allclose(z0[own], integrate(params, jnp.asarray(z1[own])), rtol=4e-3, atol=4e-3)
    np.testing.assert_array_equal(z0[own], batch["mean"][own])
    assert (np.abs(z1 - real[1]).max((1, 2, 3)) > 1e-3).tolist() == own.tolist()
    np.testing.assert_array_equal(z0[~own], real[0][~own])
    np.testing.assert_array_equal((z0_real, z1_real), real)  # as without reflow, bit by bit


def test_shares_and_mirror_images(data_dir):
    place = make_pairs(data_dir)
    records, flip_pairs = open_records(place, "train"), load_info(place).flip_pairs
    seen = {}
    for share in (0.0, 0.5, 1.0):
        with make_train_iterator(place, 16, seed=1, share=share) as batches:
            seen[share] = [next(batches) for _ in range(4)]
        for batch in seen[share]:
            assert batch.keys() == {"mean", "label", "draw", "index"} and batch["draw"].dtype == np.int32
            for mean, label, draw in zip(batch["mean"], batch["label"], batch["draw"], strict=True):
                if draw >= 0:
                    number, side, k = np.unravel_index(draw, (len(records), 2, DRAWS))
                    record = records[int(number)]
                    np.testing.assert_array_equal(mean, record["own"][side, k])
                    expected = record["label"]
                    np.testing.assert_array_equal(label, mirror_label(expected, flip_pairs) if side else expected)
    own = {share: np.concatenate([batch["draw"] for batch in batches]) for share, batches in seen.items()}
    assert (own[0.0] == -1).all() and (own[1.0] >= 0).all() and 0.25 < (own[0.5] >= 0).mean() < 0.75
    assert len(set(own[1.0] // DRAWS % 2)) == len(set(own[1.0] % DRAWS)) == 2  # either side, either draw
    with make_train_iterator(ensure_latents(data_dir, make_codec("patch"), False), 16, seed=1) as batches:
        for batch in seen[0.0]:  # the stream that is without reflow
            for name, x in next(batches).items():
                np.testing.assert_array_equal(batch[name], x)


def test_own_latents_of_a_distribution_are_no_distribution(data_dir):
    with make_train_iterator(make_pairs(data_dir, "kl"), 16, share=0.5) as batches:
        batch = next(batches)
    np.testing.assert_array_equal(batch["std"].any((1, 2, 3)), batch["draw"] < 0)


def test_a_stop_is_no_loss(data_dir, tmp_path, monkeypatch):
    whole, copy, calls = make_pairs(data_dir), str(tmp_path / "copy"), []
    shutil.copytree(data_dir, copy, ignore=shutil.ignore_patterns("reflow-*"))
    monkeypatch.setattr(latents, "EXAMPLES_PER_SHARD", 6)
    write_shard = latents.write_shard

    def write(path, info, examples):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write_shard(path, info, examples)

    monkeypatch.setattr(latents, "write_shard", write)
    with pytest.raises(KeyboardInterrupt):
        make_pairs(copy)
    place = make_pairs(copy)
    assert make_pairs(copy) == place and len(calls) == 4  # three shards, one of them twice
    for found, expected in zip(open_records(place, "train"), open_records(whole, "train"), strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_pairs_depend_on():
    sampler, params = make_teacher("patch")

    def digest(sampler=sampler, params=params, unet=UNET, **changes):
        return reflow._digest(sampler, unet, params, make_section(**changes))

    others = [
        digest(params={name: 2 * x for name, x in params.items()}),
        digest(make_teacher("kl")[0]),
        digest(Sampler(bend, sampler.codec, sampler.code, jnp.ones((1, 2)))),
        digest(unet=UNetConfig(skip=True)),
        digest(steps=STEPS + 1),
        digest(draws=DRAWS + 1),
    ]
    assert len({digest(), *others}) == len(others) + 1
    assert digest(share=0.25) == digest(unet=UNetConfig(remat="full")) == digest()


def test_reflow_straightens(data_dir):
    """Paths of the student from masks to images, and where its one step ends, against the teacher's."""
    sampler, params = make_teacher("patch")
    optimizer = optax.adam(1e-2)
    step = jax.jit(make_train_step(sampler, optimizer, make_config(), parallel.make_mesh()))
    state = make_state(params, optimizer)
    with make_train_iterator(make_pairs(data_dir), 16, share=1.0) as batches:
        for _ in range(60):
            state, _ = step(state, sampler.frozen, next(batches), jax.random.key(0))
    label = jnp.asarray(np.stack([x["label"] for x in open_records(data_dir, "val")]))
    z1 = encode(sampler, label, jnp.arange(10_000, 10_000 + len(label)))  # of no pair

    @jax.jit
    def path(weights):
        return solve.path(lambda z, t: bend(weights, z, t, None), z1, STEPS + 1, to_mask=False, steps=STEPS)

    paths = {"teacher": path(params), "student": path(state["params"])}
    bent, straight = (float(straightness(x)[1].mean()) for x in paths.values())
    errors = [float(jnp.square(z1 + STEPS * (x[1] - z1) - paths["teacher"][-1]).mean()) for x in paths.values()]
    assert straight < 0.25 * bent and errors[1] < 0.4 * errors[0]


@pytest.fixture(scope="module")
def flow_data_dir(tmp_path_factory):
    return test_start.make_data(tmp_path_factory.mktemp("small"), test_start.SIZE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reflow.share": 1.5}, r"reflow.share: must be a probability in \[0, 1\], got 1.5"),
        ({"reflow.share": -0.1}, r"reflow.share: must be a probability in \[0, 1\], got -0.1"),
        ({"reflow.steps": 0}, "reflow.steps: at least 1, got 0"),
        ({"reflow.draws": 0}, "reflow.draws: at least 1, got 0"),
        ({"init": ""}, "init: reflow.share needs a trained flow to learn from, got ''"),
        ({"data.crop_scale": (0.5, 1.0)}, "reflow.share: only flips are possible"),
        ({"data.jitter": 0.2}, "reflow.share: only flips are possible"),
    ],
)
def test_bad_values(saved, flow_data_dir, tmp_path, changes, message):
    changes = {"init": str(saved), "reflow.share": 0.5} | changes
    c = test_start.make_config(flow_data_dir, changes.pop("init"), **changes)
    with pytest.raises(UserError, match=message) as caught:
        make_setup(c, tmp_path)
    assert "\n" not in str(caught.value)


def test_stable_diffusion_is_no_flow_yet(saved, flow_data_dir, tmp_path, monkeypatch):
    """Its weights come without a mask code."""
    monkeypatch.setattr(setup, "find_start", lambda c: dataclasses.replace(find_start(c), code=None))
    c = test_start.make_config(flow_data_dir, saved, **{"reflow.share": 0.5})
    with pytest.raises(UserError, match="init: reflow.share needs a trained flow to learn from"):
        make_setup(c, tmp_path)


@pytest.mark.slow
def test_a_run_learns_from_the_pairs_of_the_flow_it_starts_from(saved, flow_data_dir, tmp_path):
    def train(workdir, **changes):
        parts = make_setup(test_start.make_config(flow_data_dir, saved, **changes), workdir)
        return parts, loop.train(parts, workdir)["params"]

    parts, straight = train(tmp_path / "straight", **{"reflow.share": 1.0, "reflow.steps": 2})
    teacher = make_tiny_flow()
    pairs = open_records(parts.train_dir, "train")
    label = jnp.asarray(np.stack([pair["label"] for pair in pairs]))
    draw = jnp.asarray(np.stack([pair["draw"][0, 0] for pair in pairs]))
    z0 = teacher.sampler.to_image(teacher.params, teacher.frozen, encode(teacher.sampler, label, draw), 2, "euler")
    np.testing.assert_allclose(np.stack([pair["own"][0, 0] for pair in pairs]), z0, rtol=4e-3, atol=4e-3)
    _, usual = train(tmp_path / "usual", **{"data.latents": True})
    assert any((x != usual[name]).any() for name, x in straight.items())
