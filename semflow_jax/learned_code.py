"""A mask code that is learned: small networks (`models/mask_net.py`) and the spread of the image latents.

With f an encoder of masks, g a decoder, m and s the mean and standard deviation of f over masks, mu and sigma those of
the image latents, all of them by channel,

    u = (f(label) - m) / s,                                                                                (1)
    z_1 = mu + sigma [u + d, e'],    e' ~ N(0, 1), zero where nothing is perturbed,                        (2)
    p(class | z_1) = softmax g(the part of u in (z_1 - mu) / sigma).                                       (3)

The last `noise_channels` channels of z_1 are noise, e', and nothing else: synthesis then begins with chance to make an
image from, as a generative flow does, and segmentation finds their mean, 0, and drops it. z_1 has the codec's unit,
whatever that is, and amplitudes have the unit of sigma. f is bounded and u has variance 1 by construction: a code can't
shout to be heard above noise. The perturbation d stands in for that of SemFlow's colours,

    d = pixel (e - 1/2) + region sum_c share_c (w_c - 1/2),    e, w ~ U[0, 1),                             (4)

f is a network, or, with `encoder = "codec"`, the paper's: a palette's colours through the image codec, in whose latents
borders lie as they do in those of images, and every pixel counts; g then is all that is learned.

e drawn for every place and channel, w for every class of an image and channel, a direction that a region is shifted in,
and share_c the part of a place that class c has. Networks f and g learn together, as an autoencoder of masks under
noise:

    L = E [ -log p(label | mu + sigma (u + d + n eps)) ] + smoothness E |grad u|^2 / 2,                    (5)

eps ~ N(0, 1), n ~ U[0, noise) for every mask, void pixels left out. |grad u|^2 are squared differences of neighbours:
its term is 1 - their correlation. g has seen all levels of noise, and hedges where it can't tell: its probabilities are
calibrated for masks at these levels.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8
from ml_collections import ConfigDict
from tqdm import tqdm

from semflow_jax import noise, palette
from semflow_jax.codec import Codec
from semflow_jax.errors import UserError
from semflow_jax.models.build import Abstract, Params, Rngs, flatten, make_fns
from semflow_jax.models.mask_net import MaskNet, MaskNetConfig

MOMENTS = ("image_mean", "image_std", "code_mean", "code_std")  # mu, sigma, m, s
ENCODERS = ("network", "codec")
NUM_EMBEDDED = 400  # training masks that g learns from where the codec encodes them
LEAST_STD = 1e-3  # of a channel, where all masks are alike
WARMUP = 0.05  # share of the steps


def check(c: ConfigDict) -> None:
    """Raises UserError for values of the section `mask_code` that a learned code can't have."""
    least = {
        "steps": 1,
        "batch_size": 1,
        "crop": 1,
        "width": 1,
        "pixel_width": 1,
        "blocks": 0,
        "noise_channels": 0,
        "lr": 0,
    }
    if c.learned.encoder not in ENCODERS:
        raise UserError(f"mask_code.learned.encoder: one of {ENCODERS}, got {c.learned.encoder!r}")
    for key, bound in (least | {"noise": 0, "smoothness": 0}).items():
        if c.learned[key] < bound:
            raise UserError(f"mask_code.learned.{key}: at least {bound}, got {c.learned[key]}; raise it")
    if min(c.pixel, c.region) < 0:
        raise UserError(f"mask_code.pixel, mask_code.region: at least 0, got {c.pixel}, {c.region}; raise them")


def _make_net(
    c: ConfigDict, codec: Codec, num_classes: int
) -> tuple[Callable[[nnx.Rngs], MaskNet], Abstract, list[Any]]:
    """(rngs -> module, its abstract parameters, [analyse, synthesise])."""
    n = c.learned
    if n.noise_channels >= codec.channels:
        raise UserError(
            f"mask_code.learned.noise_channels: below {codec.channels}, the channels of {codec.name}, "
            f"got {n.noise_channels}; lower it"
        )
    channels = codec.channels - n.noise_channels
    encodes = n.encoder == "network"
    config = MaskNetConfig(num_classes, codec.factor, channels, n.width, n.pixel_width, n.blocks, encodes=encodes)

    def make(rngs: nnx.Rngs) -> MaskNet:
        return MaskNet(config, rngs=rngs)

    return make, *make_fns(make, "analyse", "synthesise")


def abstract_params(c: ConfigDict, codec: Codec, num_classes: int) -> Abstract:
    """Shapes and types of what `fit` returns."""
    channels = codec.channels - c.learned.noise_channels
    moments = {name: codec.channels if name.startswith("image") else channels for name in MOMENTS}
    shapes = {name: jax.ShapeDtypeStruct((num,), jnp.float32) for name, num in moments.items()}
    return _make_net(c, codec, num_classes)[1] | shapes


