"""Interface of the network inside the innermost stage: our stacks of blocks, or a user's class.

A configuration names a user's class as the layout of the innermost stage,
``arch_layout=("my_paper.nets:Reservoir",)``.
"""

from typing import Any

import jax
from flax import nnx

from hnet.errors import ConfigError
from hnet.nn.cache import Rows
from hnet.nn.context import Context, StepContext
from hnet.parts import find_object


class Stack(nnx.Module):
    """(B, L, D) -> (B, L, D), causal and separate for each segment.

    Parameters name their axes (`hnet.nn.parameters.parameter`). Arrays of a cache have a leading
    axis of any size, then the rows: `hnet.nn.cache.read` and `write` at `(i, rows)`.
    """

    def __init__(self, config, stage, layout: str, *, num_residuals: int, rngs: nnx.Rngs):
        """config, stage: `HNetConfig` and `StageConfig`. num_residuals: number of residual
        additions of all stages around it."""
        raise NotImplementedError

    @staticmethod
    def problem(config, stage) -> str | None:
        """One line, "field=value: remedy", if it cannot be built for the stage; None if it can."""
        return None

    def __call__(self, x_BLD: jax.Array, context: Context) -> jax.Array:
        """Output for whole rows, float32."""
        raise NotImplementedError

    def prefill(
        self, x_BLD: jax.Array, context: Context, lengths_B: jax.Array, max_len: int
    ) -> tuple[jax.Array, Any]:
        """`__call__`, and a cache with room for `max_len` positions per row.

        Segment ids are 0 from lengths_B on; later steps continue the last segment before that.
        """
        raise NotImplementedError

    def step(
        self, x_RD: jax.Array, caches: Any, rows: Rows, context: StepContext
    ) -> tuple[jax.Array, Any]:
        """The next position of some rows."""
        raise NotImplementedError


def find_stack(place: str) -> type[Stack]:
    """The class of "package.module:Class". Raises ConfigError if there is none."""
    found = find_object(place, "network")
    if not (isinstance(found, type) and issubclass(found, Stack)):
        raise ConfigError(f"network {place!r} is no subclass of hnet.nn.stack.Stack")
    return found
