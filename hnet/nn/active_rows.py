"""Run a function on only the active rows of a batch, at a cost that depends on their number."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hnet.nn.cache import Rows

# Rows that wait for others run 10 to 16 at a time of 32 (`hnet.decode.stream.advance`).
FRACTIONS = (1 / 8, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 1.0)


def sizes(batch: int, fractions: tuple[float, ...]) -> list[int]:
    """Batch sizes that are compiled for a batch of `batch` rows, in ascending order."""
    return sorted({math.ceil(fraction * batch) for fraction in fractions} | {batch})


def run_on_active_rows(
    fn: Callable[[Any, Any, Rows], tuple[Any, Any]],
    active_B: jax.Array,
    inputs_B: Any,
    state: Any,
    fractions: tuple[float, ...] | None,
) -> tuple[Any, Any]:
    """Run `fn(inputs_R, state, rows) -> (outputs_R, state)` on the active rows, if there are any.

    Active rows are gathered into the smallest of the `sizes` that holds them; unused places read an
    arbitrary row and write nothing. Outputs are scattered back, zeros elsewhere. The state is not
    gathered: `fn` reads and writes its rows. fractions None (an outermost stage, whose rows are
    nearly always all active): `fn` runs on all rows, and outputs of inactive rows are undefined.

    Each size is a loop of zero or one iterations, not a conditional: XLA updates a loop carry in
    place, but copies the result of a conditional, which here is the whole cache. What a loop would
    compute from only its rows must depend on the iteration, or XLA computes it for every size.
    """
    B = active_B.shape[0]
    all_rows_B = jnp.arange(B, dtype=jnp.int32)
    all_rows = Rows(jnp.where(active_B, all_rows_B, B), are_all=True)
    if fractions is None:
        return fn(inputs_B, state, all_rows)
    num_active = jnp.sum(active_B, dtype=jnp.int32)
    order_B = jnp.argsort(~active_B, stable=True).astype(jnp.int32)
    shapes, _ = jax.eval_shape(fn, inputs_B, state, all_rows)
    outputs = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

    def run_on(size):
        first_R = jnp.where(all_rows_B[:size] < num_active, order_B[:size], B)

        def run(i, carry):
            outputs, state = carry
            rows_R = jnp.where(i == 0, first_R, B)
            inputs_R = jax.tree.map(lambda a: a.at[rows_R].get(mode="clip"), inputs_B)
            new, state = fn(inputs_R, state, Rows(rows_R))
            place = lambda out_B, new_R: out_B.at[rows_R].set(new_R, mode="drop")
            return jax.tree.map(place, outputs, new), state

        return run

    def run_on_all(_, carry):
        new, state = fn(inputs_B, carry[1], all_rows)
        is_active = lambda a: active_B.reshape(B, *(1,) * (a.ndim - 1))
        return jax.tree.map(lambda a: jnp.where(is_active(a), a, jnp.zeros_like(a)), new), state

    smaller = 0
    for size in sizes(B, fractions):
        chosen = (smaller < num_active) & (num_active <= size)
        rounds = chosen.astype(jnp.int32)
        run = run_on_all if size == B else run_on(size)
        outputs, state = jax.lax.fori_loop(0, rounds, run, (outputs, state))
        smaller = size
    return outputs, state
