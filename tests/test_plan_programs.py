"""plan/programs.py: the programs of a run, from its config alone."""

import importlib

import jax
import numpy as np
import pytest

from semflow_jax.codec import fit_patch_codec, make_patch_codec
from semflow_jax.errors import UserError
from semflow_jax.mask_code import fit_linear_code
from semflow_jax.plan.flops import count_jaxpr
from semflow_jax.plan.programs import NAMES, NUM_CLASSES, find_num_classes, make_programs


def load(name: str, **changes):
    c = importlib.import_module(f"configs.{name}").get_config()
    with c.unlocked():
        c.update_from_flattened_dict(changes)
    return c


SMALL = {
    "data.size": (16, 16),
    "batch_size": 4,
    "eval.batch_size": 2,
    "model.block_out_channels": (8, 8),
    "model.attention": (False, False),
    "model.num_heads": (2, 2),
    "model.num_groups": 4,
}


def sizes(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def test_arrays_that_would_be_fitted():
    """Their shapes are those of `whiten.fit` and `fit_linear_code`."""
    rng = np.random.default_rng(0)
    codec = make_patch_codec(4, fit_patch_codec(rng.integers(0, 256, (4, 16, 16, 3), np.uint8), 4, 0.5))
    code = fit_linear_code(rng.integers(0, 7, (4, 16, 16, 1)).astype(np.uint8), 7, codec, 0.5)
    programs = make_programs(load("quickstart", **SMALL), jax.devices()[:1], 7)
    for name in NAMES:
        frozen = programs[name]().args[1]
        for part, arrays in (("codec", codec.params), ("code", code)):
            assert {k: (x.shape, x.dtype) for k, x in frozen[part].items()} == {
                k: (x.shape, x.dtype) for k, x in arrays.items()
            }


def test_arrays_of_balanced_colours():
    c = load("base", **SMALL, **{"mask_code.balance": "minmax"})
    frozen = make_programs(c, jax.devices()[:1], 7)["segment"]().args[1]
    assert {name: x.shape for name, x in frozen["code"].items()} == {"scale": (48,), "shift": (48,)}


def test_work_of_the_directions():
    """Ten steps of the solver each; training is three times a step, and has more images."""
    c = load("quickstart", **SMALL)
    programs = make_programs(c, jax.devices()[:1], find_num_classes(c))
    flops = {}
    for name in NAMES:
        program = programs[name]()
        flops[name] = count_jaxpr(program.trace().jaxpr.jaxpr, program.turns) / program.num_images
    assert flops["segment"] == pytest.approx(flops["synthesize"], rel=0.02)
    assert flops["train"] == pytest.approx(3 / 10 * flops["segment"], rel=0.15)  # the codec's work apart


@pytest.mark.slow
def test_stable_diffusion_without_its_weights():
    c = load("coco_stuff")
    program = make_programs(c, jax.devices()[:1], find_num_classes(c))["train"]()
    state, frozen, batch, _ = program.args
    assert sizes(state["params"]) == 859_520_964
    assert sizes(state) == pytest.approx(4 * sizes(state["params"]), rel=1e-6)  # average, two moments
    assert sizes(frozen["codec"]) == 83_653_863 and frozen["context"].shape == (77, 768)
    assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
        "image": ((128, 512, 512, 3), "uint8"),
        "label": ((128, 512, 512, 1), "uint8"),
        "index": ((128,), "int32"),
    }


@pytest.mark.parametrize(("codec", "moments"), [("kl", {"mean", "std"}), ("taesd", {"mean"})])
@pytest.mark.slow
def test_kept_latents_of_a_reduced_network(codec, moments):
    c = load("coco_stuff", **{"data.latents": True, "batch_size": 8, "codec.name": codec})
    state, frozen, batch, _ = make_programs(c, jax.devices()[:1], 171, reduced=True)["train"]().args
    assert set(batch) == moments | {"label", "index"}
    assert {(batch[name].shape, batch[name].dtype.name) for name in moments} == {((8, 64, 64, 4), "float16")}
    assert sizes(frozen["codec"]) == (83_653_863 if codec == "kl" else 2_445_063)
    assert sizes(state["params"]) < 0.7 * 859_520_964


def test_kept_masks():
    c = load("coco_stuff", **{"data.latents": True, "batch_size": 8, "codec.name": "taesd", "data.mask_draws": 2})
    batch = make_programs(c, jax.devices()[:1], 171, reduced=True)["train"]().args[2]
    assert batch["mask"].shape == batch["mean"].shape and set(batch) == {"mean", "mask", "label", "index"}


def test_numbers_of_classes():
    assert NUM_CLASSES["coco_stuff"] == 171 and NUM_CLASSES["cityscapes"] == 19 and NUM_CLASSES["ade20k"] == 150
    with pytest.raises(UserError, match="--classes: the number of classes needed, data 'folder'"):
        find_num_classes(load("base"))


def test_bad_configs_are_told_as_by_a_run():
    with pytest.raises(UserError, match="mesh: data x fsdp x tensor must be the number of devices"):
        make_programs(load("quickstart", **{"mesh.fsdp": 3}), jax.devices()[:1], 7)
    with pytest.raises(UserError, match="size: height and width must be multiples of"):
        make_programs(load("quickstart", **{"data.size": (18, 18)}), jax.devices()[:1], 7)
