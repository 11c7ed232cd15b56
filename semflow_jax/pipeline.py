"""What a user imports: one model, both directions.

flow = SemFlow.from_pretrained("avatars")
labels = flow.segment(images)
images = flow.synthesize(labels, key=jax.random.key(0))
"""

import dataclasses
import functools
import importlib.resources
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8
from ml_collections import ConfigDict

from semflow_jax import coupling, solve
from semflow_jax.codec import Codec, make_codec, make_kl_codec, stored, vae_config
from semflow_jax.data.info import DataInfo
from semflow_jax.errors import UserError
from semflow_jax.mask_code import MaskCode, make_mask_code
from semflow_jax.models.build import Params, abstract_unet, make_velocity_fn
from semflow_jax.models.unet_config import DTYPES, UNetConfig
from semflow_jax.sampling import Sampler
from semflow_jax.weights.export import to_torch
from semflow_jax.weights.files import load_json
from semflow_jax.weights.load import fill, load_safetensors, prefixed, save_safetensors, split_prefixed
from semflow_jax.weights.orbax_file import load_averaged, load_orbax, save_orbax
from semflow_jax.weights.stable_diffusion import find_pretrained, load_context, load_unet, load_vae, save_diffusers

CONFIG, FROZEN, WEIGHTS, CARD = "config.json", "frozen.safetensors", "model.safetensors", "README.md"
ORBAX = "model.orbax"  # instead of WEIGHTS
EXPORT = "export"  # folder of a run that holds its model; the weights come last
FILE_FORMATS = ("safetensors", "orbax")
Context = Array | None  # [n d]

log = logging.getLogger(__name__)
OBJECTIVE = "semflow"  # of models that were saved before there was another
NUM_GRID = 216  # colours of the paper's palette


def shipped() -> dict[str, pathlib.Path]:
    """Models that come with the package, by name."""
    zoo = pathlib.Path(str(importlib.resources.files("semflow_jax"))) / "zoo"
    return {path.parent.name: path.parent for path in sorted(zoo.glob(f"*/{CONFIG}"))}


def is_saved(folder: pathlib.Path) -> bool:
    """Whether `save_frozen` wrote this folder."""
    return (folder / CONFIG).is_file() and (folder / FROZEN).is_file()


def find_model(
    path: str, revision: str | None = None, token: str | bool | None = None, offline: bool = False
) -> pathlib.Path:
    """The folder of a model: a folder, a run's workdir with its `export`, the name of a shipped model, or a download.

    Raises:
        UserError: none of these.
    """
    for folder in (pathlib.Path(path), pathlib.Path(path, EXPORT), shipped().get(path)):
        if folder is not None and is_saved(folder):
            return folder
    try:
        return find_pretrained(path, revision, token, offline, more=(CONFIG, FROZEN, WEIGHTS, f"{ORBAX}/*", CARD))
    except UserError as error:
        raise UserError(f"checkpoint {error}; these come with the package: {', '.join(shipped()) or 'none'}") from error


def save_frozen(folder: pathlib.Path, config: dict[str, Any], codec: Codec, code: MaskCode, context: Context) -> None:
    """Writes config.json, and the arrays of codec, mask code and context: everything but the network's weights."""
    arrays = prefixed({"codec": stored(codec), "code": code.params})
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(folder / FROZEN, arrays | ({} if context is None else {"context": np.asarray(context)}))
    # A palette is written out: a later version may choose other colours by the same name.
    (folder / CONFIG).write_text(json.dumps(config | {"colours": code.colours.tolist()}, indent=1))


def load_frozen(folder: pathlib.Path) -> tuple[dict[str, Any], Codec, MaskCode, Context]:
    """The inverse of `save_frozen`.

    Raises:
        UserError: a broken file, or a config that is none.
    """
    config, arrays = load_json(folder / CONFIG), load_safetensors(folder / FROZEN)
    groups = split_prefixed(arrays, ("codec", "code"))
    try:
        make_unet_config(config).check()
        codec = make_codec(config["codec"], groups["codec"])
        num_classes = DataInfo.from_dict(config["data"]).num_classes
        fitted = {name: jnp.asarray(x) for name, x in groups["code"].items()}
        colours = np.array(config.pop("colours"), np.uint8)
        if colours.shape != (num_classes, 3):
            raise ValueError(f"{num_classes} classes with {list(colours.shape)} colours")
        code = make_mask_code(ConfigDict(config["mask_code"]), codec, num_classes, fitted, colours)
        codec, code = coupling.couple(config.setdefault("objective", OBJECTIVE), codec, code)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        rule, found = "the config of a model expected", f"{type(error).__name__}: {error}"
        raise UserError(f"{folder / CONFIG}: {rule}, found {found}; export it again") from error
    context = arrays.get("context")
    return config, codec, code, None if context is None else jnp.asarray(context)


