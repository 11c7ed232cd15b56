"""Writes plan_*.hlo, beside this file: small programs as libtpu's compiler makes them for v5e:2x2, without metadata.

JAX_PLATFORMS=cpu python tests/golden/make_plan_hlo.py
"""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from semflow_jax.plan.chips import make_devices, parse_slice

MESH = Mesh(np.array(make_devices(parse_slice("v5e:2x2"))), ("x",), axis_types=(AxisType.Auto,))


def array(shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(MESH, P(*spec)))


def scan(w, x):
    """Ten products, of [2048 2048] each on a chip."""
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=10)[0]


def psum(x):
    """The sum over chips of 16 MiB each."""
    sums = jax.shard_map(lambda x: jax.lax.psum(2 * x, "x"), mesh=MESH, in_specs=P("x"), out_specs=P())
    return sums(x)


def fsdp(weights, x):
    """A step of gradient descent of two layers whose weights are stored in shards."""

    def loss(weights, x):
        for w in weights:
            x = jax.nn.relu(x @ w)
        return jnp.square(x.astype(jnp.float32)).sum()

    return jax.tree.map(lambda w, g: w - 1e-3 * g.astype(w.dtype), weights, jax.grad(loss)(weights, x))


def gather_in_loop(w, x):
    """Gathers a weight of 32 MiB in each of three turns: what accumulation of gradients should not do."""

    def program(w, x):
        def turn(x, _):
            return jnp.tanh(x @ jax.lax.all_gather(w + x[:1], "x", tiled=True)), None

        return jax.lax.scan(turn, x, None, length=3)[0]

    return jax.shard_map(program, mesh=MESH, in_specs=P("x"), out_specs=P("x"), check_vma=False)(w, x)


def write(function, *args, **options):
    text = jax.jit(function, **options).lower(*args).compile().as_text()
    text = re.sub(r", metadata=\{[^{}]*\}", "", text)
    text = re.sub(r"\n\nFileNames\n.*?\n\n\n", "\n\n", text, flags=re.DOTALL)
    braces = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
    text = re.sub(rf'"(window_config|float_type_correction_info|indices_config)":{braces},?', "", text)
    pathlib.Path(__file__).with_name(f"plan_{function.__name__}.hlo").write_text(text)


if __name__ == "__main__":
    bf16, weight = jnp.bfloat16, array((4096, 4096), jnp.bfloat16, "x")
    write(scan, array((2048, 2048), bf16), array((8192, 2048), bf16, "x"))
    write(psum, array((4096, 4096), jnp.float32, "x"))
    write(fsdp, [weight] * 2, weight, donate_argnums=0, out_shardings=[weight.sharding] * 2)
    write(gather_in_loop, weight, weight)
