"""FLOPs of a JAX function, from its jaxpr: of matrix products, convolutions and kernels, 2 for each multiply-add.

They are the model's: what `jax.checkpoint` computes again in the backward pass is left out, so that a utilisation
(MFU) made of them does not praise repeated work. Loops count as often as they turn; of a conditional the dearest branch
counts, and of forms for each platform the default, which repeats nothing; what `shard_map` does on one device counts
for all of them. The rest, elementwise, is not counted.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

REPEATED = "rematted_computation"  # JAX's mark, in the name stack, of what is computed again


def count_flops(function: Callable[..., Any], *args: Any, turns: int | None = None) -> int:
    """FLOPs of function(*args), on all devices together.

    Args:
        args: arrays, or ShapeDtypeStructs: nothing is computed.
        turns: of while loops, whose number a jaxpr does not tell.

    Raises:
        ValueError: a while loop that has work in it, and no `turns`.
    """
    return count_jaxpr(jax.make_jaxpr(function)(*args).jaxpr, turns)


def count_jaxpr(jaxpr: core.Jaxpr, turns: int | None = None) -> int:
    """The same of a function that has been traced."""
    return sum(_count_equation(eqn, turns) for eqn in jaxpr.eqns if REPEATED not in str(eqn.source_info.name_stack))


def _count_equation(eqn: core.JaxprEqn, turns: int | None) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * _size(eqn.outvars[0]) * math.prod(_shape(eqn.invars[0])[i] for i in contracted)
    if name == "conv_general_dilated":
        return _convolution(eqn)
    if name == "while":
        body = count_jaxpr(params["body_jaxpr"].jaxpr, turns)
        if body and turns is None:
            raise ValueError("a while loop: the number of its turns needed, got none; pass `turns`")
        return body * (turns or 0)
    inner = [count_jaxpr(jaxpr, turns) for jaxpr in _inner(params)]
    if name == "cond":
        platforms = params.get("branches_platforms") or ()
        return inner[platforms.index(None)] if None in platforms else max(inner)
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "pallas_call":
        times = math.prod(params["grid_mapping"].grid)
    elif name == "shard_map":
        axes = params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]  # by JAX's version
        times = math.prod(size for axis, size in params["mesh"].shape.items() if axis in axes)
    return times * sum(inner)


def _inner(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The jaxprs among an equation's parameters. Rules of derivation are functions, so that none counts twice."""
    found: list[Any] = []
    for value in params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            x = getattr(x, "jaxpr", x)
            if hasattr(x, "eqns"):
                found.append(x)
    return found


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _size(variable: Any) -> int:
    return math.prod(_shape(variable))


def _convolution(eqn: core.JaxprEqn) -> int:
    """The products of an output with its window, less those with zeros between the inputs of a dilated one."""
    layout = eqn.params["dimension_numbers"]
    window = math.prod(_shape(eqn.invars[1])[i] for i in layout.rhs_spec[1:])  # taps and channels of a group
    dense = 2 * _size(eqn.outvars[0]) * window
    return dense // math.prod(eqn.params["lhs_dilation"])