class SemFlow:
    """A trained flow. Arrays in, arrays out; pictures are uint8, or float in [-1, 1] where a docstring says so.

    Attributes:
        config: what `config.json` says.
        params: of the velocity network, by checkpoint key.
        codec, code: of images, and of masks.
        context: [n d] that the network attends to, None where it has no cross-attention.
        card: the model card, Markdown.
        info: classes and size of the data it was trained on.
        sampler: the pure functions behind the methods.
    """

    def __init__(
        self,
        config: dict[str, Any],
        params: Params,
        codec: Codec,
        code: MaskCode,
        context: Float[Array, "n d"] | None = None,
        card: str = "",
    ):
        self.config = config
        self.card = card
        self.params = params
        self.info = DataInfo.from_dict(config["data"])
        self.unet = make_unet_config(config)
        check_parts(self.unet, codec, context)
        self.codec = codec
        self.code = code
        self.context = context
        self.sampler = Sampler(make_velocity_fn(self.unet), codec, code, context)
        self.frozen = self.sampler.frozen
        static = ("steps", "solver")
        self._segment = jax.jit(self.sampler.segment, static_argnames=static)
        self._synthesize = jax.jit(self.sampler.synthesize, static_argnames=static)
        self._velocity = jax.jit(self.sampler.velocity)
        self._encode = jax.jit(codec.encode)
        self._decode = jax.jit(codec.decode)

    @classmethod
    def from_pretrained(
        cls,
        path: str | pathlib.Path,
        *,
        unet: str | pathlib.Path | None = None,
        context: Float[np.ndarray, "n d"] | None = None,
        class_names: Sequence[str] | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        offline: bool = False,
    ) -> "SemFlow":
        """Opens a shipped model, a finished run, a saved SemFlow, or Stable Diffusion's weights; from disk or the hub.

        Args:
            path: name, folder, file of everything, or repository of the Hugging Face hub.
            unet: weights that replace Stable Diffusion's velocity network, such as the SemFlow authors' checkpoints.
            context: [n d] to attend to instead of what the text tower says of the empty prompt.
            class_names: in the order of the ids, for Stable Diffusion's weights, which know none.
            dtype: computes in this type instead of the saved one.
            revision, token, offline: see `weights.files.download`.

        Raises:
            UserError: no such model, or one that is not whole.
        """
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"dtype: one of {DTYPES}, got {dtype!r}")
        found = find_model(str(path), revision, token, offline)
        if not is_saved(found):
            name = pathlib.PurePath(path).name  # of the repository, whose folder is called after a commit
            return cls._from_stable_diffusion(found, name, unet, context, class_names, dtype)
        if unet is not None or context is not None or class_names is not None:
            raise UserError(f"{found}: unet, context and class_names are for Stable Diffusion's weights; drop them")
        return cls._open(found, dtype)

    @classmethod
    def _open(cls, folder: pathlib.Path, dtype: str | None) -> "SemFlow":
        config, codec, code, context = load_frozen(folder)
        config["model"] |= {} if dtype is None else {"dtype": dtype}
        abstract = abstract_unet(make_unet_config(config))
        if (folder / WEIGHTS).is_file():
            params = fill(abstract, load_safetensors(folder / WEIGHTS), place=str(folder / WEIGHTS), put=jnp.asarray)
        elif (folder / ORBAX).is_dir():
            params = load_orbax(folder / ORBAX, abstract)
        else:
            step, params = load_averaged(folder.parent / "checkpoints", abstract)
            log.warning("%s is not finished: these are the weights of step %d", folder.parent, step)
        card = (folder / CARD).read_text() if (folder / CARD).is_file() else ""
        return cls(config, params, codec, code, context, card)

    @classmethod
    def _from_stable_diffusion(
        cls,
        path: pathlib.Path,
        name: str,
        unet: str | pathlib.Path | None,
        context: Float[np.ndarray, "n d"] | None,
        class_names: Sequence[str] | None,
        dtype: str | None,
    ) -> "SemFlow":
        """The official recipe around Stable Diffusion's weights: the paper's colours, Euler with 25 steps."""
        network, params = load_unet(path, None if unet is None else pathlib.Path(unet), put=jnp.asarray)
        network = network if dtype is None else dataclasses.replace(network, dtype=dtype)
        codec = make_kl_codec(*load_vae(path, put=jnp.asarray))
        names = tuple(str(i) for i in range(NUM_GRID)) if class_names is None else tuple(class_names)
        config = {
            "objective": OBJECTIVE,
            "model": dataclasses.asdict(network),
            "codec": codec.config,
            "mask_code": {"name": "colour", "palette": "grid", "pixel": 0.1, "region": 0.0},
            "sampling": {"solver": "euler", "steps": 25},
            "data": DataInfo(name, names, (512, 512)).to_dict(),
        }
        code = make_mask_code(ConfigDict(config["mask_code"]), codec, len(names), {})
        context = load_context(path) if context is None else context
        return cls(config, params, codec, code, jnp.asarray(context), f"# SemFlow from {name}\n")

    def save_pretrained(
        self, path: str | pathlib.Path, dtype: str = "float32", file_format: str = "safetensors"
    ) -> None:
        """Writes all that it takes: config.json, the frozen parts, the network's weights and a model card.

        Args:
            dtype: stores the velocity network in this type; float16 halves the file.
            file_format: 'safetensors', with PyTorch's order of axes, or 'orbax', with ours and in the type at hand.

        Raises:
            UserError: another type or format.
        """
        for key, value, known in (("dtype", dtype, DTYPES), ("file_format", file_format, FILE_FORMATS)):
            if value not in known:
                raise UserError(f"{key}: one of {known}, got {value!r}")
        folder = pathlib.Path(path)
        save_frozen(folder, self.config, self.codec, self.code, self.context)
        if file_format == "orbax":
            save_orbax(folder / ORBAX, self.params)
            (folder / WEIGHTS).unlink(missing_ok=True)  # of another format, they would be read instead
        else:
            save_safetensors(folder / WEIGHTS, to_torch(self.params, dtype))
        (folder / CARD).write_text(self.card)

    def save_diffusers(self, path: str | pathlib.Path) -> None:
        """Writes `unet/`, and `vae/` where the codec is Stable Diffusion's, as diffusers' `from_pretrained` wants them.

        Raises:
            UserError: a network that diffusers has no word for.
        """
        vae = (vae_config(self.codec.config), self.codec.params) if self.codec.config["name"] == "kl" else None
        save_diffusers(pathlib.Path(path), (self.unet, self.params), vae)

    def segment(
        self, images: UInt8[np.ndarray, "b h w 3"], steps: int | None = None, solver: str | None = None
    ) -> UInt8[np.ndarray, "b h w 1"]:
        """Photos -> class ids, deterministic. Defaults for `steps` and `solver` are the config's."""
        steps, solver = self._sampling(steps, solver)
        self._check(images, 3)
        return np.asarray(self._segment(self.params, self.frozen, jnp.asarray(images), steps, solver))

    def synthesize(
        self,
        labels: UInt8[np.ndarray, "b h w 1"],
        *,
        key: PRNGKeyArray,
        num_samples: int = 1,
        steps: int | None = None,
        solver: str | None = None,
    ) -> UInt8[np.ndarray, "s b h w 3"]:
        """Class ids -> photos, `num_samples` different ones of every mask."""
        steps, solver = self._sampling(steps, solver)
        self._check(labels, 1)
        one = functools.partial(self._synthesize, self.params, self.frozen, jnp.asarray(labels))
        return np.stack([np.asarray(one(k, steps, solver)) for k in jax.random.split(key, num_samples)])

    def velocity(self, zt: Float[Array, "b h w c"], t: Float[Array, " b"]) -> Float[Array, "b h w c"]:
        """v(z_t, t)."""
        return self._velocity(self.params, self.frozen, zt, t)

    def encode(self, image: Float[Array, "b h w 3"], key: PRNGKeyArray | None = None) -> Float[Array, "b hz wz c"]:
        """Pictures in [-1, 1] -> latents; with a key a sample of them, where the codec is a distribution."""
        return self._encode(self.codec.params, image, key)

    def decode(self, z: Float[Array, "b hz wz c"]) -> Float[Array, "b h w 3"]:
        """Latents -> pictures, about [-1, 1]."""
        return self._decode(self.codec.params, z)

    def evaluation(
        self, batch_size: int, steps: int | None = None, solver: str | None = None, num_samples: int = 3
    ) -> ConfigDict:
        """The config that an Evaluator of this model wants."""
        steps, solver = self._sampling(steps, solver)
        evaluation = {"batch_size": batch_size, "num_samples": num_samples}
        return ConfigDict({"seed": 0, "sampling": {"steps": steps, "solver": solver}, "eval": evaluation})

    def _sampling(self, steps: int | None, solver: str | None) -> tuple[int, str]:
        defaults = self.config["sampling"]
        steps, solver = defaults["steps"] if steps is None else steps, solver or defaults["solver"]
        solve.check(solver, steps)
        return steps, solver

    def _check(self, pictures: np.ndarray, channels: int) -> None:
        if pictures.ndim != 4 or pictures.shape[-1] != channels or pictures.dtype != np.uint8:
            found = f"{pictures.dtype} {list(pictures.shape)}"
            raise UserError(f"pictures: uint8 of shape [b, h, w, {channels}] expected, got {found}; convert them")
        self.codec.latent_shape(pictures.shape[1:3], self.unet.factor)
        if channels == 1:
            ids = np.setdiff1d(np.unique(pictures), [255])
            if ids.size and ids.max() >= self.info.num_classes:
                raise UserError(
                    f"labels: class ids 0..{self.info.num_classes - 1} or 255 expected, got {int(ids.max())}; "
                    "map the ids to the model's classes first"
                )


