"""plan/flops.py: FLOPs of a jaxpr in closed form, and of Stable Diffusion 1.5."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from semflow_jax.models.build import abstract_unet, make_velocity_fn
from semflow_jax.models.unet_config import UNetConfig
from semflow_jax.plan.flops import count_flops

PRODUCT = 2 * 8 * 16 * 16


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


X, W = array(8, 16), array(16, 16)


def convolve(x, w, pad=1, **options):
    padding = ((pad, pad), (pad, pad))
    return jax.lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def kernel(x, w, out):
    out[...] = x[...] @ w[...]


def tiles(x, w):
    specs = [pl.BlockSpec((4, 16), lambda i: (i, 0)), pl.BlockSpec((16, 16), lambda i: (0, 0))]
    shape = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    return pl.pallas_call(kernel, shape, grid=(2,), in_specs=specs, out_specs=specs[0])(x, w)


def split(x, w):
    mesh = AbstractMesh((2, 3), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"))(x, w)


@pytest.mark.parametrize(
    ("function", "flops"),
    [
        (lambda x, w: jnp.tanh(x @ w), PRODUCT),
        (lambda x, w: jax.jit(jnp.matmul)(x, w) @ w, 2 * PRODUCT),
        (lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0], 5 * PRODUCT),
        (lambda x, w: jax.lax.map(lambda row: row @ w, x), PRODUCT),
        (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), 2 * PRODUCT),
        (lambda x, w: jax.lax.platform_dependent(x, cpu=lambda x: x @ w @ w, default=lambda x: x @ w), PRODUCT),
        (lambda x, w: jax.checkpoint(jnp.matmul)(x, w), PRODUCT),
        (lambda x, w: jax.grad(lambda w: jnp.tanh(x @ w).sum())(w), 2 * PRODUCT),
        (lambda x, w: jax.grad(lambda w: jax.checkpoint(lambda w: jnp.tanh(x @ w))(w).sum())(w), 2 * PRODUCT),
        (tiles, PRODUCT),
        (split, 6 * PRODUCT / 2),  # two devices have half of the rows each, and three do the same
    ],
)  # fmt: skip
def test_flops_in_closed_form(function, flops):
    assert count_flops(function, X, W) == flops


@pytest.mark.parametrize(
    ("weight", "options", "flops"),
    [
        (array(3, 3, 4, 8), {}, 2 * 2 * 36 * 8 * 9 * 4),
        (array(3, 3, 2, 8), {"feature_group_count": 2}, 2 * 2 * 36 * 8 * 9 * 2),
        (array(3, 3, 4, 8), {"rhs_dilation": (2, 2), "pad": 2}, 2 * 2 * 36 * 8 * 9 * 4),
        (array(3, 3, 4, 8), {"lhs_dilation": (2, 2)}, 2 * 2 * 121 * 8 * 9),
    ],
)
def test_flops_of_convolutions(weight, options, flops):
    assert count_flops(lambda x, w: convolve(x, w, **options), array(2, 6, 6, 4), weight) == flops


def test_turns_of_while_loops():
    def loop(x, w):
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x)

    with pytest.raises(ValueError, match="number of its turns needed"):
        count_flops(loop, X, W)
    assert count_flops(loop, X, W, turns=7) == 7 * PRODUCT
    assert count_flops(lambda x: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x / 2, x), X) == 0


@pytest.mark.slow
def test_stable_diffusion():
    """803 GFLOP, and three times that with gradients, whatever is computed again."""
    inputs = (array(1, 64, 64, 4), array(1), array(77, 768))
    params = abstract_unet(UNetConfig())
    forward = count_flops(make_velocity_fn(UNetConfig()), params, *inputs)
    assert forward == pytest.approx(803e9, rel=1e-3)
    velocity = make_velocity_fn(UNetConfig(remat="blocks"))
    both = count_flops(jax.grad(lambda params, *x: velocity(params, *x).sum()), params, *inputs)
    assert both == pytest.approx(3 * forward, rel=5e-3)
