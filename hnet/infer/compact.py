"""Run a function on the active rows of a batch only, at a cost that follows their number."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hnet.nn.cache import read, write

FRACTIONS = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)


def sizes(batch: int, fractions: tuple[float, ...]) -> list[int]:
    """The batch sizes compiled for a batch of `batch` rows, smallest first."""
    return sorted({math.ceil(fraction * batch) for fraction in fractions} | {batch})


def on_rows(
    fn: Callable[[Any, Any, jax.Array], tuple[Any, Any]],
    active_B: jax.Array,
    inputs_B: Any,
    state: Any,
    fractions: tuple[float, ...] | None,
) -> tuple[Any, Any]:
    """`fn(inputs_R, state, rows_R) -> (outputs_R, state)` on the active rows, if there are any.

    The rows are gathered into the smallest of the `sizes` that holds them; spare places have row
    number B, which reads some row and writes none. Outputs are scattered back, zeros elsewhere.
    The state is not gathered: `fn` reads and writes its rows. Without fractions (an outermost
    stage, whose rows are nearly always all active) `fn` simply runs on all rows.

    The choice of a size is a loop of no or one round for each, not a conditional: XLA changes what
    a loop carries in place, but copies what a conditional returns, which here is the whole cache.
    """
    B = active_B.shape[0]
    all_rows_B = jnp.arange(B, dtype=jnp.int32)
    if fractions is None:
        return fn(inputs_B, state, jnp.where(active_B, all_rows_B, B))
    num_active = jnp.sum(active_B, dtype=jnp.int32)
    order_B = jnp.argsort(~active_B, stable=True).astype(jnp.int32)
    shapes, _ = jax.eval_shape(fn, inputs_B, state, all_rows_B)
    outputs = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    smaller = 0
    for size in sizes(B, fractions):
        rows_R = jnp.where(all_rows_B[:size] < num_active, order_B[:size], B)

        def run(_, carry, rows_R=rows_R):
            outputs, state = carry
            new, state = fn(jax.tree.map(lambda a: read(a, rows_R), inputs_B), state, rows_R)
            return jax.tree.map(lambda o, n: write(o, rows_R, n), outputs, new), state

        chosen = (smaller < num_active) & (num_active <= size)
        rounds = chosen.astype(jnp.int32)
        outputs, state = jax.lax.fori_loop(0, rounds, run, (outputs, state))
        smaller = size
    return outputs, state