def perturb(
    key: Key[Array, "..."],
    u: Float[Array, "b hz wz c"],
    label: UInt8[Array, "b h w 1"],
    num_classes: int,
    pixel: float,
    region: float,
) -> Float[Array, "b hz wz c"]:
    """u + d of equation (4)."""
    key_pixel, key_region = noise.split(key, 2)
    if pixel:
        u = u + pixel * (noise.uniform(key_pixel, u.shape) - 0.5)
    if region:
        b, hz, wz, channels = u.shape
        one_hot = jax.nn.one_hot(label[..., 0], num_classes)
        share = one_hot.reshape(b, hz, label.shape[1] // hz, wz, -1, num_classes).mean((2, 4))
        direction = noise.uniform(key_region, (b, num_classes, channels)) - 0.5
        u = u + region * jnp.einsum("bhwn,bnc->bhwc", share, direction)
    return u


def make_embed_fn(codec: Codec, colours: UInt8[np.ndarray, "n 3"]) -> Callable[..., Array]:
    """(codec_params, label, key or None) -> f(label) of the codec, all of its channels; no key changes it."""
    return lambda codec_params, label, key=None: codec.encode(codec_params, palette.colourise(label, colours))


def make_learned_fns(
    c: ConfigDict, codec: Codec, colours: UInt8[np.ndarray, "n 3"], params: Params
) -> tuple[Callable[..., Array], Callable[..., Array], Callable[..., Array]]:
    """Equations (1) to (3): embed(params, codec_params, label) -> f, finish(params, f, label, key or None) -> z_1, and
    logits(params, codec_params, z_1).

    Raises:
        ValueError: `params` that are another network's.
    """
    check(c)
    num_classes = len(colours)
    _, abstract, (analyse, synthesise) = _make_net(c, codec, num_classes)
    wanted = {name: x.shape for name, x in abstract_params(c, codec, num_classes).items()}
    if {name: x.shape for name, x in params.items()} != wanted:
        raise ValueError("arrays of a learned mask code that don't fit mask_code.learned, the codec or the classes")

    def net(params: Params) -> Params:
        return {name: params[name] for name in abstract}

    by_codec = make_embed_fn(codec, colours)

    def embed(params, codec_params, label):
        if c.learned.encoder == "codec":
            return by_codec(codec_params, label)
        return analyse(net(params), label)

    def finish(params, f, label, key=None):
        u = (f[..., : len(params["code_mean"])] - params["code_mean"]) / params["code_std"]
        rest = jnp.zeros((*u.shape[:3], c.learned.noise_channels))
        if key is not None:
            key_code, key_rest = noise.split(key, 2)
            u = perturb(key_code, u, label, num_classes, c.pixel, c.region)
            rest = noise.normal(key_rest, rest.shape)
        u = jnp.concatenate([u, rest], axis=-1)
        return params["image_mean"] + params["image_std"] * u

    def logits(params, codec_params, z1):
        u = (z1 - params["image_mean"]) / params["image_std"]
        return synthesise(net(params), u[..., : len(params["code_mean"])])

    return embed, finish, logits


def fit(
    labels: Sequence[UInt8[np.ndarray, "h w 1"]],
    images: Iterable[UInt8[np.ndarray, "h w 3"]],
    num_classes: int,
    codec: Codec,
    c: ConfigDict,
    seed: int,
    progress: bool = True,
) -> tuple[dict[str, np.ndarray], float]:
    """The arrays of `make_learned_fns` by equation (5), and the seconds of its steps, from the second on.

    The first step compiles. Equal arguments give equal arrays.

    Args:
        labels: training masks of one size.
        images: training images, whose latents are measured.
        c: the config section `mask_code`.

    Raises:
        UserError: by key, for a value of `c` that is out of range.
    """
    check(c)
    make, _, (analyse, synthesise) = _make_net(c, codec, num_classes)
    n = c.learned
    warmup = max(1, round(WARMUP * n.steps))
    schedule = optax.warmup_cosine_decay_schedule(0.0, n.lr, warmup, max(n.steps, warmup + 1))
    optimizer = optax.flatten(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99)))

    def loss_fn(params: Params, label: Array, u: Array | None, key: Array) -> Array:
        if by_network := u is None:
            y = analyse(params, label)
            std = jnp.sqrt(jnp.maximum(y.var((0, 1, 2)), LEAST_STD**2))  # in this order: the root has no slope at 0
            u = (y - y.mean((0, 1, 2))) / std
        key_perturb, key_level, key_noise = jax.random.split(key, 3)
        level = n.noise * jax.random.uniform(key_level, (len(u), 1, 1, 1))
        heard = perturb(key_perturb, u, label, num_classes, c.pixel, c.region)
        logits = synthesise(params, heard + level * jax.random.normal(key_noise, u.shape))
        true = jax.nn.one_hot(label[..., 0], num_classes)
        entropy = -(true * jax.nn.log_softmax(logits)).sum() / jnp.maximum(true.sum(), 1)
        return entropy + n.smoothness * roughness(u) if by_network else entropy

    @jax.jit
    def step(params: Params, opt_state: Any, batch: Any, key: Array, i: Array) -> tuple[Params, Any, Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch, jax.random.fold_in(key, i))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    @jax.jit
    def encode_fn(params: Params, image: Array, i: Array) -> Array:
        return codec.encode(params, image.astype(jnp.float32) / 127.5 - 1, jax.random.fold_in(key, i))

    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    embedded: list[np.ndarray] = []
    if n.encoder == "codec":
        labels = [x[:, ::-1] if i % 2 else x for i, x in enumerate(labels[:: -(-len(labels) // NUM_EMBEDDED)])]
        embed_fn = jax.jit(make_embed_fn(codec, palette.make_palette(c.palette, num_classes)))
        channels = codec.channels - n.noise_channels
        bar = tqdm(labels, desc="masks", unit="img", disable=not progress, mininterval=0.5)
        embedded = [np.asarray(embed_fn(codec.params, label[None]))[..., :channels] for label in bar]
        code = _moments(embedded)
        embedded = [(f[0] - code[0]) / code[1] for f in embedded]
    side = max(n.crop // codec.factor, 1) * codec.factor
    size = (min(side, labels[0].shape[0]), min(side, labels[0].shape[1]))
    params = jax.jit(lambda: flatten(make(Rngs(seed))))()
    opt_state = jax.jit(optimizer.init)(params)
    with tqdm(total=n.steps, desc="mask code", unit="step", disable=not progress, mininterval=0.5) as bar:
        for i in range(n.steps):
            batch: tuple[Any, ...]
            chosen = [int(rng.integers(len(labels))) for _ in range(n.batch_size)]
            if embedded:
                crops = [_crop_both(labels[k], embedded[k], size, rng) for k in chosen]
                batch = tuple(np.stack(x) for x in zip(*crops, strict=True))
            else:
                batch = np.stack([_crop(labels[k], size, rng) for k in chosen]), None
            params, opt_state, loss = step(params, opt_state, batch, key, np.int32(i))
            if i == 0:
                loss.block_until_ready()
                start = time.perf_counter()
            bar.update()
            if i % 20 == 19:
                bar.set_postfix(loss=f"{loss:.4f}")
        loss.block_until_ready()
        seconds = time.perf_counter() - start
    if not embedded:
        analyse_fn = jax.jit(analyse)
        code = _moments(np.asarray(analyse_fn(params, label[None])) for label in labels)
    image = _moments(np.asarray(encode_fn(codec.params, x[None], np.int32(i))) for i, x in enumerate(images))
    arrays = {name: np.asarray(x) for name, x in params.items()}
    return arrays | dict(zip(MOMENTS, (*image, *code), strict=True)), seconds


def roughness(u: Float[Array, "b hz wz c"]) -> Float[Array, ""]:
    """E |grad u|^2 / 2 of equation (5): for a variance of 1, 1 - the correlation of neighbours."""
    across, down = u[:, :, 1:] - u[:, :, :-1], u[:, 1:] - u[:, :-1]
    count = max(across.size + down.size, 1)  # none in a latent of one place
    return (jnp.square(across).sum() + jnp.square(down).sum()) / (2 * count)


def _crop(
    label: UInt8[np.ndarray, "h w 1"], size: tuple[int, int], rng: np.random.Generator
) -> UInt8[np.ndarray, "hc wc 1"]:
    """A random place, mirrored or not."""
    top, left = (rng.integers(n - m + 1) for n, m in zip(label.shape[:2], size, strict=True))
    crop = label[top : top + size[0], left : left + size[1]]
    return crop[:, ::-1] if rng.integers(2) else crop


def _crop_both(
    label: UInt8[np.ndarray, "h w 1"],
    u: Float[np.ndarray, "hz wz c"],
    size: tuple[int, int],
    rng: np.random.Generator,
) -> tuple[UInt8[np.ndarray, "hc wc 1"], Float[np.ndarray, "hzc wzc c"]]:
    """A random place of a mask and of its latent; mirror images have latents of their own."""
    factor = label.shape[0] // u.shape[0]
    h, w = size[0] // factor, size[1] // factor
    i, j = int(rng.integers(u.shape[0] - h + 1)), int(rng.integers(u.shape[1] - w + 1))
    rows, columns = slice(i, i + h), slice(j, j + w)
    return label[i * factor : (i + h) * factor, j * factor : (j + w) * factor], u[rows, columns]


def _moments(latents: Iterable[Float[np.ndarray, "_ hz wz c"]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation by channel."""
    count, total, squares = 0, np.zeros(()), np.zeros(())
    for z in latents:
        rows = z.reshape(-1, z.shape[-1]).astype(np.float64)
        count, total, squares = count + len(rows), total + rows.sum(0), squares + np.square(rows).sum(0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, LEAST_STD**2))
    return mean.astype(np.float32), std.astype(np.float32)
