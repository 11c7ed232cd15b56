"""What a user imports: one model, both directions.

flow = SemFlow.from_pretrained("avatars")
labels = flow.segment(images)
images = flow.synthesize(labels, key=jax.random.key(0))
"""

import dataclasses
import functools
import importlib.resources
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8
from ml_collections import ConfigDict

from semflow_jax import solve
from semflow_jax.codec import make_codec
from semflow_jax.data.info import DataInfo
from semflow_jax.errors import UserError
from semflow_jax.mask_code import make_mask_code
from semflow_jax.models.build import Params, abstract_unet, make_velocity_fn
from semflow_jax.models.unet import UNetConfig
from semflow_jax.sampling import Sampler, to_uint8
from semflow_jax.weights.export import to_torch
from semflow_jax.weights.load import fill, load_safetensors, prefixed, save_safetensors, split_prefixed

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FITTED = ("codec", "code")  # prefixes of arrays that were fitted to data rather than trained


def shipped() -> dict[str, pathlib.Path]:
    """Models that come with the package, by name."""
    zoo = pathlib.Path(str(importlib.resources.files("semflow_jax"))) / "zoo"
    return {path.parent.name: path.parent for path in sorted(zoo.glob(f"*/{CONFIG}"))}


def find_model(path: str) -> pathlib.Path:
    """The folder of a model: a folder, a run's workdir with its `export`, or the name of a shipped model.

    Raises:
        UserError: none of these.
    """
    for folder in (pathlib.Path(path), pathlib.Path(path, "export"), shipped().get(path)):
        # A run's workdir has a config.json too, its own.
        if folder is not None and (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    raise UserError(
        f"checkpoint {path}: a folder with {CONFIG} and {WEIGHTS}, the --workdir of a finished run, or one of "
        f"{', '.join(shipped()) or 'no shipped models'}; found none of these"
    )


class SemFlow:
    """A trained flow. Arrays in, arrays out; pictures are uint8, or float in [-1, 1] where a docstring says so.

    Attributes:
        params: of the velocity network, by checkpoint key.
        card: the model card, Markdown.
        info: classes and size of the data it was trained on.
        sampler: the pure functions behind the methods.
    """

    def __init__(self, config: dict[str, Any], params: Params, fitted: dict[str, Params], card: str = ""):
        self.config = config
        self.card = card
        self.params = params
        self.info = DataInfo.from_dict(config["data"])
        self.unet = _unet_config(config)
        self.fitted = fitted
        self.codec = make_codec(ConfigDict(config["codec"]), fitted["codec"])
        self.code = make_mask_code(ConfigDict(config["mask_code"]), self.codec, self.info.num_classes, fitted["code"])
        self.sampler = Sampler(make_velocity_fn(self.unet), self.codec, self.code)
        self.frozen = self.sampler.frozen
        static = ("steps", "solver")
        self._segment = jax.jit(self.sampler.segment, static_argnames=static)
        self._synthesize = jax.jit(self.sampler.synthesize, static_argnames=static)
        self._velocity = jax.jit(self.sampler.velocity_fn)

    @classmethod
    def from_pretrained(cls, path: str | pathlib.Path, dtype: str | None = None) -> "SemFlow":
        """Opens a folder, a finished run or a shipped model.

        Args: dtype: computes in this type instead of the saved one.

        Raises:
            UserError: no such model, or one that is not whole.
        """
        folder = find_model(str(path))
        try:
            config = json.loads((folder / CONFIG).read_text())
            config["model"] |= {} if dtype is None else {"dtype": dtype}
            abstract = abstract_unet(_unet_config(config))
        except (ValueError, KeyError, TypeError) as error:
            rule, found = "the config of a model expected", f"{type(error).__name__}: {error}"
            raise UserError(f"{folder / CONFIG}: {rule}, found {found}; export it again") from error
        file = folder / WEIGHTS
        tensors = load_safetensors(file)
        fitted = split_prefixed(tensors, FITTED)
        params = fill(abstract, tensors, place=str(file))
        card = (folder / CARD).read_text() if (folder / CARD).is_file() else ""
        return cls(config, jax.tree.map(jnp.asarray, params), fitted, card)

    def save_pretrained(self, path: str | pathlib.Path, dtype: str = "float32") -> None:
        """Writes config.json, model.safetensors (PyTorch's layout of axes) and a model card.

        Args: dtype: stores in this type; float16 halves the file.
        """
        folder = pathlib.Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        save_safetensors(folder / WEIGHTS, to_torch(self.params, dtype) | prefixed(self.fitted))
        (folder / CARD).write_text(self.card)
        (folder / CONFIG).write_text(json.dumps(self.config, indent=1))

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
        return self._velocity(self.params, zt, t)

    def encode(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b hz wz c"]:
        """Pictures in [-1, 1] -> latents."""
        return self.codec.encode(self.codec.params, image)

    def decode(self, z: Float[Array, "b hz wz c"]) -> UInt8[Array, "b h w 3"]:
        """Latents -> pictures."""
        return to_uint8(self.codec.decode(self.codec.params, z))

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
        f"| {name} | {'-' if iou is None else f'{iou:.3f}'} | {s['ceiling_class_iou'][name] or 0:.3f} |"
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


def _unet_config(config: dict[str, Any]) -> UNetConfig:
    fields: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in config["model"].items()}
    return UNetConfig(**fields)


def make_config(c: ConfigDict, unet: UNetConfig, info: DataInfo) -> dict[str, Any]:
    """What `config.json` of an exported model says, from a training config."""
    return {
        "model": dataclasses.asdict(unet),
        "codec": c.codec.to_dict(),
        "mask_code": c.mask_code.to_dict(),
        "sampling": c.sampling.to_dict(),
        "data": info.to_dict(),
    }
