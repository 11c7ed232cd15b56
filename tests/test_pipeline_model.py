"""pipeline.py: a model saved and opened again is the same model, and bad input is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_unet import make_random_params

from semflow_jax.codec import fit_patch_codec, make_patch_codec
from semflow_jax.data.info import VOID
from semflow_jax.errors import UserError
from semflow_jax.mask_code import fit_linear_code, make_mask_code
from semflow_jax.models.unet import UNetConfig
from semflow_jax.pipeline import CONFIG, FROZEN, WEIGHTS, SemFlow, find_model
from semflow_jax.sampling import to_uint8
from semflow_jax.weights.load import load_safetensors, save_safetensors

SIZE = (8, 12)
CLASS_NAMES = ("road", "sky", "tree")


def make_pictures(num: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of noise, void included."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, (num, *SIZE, 1)).astype(np.uint8)
    label[0, 0, 0] = VOID
    return rng.integers(0, 256, (num, *SIZE, 3), np.uint8), label


def make_tiny_flow() -> SemFlow:
    """An untrained flow with every kind of array: network, whitened codec, fitted mask code."""
    images, labels = make_pictures(40)
    model = {
        "in_channels": 48,
        "out_channels": 48,
        "block_out_channels": [8],
        "layers_per_block": 1,
        "attention": [True],
        "num_heads": [2],
        "cross_attention_dim": None,
        "num_groups": 4,
        "skip": True,
    }
    config = {
        "objective": "semflow",
        "model": model,
        "codec": {"name": "patch", "factor": 4},
        "mask_code": {"name": "linear", "palette": "spread", "pixel": 0.3, "region": 1.0, "whiten": 0.5},
        "sampling": {"solver": "euler", "steps": 2},
        "data": {
            "name": "toys",
            "class_names": list(CLASS_NAMES),
            "size": list(SIZE),
            "flip_pairs": [],
            "license": "CC0",
            "attribution": "The attic.",
            "recipe": {},
        },
    }
    unet = UNetConfig(**{key: tuple(x) if isinstance(x, list) else x for key, x in model.items()})
    codec = make_patch_codec(4, fit_patch_codec(images, 4, 0.5))
    code = make_mask_code(ConfigDict(config["mask_code"]), codec, 3, fit_linear_code(labels, 3, codec, 0.5))
    return SemFlow(config, make_random_params(unet), codec, code, card="# A card")


def test_a_saved_model_is_the_same_bit_by_bit(flow, saved):
    again = SemFlow.from_pretrained(saved)
    assert (again.config, again.info, again.card) == (flow.config, flow.info, flow.card)
    assert again.params.keys() == flow.params.keys()
    jax.tree.map(np.testing.assert_array_equal, again.params, flow.params)
    jax.tree.map(np.testing.assert_array_equal, again.frozen, flow.frozen)
    images, labels = make_pictures()
    np.testing.assert_array_equal(again.segment(images), flow.segment(images))
    key = jax.random.key(1)
    np.testing.assert_array_equal(
        again.synthesize(labels, key=key, num_samples=2), flow.synthesize(labels, key=key, num_samples=2)
    )


def test_saving_twice_gives_equal_files(flow, saved, tmp_path):
    SemFlow.from_pretrained(saved).save_pretrained(tmp_path)
    for name in (CONFIG, FROZEN, WEIGHTS, "README.md"):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


def test_weights_lie_as_pytorch_wants_them(flow, saved):
    tensors = load_safetensors(saved / WEIGHTS)
    assert tensors["conv_in.weight"].shape == (8, 48, 3, 3)
    np.testing.assert_array_equal(
        tensors["conv_in.weight"], np.asarray(flow.params["conv_in.weight"]).transpose(3, 2, 0, 1)
    )
    np.testing.assert_array_equal(
        tensors["time_embedding.linear_1.weight"], np.asarray(flow.params["time_embedding.linear_1.weight"]).T
    )


def test_half_precision_halves_the_weights_and_computes_in_float32(flow, tmp_path):
    flow.save_pretrained(tmp_path, dtype="float16")
    assert load_safetensors(tmp_path / WEIGHTS)["conv_in.weight"].dtype == np.float16
    again = SemFlow.from_pretrained(tmp_path)
    for path, x in again.params.items():
        assert x.dtype == jnp.float32
        np.testing.assert_array_equal(x, flow.params[path].astype(jnp.float16).astype(jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, again.frozen, flow.frozen)  # these are never rounded


def test_another_type_may_compute(saved):
    half = SemFlow.from_pretrained(saved, dtype="bfloat16")
    assert half.unet.dtype == "bfloat16" and half.params["conv_in.weight"].dtype == jnp.float32


def test_segmentation_is_deterministic_and_says_class_ids(flow):
    images, _ = make_pictures()
    labels = flow.segment(images)
    assert labels.shape == (3, *SIZE, 1) and labels.dtype == np.uint8 and labels.max() < 3
    np.testing.assert_array_equal(labels, flow.segment(images))
    np.testing.assert_array_equal(flow.segment(images[1:2]), labels[1:2])


def test_samples_differ_and_follow_the_key(flow):
    _, labels = make_pictures()
    samples = flow.synthesize(labels, key=jax.random.key(0), num_samples=3)
    assert samples.shape == (3, 3, *SIZE, 3) and samples.dtype == np.uint8
    assert (samples[0] != samples[1]).any() and (samples[1] != samples[2]).any()
    np.testing.assert_array_equal(samples, flow.synthesize(labels, key=jax.random.key(0), num_samples=3))
    assert (samples != flow.synthesize(labels, key=jax.random.key(1), num_samples=3)).any()


def test_steps_and_solver_default_to_the_configs(flow):
    images, _ = make_pictures()
    np.testing.assert_array_equal(flow.segment(images), flow.segment(images, steps=2, solver="euler"))
    with pytest.raises(UserError, match="steps: at least 1, got 0"):
        flow.segment(images, steps=0)
    with pytest.raises(UserError, match="solver: one of .*, got 'magic'"):
        flow.segment(images, solver="magic")


def test_pieces_fit_together(flow):
    """One Euler step by hand is what `segment` does with one step."""
    images, _ = make_pictures()
    z0 = flow.encode(jnp.asarray(images, jnp.float32) / 127.5 - 1)
    np.testing.assert_array_equal(to_uint8(flow.decode(z0)), images)
    z1 = z0 + flow.velocity(z0, jnp.zeros(3))
    np.testing.assert_array_equal(flow.sampler.decode_mask(flow.frozen, z1), flow.segment(images, steps=1))


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (np.zeros((8, 12, 3), np.uint8), r"uint8 of shape \[b, h, w, 3\] expected, got uint8 \[8, 12, 3\]"),
        (np.zeros((1, 8, 12, 1), np.uint8), r"got uint8 \[1, 8, 12, 1\]"),
        (np.zeros((1, 8, 12, 3), np.float32), r"got float32 \[1, 8, 12, 3\]"),
        (np.zeros((1, 9, 12, 3), np.uint8), r"multiples of 4 .*got 9 x 12; use 8 x 12"),
    ],
)
def test_bad_images(flow, pictures, message):
    """Below the signature, whose shapes the tests check for themselves."""
    with pytest.raises(UserError, match=message) as caught:
        flow._check(pictures, 3)
    assert "\n" not in str(caught.value)


def test_bad_class_ids(flow):
    labels = np.full((1, *SIZE, 1), 3, np.uint8)
    with pytest.raises(UserError, match=r"class ids 0..2 or 255 expected, got 3"):
        flow.synthesize(labels, key=jax.random.key(0))
    flow._check(np.full((1, *SIZE, 1), VOID, np.uint8), 1)


def test_where_models_are_found(saved, tmp_path, monkeypatch):
    assert find_model(str(saved)) == saved
    assert find_model(str(saved.parent)) == saved  # the workdir of a run
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="checkpoint nowhere: .*these come with the package: avatars"):
        SemFlow.from_pretrained("nowhere")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("{", "a JSON file expected"),
        ("{}", "the config of a model expected, found KeyError: 'model'"),
        ('{"model": {"wings": 2}}', "the config of a model expected, found TypeError.*wings"),
    ],
)
def test_a_broken_config(tmp_path, content, found):
    save_safetensors(tmp_path / FROZEN, {})
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(UserError, match=f"config.json: {found}"):
        SemFlow.from_pretrained(tmp_path)


def test_a_saved_model_keeps_its_colours(flow, tmp_path):
    flow.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["colours"] == flow.code.colours.tolist()
    config["colours"] = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert SemFlow.from_pretrained(tmp_path).code.colours.tolist() == config["colours"]
    (tmp_path / CONFIG).write_text(json.dumps(config | {"colours": [[1, 2, 3]]}))
    with pytest.raises(UserError, match=r"found ValueError: 3 classes with \[1, 3\] colours"):
        SemFlow.from_pretrained(tmp_path)


def test_broken_weights(flow, tmp_path):
    flow.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(UserError, match="must be a whole safetensors file"):
        SemFlow.from_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(UserError, match="checkpoints: a checkpoint expected, found none yet"):
        SemFlow.from_pretrained(tmp_path)


def test_weights_of_another_config(flow, tmp_path):
    flow.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["model"]["layers_per_block"] = 2
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="parameters without a key .*resnets.1"):
        SemFlow.from_pretrained(tmp_path)
