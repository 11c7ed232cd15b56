"""From a config to the programs of a run, lowered for any devices, without data and without weights.

Arrays are shapes and types. Where `init` names weights that are not on this machine, the networks are Stable Diffusion
1.5's; a codec whose weights are missing has their shapes.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from semflow_jax import latents, learned_code, parallel
from semflow_jax.codec import Codec, load_codec, make_kl_codec, make_patch_codec, make_tiny_codec
from semflow_jax.coupling import couple
from semflow_jax.data.records import load_info
from semflow_jax.data.sources import ade20k, avatars, celebamask_hq, cityscapes, coco_stuff
from semflow_jax.errors import UserError
from semflow_jax.mask_code import NUM_TINT, abstract_balance, make_mask_code
from semflow_jax.models.build import Abstract, abstract_unet, make_fns, make_velocity_fn
from semflow_jax.models.tiny_vae import TINY_VAES, TinyVAE
from semflow_jax.models.unet_config import UNetConfig
from semflow_jax.models.vae import AutoencoderKL, VAEConfig
from semflow_jax.sampling import Frozen, Sampler
from semflow_jax.train.optim import make_optimizer
from semflow_jax.train.setup import check_mesh, check_values
from semflow_jax.train.start import FREE, find_start
from semflow_jax.train.step import make_state, make_train_step

NAMES = ("train", "segment", "synthesize")
NUM_CLASSES = {  # of the data sets that know them before they are prepared
    "ade20k": len(ade20k.CLASS_NAMES),
    "avatars": len(avatars.CLASS_NAMES),
    "celebamask_hq": len(celebamask_hq.CLASS_NAMES),
    "cityscapes": len(cityscapes.CLASSES),
    "coco_stuff": len(coco_stuff.CLASS_NAMES),
}
CONTEXT = (77, 768)  # of SD-1.5's text tower


@dataclasses.dataclass(frozen=True)
class Program:
    """Attributes:
    name: one of NAMES.
    function: what is compiled.
    args: its arguments: shapes, types and shardings.
    donated: places of those that it may write its result to.
    num_images: that a call is about.
    turns: of its solver's loop; None where there is none.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    donated: tuple[int, ...]
    num_images: int
    turns: int | None

    def trace(self) -> jax.stages.Traced:
        return jax.jit(self.function, donate_argnums=self.donated).trace(*self.args)


def find_num_classes(c: ConfigDict) -> int:
    """Classes of a config's data set, prepared or not.

    Raises:
        UserError: not prepared, and one of those that only their files can tell.
    """
    if c.data.dir is not None and pathlib.Path(c.data.dir).is_dir():
        return load_info(c.data.dir).num_classes
    if c.data.name not in NUM_CLASSES:
        raise UserError(
            f"--classes: the number of classes needed, data {c.data.name!r} that are not prepared don't tell; pass it"
        )
    return NUM_CLASSES[c.data.name]


def make_programs(
    c: ConfigDict, devices: Sequence[jax.Device], num_classes: int, reduced: bool = False
) -> dict[str, Callable[[], Program]]:
    """The programs of a run by name, each of them made when it is called for.

    Args: reduced: one block per level of the network.

    Raises:
        UserError: as the run itself would, for what does not fit together or the devices.
    """
    mesh = parallel.make_mesh(c.mesh, devices)
    check_values(c)
    check_mesh(c, mesh)
    unet, sampler, frozen = _make_parts(c, num_classes, reduced)
    optimizer = make_optimizer(c.optim, c.num_steps)
    state = jax.eval_shape(lambda params: make_state(params, optimizer), abstract_unet(unet))
    state = _place(state, parallel.shardings(state, mesh))
    frozen = _everywhere(frozen, mesh)
    key = _everywhere(jax.eval_shape(lambda: jax.random.key(0)), mesh)
    solver = {"steps": c.sampling.steps, "solver": c.sampling.solver}

    def examples(num: int) -> dict[str, jax.ShapeDtypeStruct]:
        batch = _abstract_batch(c, num)
        return _place(batch, {name: parallel.batch_sharding(mesh) for name in batch})

    def train() -> Program:
        step = make_train_step(sampler, optimizer, c, mesh)
        batch = examples(c.batch_size)
        if c.data.latents or c.reflow.share:
            kept = _abstract_moments(sampler.codec, batch.pop("image"))
            if c.reflow.share:
                kept["draw"] = jax.ShapeDtypeStruct((c.batch_size,), jnp.int32)
            elif latents.num_kept(sampler.code, c.data.mask_draws):
                kept["mask"] = kept["mean"]
            batch |= _place(kept, {name: parallel.batch_sharding(mesh) for name in kept})
        return Program("train", step, (state, frozen, batch, key), (0,), c.batch_size, None)

    def segment() -> Program:
        num, function = c.eval.batch_size, functools.partial(sampler.segment, **solver)
        args = (state["params"], frozen, examples(num)["image"])
        return Program("segment", function, args, (), num, c.sampling.steps)

    def synthesize() -> Program:
        num, function = c.eval.batch_size, functools.partial(sampler.synthesize, **solver)
        args = (state["params"], frozen, examples(num)["label"], key)
        return Program("synthesize", function, args, (), num, c.sampling.steps)

    return {"train": train, "segment": segment, "synthesize": synthesize}