def make_card(result: dict[str, Any], info: DataInfo) -> str:
    """A model card from the figures of a run: what `report.json` holds."""
    s, y, sampling = result["segmentation"], result["synthesis"], result["sampling"]
    rows = "\n".join(
        f"| {name} | {'-' if iou is None else f'{iou:.3f}'} | {s['ceiling']['class_iou'][name] or 0:.3f} |"
        for name, iou in s["class_iou"].items()
    )
    return f"""# SemFlow on {info.name}, {info.size[0]} x {info.size[1]}

Image to mask and mask to image with one velocity network of {result["num_params"]:,} parameters.
Figures on the held-out split, {sampling["solver"]} with {sampling["steps"]} steps, one sample per mask for agreement:

| | |
|---|---|
| segmentation mIoU | {s["miou"]:.3f} (the mask code alone: {s["codec_ceiling_miou"]:.3f}) |
| pixel accuracy | {s["pixel_accuracy"]:.4f} |
| mIoU of synthesized images, segmented again by this model | {y["resegmentation_miou"]:.3f} |
| diversity, RMS difference of two images of one mask | {y["diversity"]:.3f} |
| training | {result["train"]["steps"]} steps, {result["train"]["seconds"] / 60:.0f} minutes, {result["machine"]} |

| class | IoU | mask code alone |
|---|---|---|
{rows}

Command: `python {result["command"]}`, semflow_jax {result["versions"]["semflow_jax"]}, jax {result["versions"]["jax"]}.
Parameters as trained, before any rounding: sha256 `{result["params_sha256"]}`.

Data: {info.attribution or info.name}. Licence: {info.license or "not stated"}.
"""


