"""What networks from elsewhere make of synthesized images: distances of features to the real ones', and LPIPS.

Images are judged as arrays of uint8 at the model's size; no file and no compression lies between. Distances are of one
sample per mask, the first, so that as many images stand against as many; beside them, under `all_samples`, of all of
them against the same real ones.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, UInt8
from PIL import Image

from semflow_jax import parallel
from semflow_jax.evaluate import distances
from semflow_jax.evaluate.features import FeatureNet, LpipsNet
from semflow_jax.evaluate.synthesis import mean_over_pairs
from semflow_jax.evaluate.tally import Counts
from semflow_jax.sampling import to_float


def sample_name(id: str, k: int) -> str:
    """File of the k-th synthesized image of a mask."""
    return f"{id.replace('/', '_')}-{k}.png"


class Judges:
    """A panel of networks.

    Args:
        nets: of features.
        lpips: None leaves it out.
        pictures: folder that the samples are written to, as PNGs; None writes none.
    """

    def __init__(
        self, nets: list[FeatureNet], lpips: LpipsNet | None, mesh: Mesh, pictures: pathlib.Path | None = None
    ):
        self.nets = nets
        self.lpips = lpips
        self.mesh = mesh
        self.pictures = pictures
        self.real: dict[tuple[str, ...], np.ndarray] = {}  # features of a batch, by network and ids: alike in all rows
        everywhere = parallel.replicated(mesh)
        self.params = {net.name: parallel.everywhere(net.params, mesh) for net in nets}
        self.feature_fns = {net.name: jax.jit(net.features, out_shardings=everywhere) for net in nets}
        if lpips is not None:
            self.lpips_params = parallel.everywhere(lpips.params, mesh)
            self.lpips_fn = jax.jit(self._lpips, out_shardings=everywhere)

    def _lpips(self, params, real, samples):
        """Means of each mask: over its samples the distance to the real image, over pairs that between samples."""
        assert self.lpips is not None
        distance = functools.partial(self.lpips.distance, params)
        real, samples = to_float(real), jnp.stack([to_float(x) for x in samples])
        to_real = jnp.stack([distance(x, real) for x in samples])
        return {"lpips_real": to_real.mean(0), "lpips_diversity": mean_over_pairs(distance, samples)}

    def look(
        self,
        real: UInt8[Array, "b h w 3"],
        samples: UInt8[Array, "s b h w 3"],
        valid: Bool[np.ndarray, " b"],
        ids: list[str],
    ) -> Counts:
        """What is kept of every example that is no padding."""
        kept = {}
        for name, fn in self.feature_fns.items():
            if (name, *ids) not in self.real:
                self.real[name, *ids] = np.asarray(fn(self.params[name], real))[valid]
            kept[f"real/{name}"] = self.real[name, *ids]
            features = [np.asarray(fn(self.params[name], x))[valid] for x in samples]
            kept[f"samples/{name}"] = np.stack(features, axis=1)
        if self.lpips is not None:
            found = self.lpips_fn(self.lpips_params, real, samples)
            kept |= {name: np.asarray(x)[valid] for name, x in found.items()}
        if self.pictures is not None:
            self._write(samples, ids)
        return kept

    def _write(self, samples: UInt8[Array, "s b h w 3"], ids: list[str]) -> None:
        assert self.pictures is not None
        self.pictures.mkdir(parents=True, exist_ok=True)
        first = parallel.batch_share(self.mesh)[0] * len(ids)  # every process writes the images of its own examples
        for k, batch in enumerate(np.asarray(samples)[:, first : first + len(ids)]):
            for id, image in zip(ids, batch, strict=True):
                if id:  # padding has none
                    Image.fromarray(image).save(self.pictures / sample_name(id, k))

    def figures(self, kept: Counts) -> dict[str, Any]:
        """Of all that was kept."""
        found: dict[str, Any] = {}
        for net in self.nets:
            real, samples = kept[f"real/{net.name}"], kept[f"samples/{net.name}"]
            figures = _compare(real, samples[:, 0])
            figures["all_samples"] = _compare(real, samples.reshape(-1, net.dim))
            found.setdefault("distances", {})[net.name] = figures
        for name in ("lpips_real", "lpips_diversity"):
            if name in kept:
                found[name] = float(kept[name].mean(dtype=np.float64))
        return found

    def protocol(self) -> dict[str, Any]:
        """What the figures depend on."""
        nets = {
            net.name: {"sha256": net.sha256, "size": list(net.size), "resize": net.resize, "dim": net.dim}
            for net in self.nets
        }
        lpips = self.lpips and {"net": self.lpips.net, "sha256": self.lpips.sha256, "lin_sha256": self.lpips.lin_sha256}
        return {"features": nets, "lpips": lpips, "images": "uint8 arrays, not compressed"}


def _compare(real: np.ndarray, fake: np.ndarray) -> dict[str, Any]:
    """The distances of one network."""
    dim = real.shape[1]
    kernel = distances.kernel_distance(real, fake)
    precision, recall = distances.precision_recall(real, fake)
    moments = (distances.Moments.empty(dim).add(x) for x in (real, fake))
    return {
        "frechet": distances.frechet_distance(*moments),
        "kid": kernel.mean,
        "kid_std": kernel.std,
        "kid_subset_size": kernel.subset_size,
        "precision": precision,
        "recall": recall,
        "num_real": len(real),
        "num_samples": len(fake),
    }
