"""latents.py and what reads them: the latents that are kept are the codec's, and training from them is training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_folder import make_folder
from test_setup import make_config

from configs import base
from semflow_jax import latents, learned_code
from semflow_jax.codec import make_kl_codec, make_patch_codec, sample
from semflow_jax.data.balance import find_classes
from semflow_jax.data.inspect import inspect
from semflow_jax.data.pipeline import make_train_iterator
from semflow_jax.data.prepare import prepare
from semflow_jax.data.records import load_info, open_records
from semflow_jax.data.transforms import mirror_label
from semflow_jax.errors import UserError
from semflow_jax.latents import ensure_latents
from semflow_jax.mask_code import make_mask_code
from semflow_jax.models.build import make_fns
from semflow_jax.models.vae import AutoencoderKL, VAEConfig
from semflow_jax.sampling import Sampler, to_float
from semflow_jax.train import loop
from semflow_jax.train.setup import make_setup
from semflow_jax.train.writer import read_metrics

SIZE, NUM = (16, 24), 20


@pytest.fixture
def data_dir(tmp_path):
    return make_data(tmp_path)


def make_data(folder):
    """Classes that have a side."""
    root = make_folder(folder / "toys", NUM, size=SIZE)
    (root / "classes.json").write_text('["sky", "left_eye", "right_eye"]')
    prepare("folder", folder / "data", source=root, size=SIZE, progress=False)
    return str(folder / "data")


@functools.cache
def make_codec(kind: str):
    """A codec that is a distribution, and one that is none."""
    if kind == "patch":
        return make_patch_codec(2, {})
    config = VAEConfig(block_out_channels=(4, 8), layers_per_block=1, num_groups=2)
    abstract, _ = make_fns(lambda rngs: AutoencoderKL(config, rngs=rngs))
    rng = np.random.default_rng(0)
    return make_kl_codec(
        config, {path: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype) for path, x in abstract.items()}
    )


def make_code(codec):
    c = ConfigDict({"name": "colour", "palette": "spread", "pixel": 0.1, "region": 0.0})
    return make_mask_code(c, codec, 3, {})


@pytest.mark.parametrize("kind", ["patch", "kl"])
def test_moments_of_image_and_mirror_image(data_dir, kind):
    codec = make_codec(kind)
    place = ensure_latents(data_dir, codec, progress=False)
    records = open_records(data_dir, "train")
    found = open_records(place, "train")
    assert len(found) == len(records)
    for example, kept in zip(records, found, strict=True):
        assert kept["id"] == example["id"]
        np.testing.assert_array_equal(kept["label"], example["label"])
        both = np.stack([example["image"], example["image"][:, ::-1]])
        for name, expected in zip(
            ("mean", "std"), codec.moments(codec.params, to_float(jnp.asarray(both))), strict=True
        ):
            assert (name in kept) == (expected is not None)
            if expected is not None:
                assert kept[name].dtype == np.float16
                np.testing.assert_allclose(kept[name], expected, rtol=2e-3, atol=2e-3)


def test_once_is_enough_and_a_stop_is_no_loss(data_dir, monkeypatch):
    codec, calls = make_codec("patch"), []
    monkeypatch.setattr(latents, "EXAMPLES_PER_SHARD", 6)
    write_shard = latents.write_shard

    def write(path, info, examples):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write_shard(path, info, examples)

    monkeypatch.setattr(latents, "write_shard", write)
    with pytest.raises(KeyboardInterrupt):
        ensure_latents(data_dir, codec, progress=False)
    with pytest.raises(UserError, match="no such folder"):
        load_info(f"{data_dir}/latents-patch-{latents.parallel.digest(codec.params)[:12]}")
    place = ensure_latents(data_dir, codec, progress=False)
    assert len(calls) == 4  # three shards, one of them twice
    assert ensure_latents(data_dir, codec, progress=False) == place and len(calls) == 4
    assert [example["id"] for example in open_records(place, "train")] == [
        example["id"] for example in open_records(data_dir, "train")
    ]
    inspect(data_dir, verify=True)  # the folder is what it was


def test_other_weights_are_other_latents(data_dir):
    codec = make_codec("kl")
    changed = make_kl_codec(VAEConfig(**codec.config["vae"]), {path: 2 * x for path, x in codec.params.items()})
    assert ensure_latents(data_dir, codec, progress=False) != ensure_latents(data_dir, changed, progress=False)


def test_flips_choose_the_mirror_image_and_its_label(data_dir):
    place = ensure_latents(data_dir, make_codec("patch"), progress=False)
    records = {example["mean"].tobytes(): example for example in open_records(place, "train")}
    by_side = {x["mean"][side].tobytes(): (side, x["label"]) for x in records.values() for side in (0, 1)}
    sides = []
    with make_train_iterator(place, 4, seed=1) as batches:
        for _ in range(12):
            batch = next(batches)
            assert batch.keys() == {"mean", "label", "index"}
            for mean, label in zip(batch["mean"], batch["label"], strict=True):
                side, expected = by_side[mean.tobytes()]
                swapped = np.array([0, 2, 1], np.uint8)[expected[:, ::-1]]
                np.testing.assert_array_equal(label, swapped if side else expected)
                sides.append(side)
    assert 0.25 < np.mean(sides) < 0.75


def test_their_examples_have_the_same_classes(data_dir):
    place = ensure_latents(data_dir, make_codec("patch"), progress=False)
    classes = find_classes(place, "train", progress=False)
    assert len(classes) == len(open_records(data_dir, "train")) and any(classes)
    assert classes == find_classes(data_dir, "train", progress=False)
    ours, theirs = (make_train_iterator(folder, 4, balance=0.5).ids(0, 9) for folder in (place, data_dir))
    assert ours == theirs


@pytest.mark.parametrize("options", [{"crop_scale": (0.5, 1.0)}, {"jitter": 0.2}])
def test_only_flips(data_dir, options):
    place = ensure_latents(data_dir, make_codec("patch"), progress=False)
    with pytest.raises(UserError, match="data.latents: only flips are possible"):
        make_train_iterator(place, 4, **options)


def test_images_of_different_sizes_are_refused(tmp_path):
    root = make_folder(tmp_path / "toys", 4, size=(20, 48))
    prepare("folder", tmp_path / "data", source=root, size=(16, 16), fit="cover", progress=False)
    with pytest.raises(UserError, match="images of one size expected for latents, found fit cover"):
        ensure_latents(str(tmp_path / "data"), make_codec("patch"), progress=False)


@pytest.mark.parametrize("kind", ["patch", "kl"])
def test_the_step_sees_what_it_would_see(data_dir, kind):
    """The same key draws the same z_0 from kept moments as from pixels, up to float16."""
    codec = make_codec(kind)
    place = ensure_latents(data_dir, codec, progress=False)
    sampler = Sampler(lambda *_: None, codec, make_code(codec))
    records, kept = open_records(data_dir, "train"), open_records(place, "train")
    image = np.stack([records[i]["image"] for i in range(3)])
    batch = {name: jnp.stack([kept[i][name][0] for i in range(3)]) for name in kept[0] if name in ("mean", "std")}
    key, frozen = jax.random.key(3), {"codec": codec.params}
    from_pixels = sampler.image_latent(frozen, {"image": jnp.asarray(image)}, key)
    np.testing.assert_allclose(sampler.image_latent(frozen, batch, key), from_pixels, rtol=4e-3, atol=4e-3)
    differs = sampler.image_latent(frozen, batch, jax.random.key(4)) != sampler.image_latent(frozen, batch, key)
    assert differs.any() == (kind == "kl")


def test_samples_have_the_moments():
    mean, std = jnp.full((50_000,), 3.0), jnp.full((50_000,), 0.5)
    z = sample(mean, std, jax.random.key(0))
    assert z.mean() == pytest.approx(3, abs=0.01) and z.std() == pytest.approx(0.5, abs=0.01)
    np.testing.assert_array_equal(sample(mean, std, None), mean)
    np.testing.assert_array_equal(sample(mean, None, jax.random.key(0)), mean)


@pytest.mark.long
@pytest.mark.slow
def test_a_run_from_latents_is_a_run_from_pixels(data_dir, tmp_path):
    """Losses of a codec that is no distribution, step by step."""
    losses = {}
    for kept in (False, True):
        changes = {"data.latents": kept, "codec.whiten": 0.0, "data.flip": 0.0, "num_steps": 3, "log_every": 1}
        changes |= {"batch_size": 4, "eval.batch_size": 4, "eval.limit": 4, "sampling.steps": 1}
        setup = make_setup(make_config(data_dir, **changes), tmp_path / str(kept))
        assert (setup.train_dir != data_dir) == kept
        loop.train(setup, tmp_path / str(kept))
        losses[kept] = [row["loss"] for row in read_metrics(tmp_path / str(kept)) if "loss" in row]
    assert len(losses[True]) == 3
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-3)


def test_masks_are_kept_for_a_code_of_the_codec(data_dir):
    """Of a mask and of its mirror image, whose eyes trade places; z_1 made of them is that of labels."""
    codec = make_codec("patch")
    c = base.get_config().mask_code
    c.update(
        {"name": "learned", "learned": {"encoder": "codec", "steps": 1, "width": 4, "pixel_width": 2, "blocks": 0}}
    )
    labels = [np.zeros((*SIZE, 1), np.uint8), np.ones((*SIZE, 1), np.uint8)]
    images = [np.arange(SIZE[0] * SIZE[1] * 3).astype(np.uint8).reshape(*SIZE, 3)]
    code = make_mask_code(c, codec, 3, learned_code.fit(labels, images, 3, codec, c, 0, progress=False)[0])
    place = ensure_latents(data_dir, codec, progress=False, code=code)
    assert place != ensure_latents(data_dir, codec, progress=False)
    plain, kept = open_records(data_dir, "train"), open_records(place, "train")
    label = plain[0]["label"]
    mirrored = mirror_label(label, load_info(data_dir).flip_pairs)
    assert np.any(mirrored != label[:, ::-1])
    expected = code.embed({}, jnp.stack([label, mirrored]))
    np.testing.assert_array_equal(kept[0]["mask"][:, 0], np.asarray(expected, np.float16))
    s = Sampler(lambda *_: None, codec, code)
    batch = {"label": jnp.asarray(label[None]), "mask": jnp.asarray(kept[0]["mask"][0])}
    z1 = s.mask_latent(s.frozen, batch, jax.random.key(0))
    np.testing.assert_allclose(z1, s.encode_mask(s.frozen, batch["label"], jax.random.key(0)), atol=5e-3)
    del batch["mask"]
    np.testing.assert_array_equal(
        s.mask_latent(s.frozen, batch, jax.random.key(0)), s.encode_mask(s.frozen, batch["label"], jax.random.key(0))
    )


def test_perturbations_are_kept_of_colours(data_dir):
    """Each of a mask and of its mirror image is another, as large as those of a step, which takes one of them."""
    codec, code = make_codec("patch"), make_code(make_codec("patch"))
    plain = ensure_latents(data_dir, codec, progress=False, code=code)
    assert plain == ensure_latents(data_dir, codec, progress=False)
    place = ensure_latents(data_dir, codec, progress=False, code=code, draws=3)
    assert len({plain, place, ensure_latents(data_dir, codec, progress=False, code=code, draws=2)}) == 3
    records, kept = open_records(data_dir, "train"), open_records(place, "train")
    mirrored = mirror_label(records[0]["label"], load_info(data_dir).flip_pairs)
    s = Sampler(lambda *_: None, codec, code)
    for side, label in enumerate((records[0]["label"], mirrored)):
        noise = kept[0]["mask"][side] - np.asarray(s.encode_mask(s.frozen, jnp.asarray(label[None])))
        assert noise.shape == (3, SIZE[0] // 2, SIZE[1] // 2, 12)
        assert np.abs(noise).max() == pytest.approx(0.05, rel=0.1)  # 0.1 (U - 0.5)
        assert np.abs(noise[0] - noise[1]).max() > 0.05 and np.abs(noise[0] - noise[2]).max() > 0.05
    of_label = {x["label"].tobytes(): x["mask"] for x in (kept[i] for i in range(len(kept)))}
    chosen = set()
    with make_train_iterator(place, 4, seed=1) as batches:
        for _ in range(20):
            batch = {name: jnp.asarray(x) for name, x in next(batches).items() if name in ("mask", "label")}
            z1 = np.asarray(s.mask_latent(s.frozen, batch, jax.random.key(0)))
            for mask, label in zip(z1, np.asarray(batch["label"]), strict=True):
                known = of_label.get(label.tobytes())
                if known is not None:  # and not mirrored
                    chosen |= {n for n in range(3) if np.array_equal(known[0, n], mask)}
    assert chosen == {0, 1, 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"data.mask_draws": -1},
        {"data.mask_draws": 2},
        {"data.mask_draws": 2, "mask_code.name": "linear"},
        {"data.mask_draws": 2, "mask_code.name": "colour", "reflow.share": 0.5},
    ],
)
def test_draws_that_nothing_keeps_are_refused(data_dir, tmp_path, changes):
    changes = {"data.latents": "mask_code.name" in changes, "codec.whiten": 0.0} | changes
    rule = "data.mask_draws: 0, or above it with data.latents, 'colour' and no reflow, got"
    with pytest.raises(UserError, match=rule):
        make_setup(make_config(data_dir, **changes), tmp_path)
