"""What a mixer is: a layer that mixes positions, whole rows at a time or position by position."""

from typing import Any, ClassVar

import jax
from flax import nnx

from hnet.config import HNetConfig, StageConfig
from hnet.nn.context import Context, StepContext


class Mixer(nnx.Module):
    """Base of all mixers. Forward and step compute the same: y_t depends on x_<=t of a segment."""

    can_look_ahead: ClassVar[bool] = False
    """whether it can be built with ``causal=False``: every position sees its whole segment"""

    def __init__(
        self, config: HNetConfig, stage: StageConfig, *, out_std: float, causal: bool,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        """out_std: of the weights into the residual stream. causal: see `can_look_ahead`."""
        raise NotImplementedError

    @staticmethod
    def problem(config: HNetConfig, stage: StageConfig) -> str | None:
        """One line, "field=value: remedy", on a stage it cannot be built for; None if it can."""
        return None

    def __call__(self, x_BLD: jax.Array, context: Context) -> jax.Array:
        """The mixed states of whole rows, in any float dtype."""
        raise NotImplementedError

    def prefill(
        self, x_BLD: jax.Array, context: Context, lengths_B: jax.Array, max_len: int
    ) -> tuple[jax.Array, Any]:
        """`__call__`, and a cache with room for `max_len` positions per row.

        Rows end at lengths_B; what the cache holds is of the last segment before that.
        """
        raise NotImplementedError

    def step(
        self, x_R1D: jax.Array, cache: Any, at: tuple, context: StepContext
    ) -> tuple[jax.Array, Any]:
        """One position of R rows, whose state lies `at` a place in the cache (`hnet.nn.cache`)."""
        raise NotImplementedError
