"""From photos to class maps and back: codec, mask code and ODE as two pure functions."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from semflow_jax import solve
from semflow_jax.codec import Codec
from semflow_jax.mask_code import MaskCode
from semflow_jax.models.build import Params

Frozen = dict[str, Any]  # codec and code, flat dicts of arrays; context [n d], where the network attends to one


def to_float(image: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """0..255 -> [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1


def to_uint8(image: Float[Array, "b h w 3"]) -> UInt8[Array, "b h w 3"]:
    """[-1, 1] -> 0..255; what lies beyond is clipped."""
    return jnp.clip(jnp.round((image + 1) * 127.5), 0, 255).astype(jnp.uint8)


class Sampler:
    """Both directions of a flow, as pure functions of the network's parameters and the frozen ones of codec and code.

    Args:
        velocity_fn: (params, zt, t, context, d) -> v; d is the interval it will be followed for, see `shortcut.py`.
        codec: between pixels and latents.
        code: between class ids and mask latents.
        context: [n d] that the network attends to, of a text tower; None where it has no cross-attention.
    """

    def __init__(
        self,
        velocity_fn: Callable[..., Array],
        codec: Codec,
        code: MaskCode,
        context: Float[Array, "n d"] | None = None,
    ):
        self.velocity_fn = velocity_fn
        self.codec = codec
        self.code = code
        self.context = context

    @property
    def frozen(self) -> Frozen:
        """The arrays that are not trained; hand them to jitted functions as an argument."""
        arrays = {"codec": self.codec.params, "code": self.code.params}
        return arrays if self.context is None else arrays | {"context": self.context}

    def velocity(
        self,
        params: Params,
        frozen: Frozen,
        zt: Float[Array, "b hz wz c"],
        t: Float[Array, " b"],
        d: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b hz wz c"]:
        """v(z_t, t); with an interval d, what a network that knows of intervals says of it."""
        return self.velocity_fn(params, zt, t, frozen.get("context"), d)

    def _field(self, params: Params, frozen: Frozen, steps: int, solver: str) -> solve.VelocityFn:
        """The velocity as a solver wants it; `steps` < 0 go to the image. Only Euler's steps are jumps."""
        d = 1 / steps if solver == "euler" else 0.0
        return lambda zt, t: self.velocity(params, frozen, zt, t, jnp.full_like(t, d))

    def encode_image(
        self, frozen: Frozen, image: UInt8[Array, "b h w 3"], key: Key[Array, "..."] | None = None
    ) -> Float[Array, "b hz wz c"]:
        """Photo -> z_0; where the codec is a distribution, a sample with a key and the mode without."""
        return self.codec.encode(frozen["codec"], to_float(image), key)

    def image_latent(
        self, frozen: Frozen, batch: Mapping[str, Array], key: Key[Array, "..."] | None
    ) -> Float[Array, "b hz wz c"]:
        """z_0 of a training batch: of its "image", or drawn from the moments that were kept of it."""
        if "mean" not in batch:
            return self.encode_image(frozen, batch["image"], key)
        std = batch["std"].astype(jnp.float32) if "std" in batch else None
        return self.codec.draw(batch["mean"].astype(jnp.float32), std, key)

    def decode_image(self, frozen: Frozen, z0: Float[Array, "b hz wz c"]) -> UInt8[Array, "b h w 3"]:
        """z_0 -> photo."""
        return to_uint8(self.codec.decode(frozen["codec"], z0))

    def encode_mask(
        self, frozen: Frozen, label: UInt8[Array, "b h w 1"], key: Key[Array, "..."] | None = None
    ) -> Float[Array, "b hz wz c"]:
        """Class ids -> z_1, perturbed where a key is given."""
        return self.code.encode(frozen["code"], frozen["codec"], label, key)

    def mask_latent(
        self, frozen: Frozen, batch: Mapping[str, Array], key: Key[Array, "..."] | None
    ) -> Float[Array, "b hz wz c"]:
        """z_1 of a training batch: of its "label", or of what was kept of it."""
        if "mask" not in batch or self.code.finish is None:
            return self.encode_mask(frozen, batch["label"], key)
        return self.code.finish(frozen["code"], batch["mask"].astype(jnp.float32), batch["label"], key)

    def decode_mask(self, frozen: Frozen, z1: Float[Array, "b hz wz c"]) -> UInt8[Array, "b h w 1"]:
        """z_1 -> class ids."""
        return self.code.decode(frozen["code"], frozen["codec"], z1)

    def mask_logits(self, frozen: Frozen, z1: Float[Array, "b hz wz c"]) -> Float[Array, "b h w n"]:
        """z_1 -> log-probabilities of the classes, but for a constant."""
        return self.code.logits(frozen["code"], frozen["codec"], z1)

    def to_mask(
        self, params: Params, frozen: Frozen, z0: Float[Array, "b hz wz c"], steps: int, solver: str
    ) -> Float[Array, "b hz wz c"]:
        """z_0 -> z_1: t from 0 to 1."""
        return solve.image_to_mask(self._field(params, frozen, steps, solver), z0, steps, solver)

    def to_image(
        self, params: Params, frozen: Frozen, z1: Float[Array, "b hz wz c"], steps: int, solver: str
    ) -> Float[Array, "b hz wz c"]:
        """z_1 -> z_0: t from 1 to 0."""
        return solve.mask_to_image(self._field(params, frozen, -steps, solver), z1, steps, solver)

    def segment(
        self, params: Params, frozen: Frozen, image: UInt8[Array, "b h w 3"], steps: int, solver: str
    ) -> UInt8[Array, "b h w 1"]:
        """Photo -> class ids."""
        return self.decode_mask(frozen, self.to_mask(params, frozen, self.encode_image(frozen, image), steps, solver))

    def synthesize(
        self,
        params: Params,
        frozen: Frozen,
        label: UInt8[Array, "b h w 1"],
        key: Key[Array, "..."],
        steps: int,
        solver: str,
    ) -> UInt8[Array, "b h w 3"]:
        """Class ids -> photo; another key, another photo of the same mask. See `noise` for keys [b]."""
        z0 = self.to_image(params, frozen, self.encode_mask(frozen, label, key), steps, solver)
        return self.decode_image(frozen, z0)

    def ceiling(self, frozen: Frozen, label: UInt8[Array, "b h w 1"]) -> UInt8[Array, "b h w 1"]:
        """The true mask through the code and back: the best that any network behind it can do."""
        return self.decode_mask(frozen, self.encode_mask(frozen, label))

    def path_to_mask(
        self, params: Params, frozen: Frozen, z0: Float[Array, "b hz wz c"], num_frames: int, steps: int, solver: str
    ) -> Float[Array, "f b hz wz c"]:
        """The states between z_0 and z_1, both included, at evenly spaced times."""
        field = self._field(params, frozen, steps, solver)
        return solve.path(field, z0, num_frames, to_mask=True, steps=steps, solver=solver)

    def frames(
        self,
        params: Params,
        frozen: Frozen,
        image: UInt8[Array, "b h w 3"],
        num_frames: int,
        steps: int,
    ) -> tuple[UInt8[Array, "f b h w 3"], UInt8[Array, "f b h w 1"]]:
        """The path of the ODE from a photo to its mask, seen by both decoders: as pictures and as class ids."""
        path = self.path_to_mask(params, frozen, self.encode_image(frozen, image), num_frames, steps, "euler")
        pictures = jax.vmap(lambda z: self.decode_image(frozen, z))(path)
        return pictures, jax.vmap(lambda z: self.decode_mask(frozen, z))(path)
