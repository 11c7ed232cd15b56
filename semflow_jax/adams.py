"""The second-order Adams-Bashforth method, which diffrax lacks: twice Euler's order for Euler's number of evaluations.

A step goes on from the velocity of the step before, so it needs no second look at the network:

    z_{n+1} = z_n + h (v_n + w (v_n - v_{n-1})),  w = h / (2 (t_n - t_{n-1}))    (1)

With equal steps w is 1/2 (Bashforth and Adams 1883). The first step has nothing before it and is Euler's. Diffusion
models know methods of this family as PLMS (Liu et al. 2022, "Pseudo numerical methods for diffusion models").
"""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import jax.numpy as jnp


class AdamsBashforth2(diffrax.AbstractSolver):
    """Equation (1) as a solver of diffrax; its state is the last step's time and velocity."""

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., diffrax.LocalLinearInterpolation]] = diffrax.LocalLinearInterpolation

    def order(self, terms):
        return 2

    def init(self, terms, t0, t1, y0, args):
        """A last step that is infinitely far away has no weight: the first step is Euler's."""
        return jnp.full_like(t0, -jnp.inf), jnp.zeros_like(y0)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump) -> tuple[Any, ...]:
        before, v_before = solver_state
        v = terms.vf(t0, y0, args)
        w = (t1 - t0) / (2 * (t0 - before))
        y1 = y0 + terms.prod(v + w * (v - v_before), terms.contr(t0, t1))
        return y1, None, {"y0": y0, "y1": y1}, (t0, v), diffrax.RESULTS.successful

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)