def _place(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings)


def _everywhere(tree: Any, mesh: Mesh) -> Any:
    return _place(tree, jax.tree.map(lambda _: parallel.replicated(mesh), tree))


def _abstract_batch(c: ConfigDict, num: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A training batch as `data/pipeline.py` makes it."""
    return {
        "image": jax.ShapeDtypeStruct((num, *c.data.size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((num, *c.data.size, 1), jnp.uint8),
        "index": jax.ShapeDtypeStruct((num,), jnp.int32),
    }


def _abstract_moments(codec: Codec, image: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
    """What `latents.py` keeps of images."""
    moments = jax.eval_shape(codec.moments, codec.params, jax.ShapeDtypeStruct(image.shape, jnp.float32))
    found = zip(("mean", "std"), moments, strict=True)
    return {name: jax.ShapeDtypeStruct(x.shape, jnp.float16) for name, x in found if x is not None}


def _make_parts(c: ConfigDict, num_classes: int, reduced: bool) -> tuple[UNetConfig, Sampler, Frozen]:
    """The network's shape, a sampler, and its frozen arrays, abstract where they are not at hand."""
    context: Any = None
    if c.init and not pathlib.Path(os.path.expandvars(c.init)).expanduser().exists():
        unet = UNetConfig(**{key: c.model[key] for key in FREE})
        unet.check()
        codec, code, context = _abstract_codec(c.codec), None, jax.ShapeDtypeStruct(CONTEXT, jnp.float32)
    else:
        start = find_start(c)
        unet, codec, code, context = start.unet, start.codec, start.code, start.context
    if reduced:
        unet = dataclasses.replace(unet, layers_per_block=1)
    codec.latent_shape(tuple(c.data.size), unet.factor)
    if code is None:
        fitted: Abstract = {}
        if c.codec.name == "patch" and c.codec.whiten:
            codec = make_patch_codec(c.codec.factor, _abstract_whitening(codec.channels, codec.channels))
        if c.mask_code.name == "linear":
            fitted = _abstract_whitening(codec.factor**2 * num_classes, codec.channels - NUM_TINT)
        elif c.mask_code.name == "learned":
            fitted = learned_code.abstract_params(c.mask_code, codec, num_classes)
        else:
            fitted = abstract_balance(c.mask_code, codec)
        codec, code = couple(c.objective, codec, make_mask_code(c.mask_code, codec, num_classes, fitted))
    sampler = Sampler(make_velocity_fn(unet), codec, code)
    return unet, sampler, sampler.frozen if context is None else sampler.frozen | {"context": context}


def _abstract_whitening(num_inputs: int, num_components: int) -> Abstract:
    """The arrays of `whiten.fit`."""
    n, c = num_inputs, num_components
    shapes = {"analysis": (n, c), "synthesis": (c, n), "mean": (n,)}
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def _abstract_codec(c: ConfigDict) -> Codec:
    """The codec of a config, with the published weights' shapes."""
    if c.name == "kl":
        vae = VAEConfig(dtype=c.dtype)
        return make_kl_codec(vae, make_fns(lambda rngs: AutoencoderKL(vae, rngs=rngs))[0])
    if c.name in TINY_VAES:
        return make_tiny_codec(c.name, make_fns(lambda rngs: TinyVAE(TINY_VAES[c.name], rngs=rngs))[0])
    return load_codec(c)