def make_unet_config(config: dict[str, Any]) -> UNetConfig:
    """The network's shape in the config of a saved model."""
    fields: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in config["model"].items()}
    return UNetConfig(**fields)


def check_parts(unet: UNetConfig, codec: Codec, context: Context) -> None:
    """Raises UserError unless the codec's latents and the context have the widths that the network wants."""
    if {unet.in_channels, unet.out_channels} != {codec.channels}:
        raise UserError(
            f"codec: {codec.name} has latents of {codec.channels} channels, the network takes {unet.in_channels} and "
            f"gives {unet.out_channels}; with Stable Diffusion's weights use 'kl' or 'taesd'"
        )
    shape = None if context is None else list(context.shape)
    if (shape and shape[1:]) != (unet.cross_attention_dim and [unet.cross_attention_dim]):
        raise UserError(
            f"context: {f'[n, {unet.cross_attention_dim}]' if unet.cross_attention_dim else 'none'} expected by the "
            f"network, got {'none' if shape is None else shape}; take that of the text tower it was trained with"
        )


def make_config(c: ConfigDict, unet: UNetConfig, codec: Codec, code: MaskCode, info: DataInfo) -> dict[str, Any]:
    """What `config.json` of an exported model says, from a training config."""
    return {
        "objective": c.objective,
        "model": dataclasses.asdict(unet),
        "codec": codec.config,
        "mask_code": code.config,
        "sampling": c.sampling.to_dict(),
        "data": info.replace(checksums={}).to_dict(),
    }
