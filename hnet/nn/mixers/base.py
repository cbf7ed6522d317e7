"""Interface of mixers: layers that mix positions, for whole rows or one position at a time."""

from typing import Any, ClassVar

import jax
from flax import nnx

from hnet.nn.context import Context, StepContext
from hnet.nn.settings import SharedConfig, StackConfig


class Mixer(nnx.Module):
    """Base of all mixers. `__call__` and `step` agree: y_t depends on x_<=t of its segment."""

    can_look_ahead: ClassVar[bool] = False
    """whether it supports ``causal=False``, with which every position sees its whole segment"""

    reads_memory: ClassVar[bool] = False
    """whether it reads `context.memory`, which only decoders have"""

    takes_key_bias: ClassVar[bool] = False
    """whether it adds `context.key_bias_BL` to the scores of its keys, or sees no other position"""

    def __init__(
        self, config: SharedConfig, stage: StackConfig, *, out_std: float, causal: bool,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        """out_std: initial standard deviation of the output projection into the residual stream.
        causal: see `can_look_ahead`."""
        raise NotImplementedError

    @staticmethod
    def problem(config: SharedConfig, stage: StackConfig) -> str | None:
        """One line, "field=value: remedy", if it cannot be built for the stage; None if it can."""
        return None

    def __call__(self, x_BLD: jax.Array, context: Context) -> jax.Array:
        """Output for whole rows, in any float dtype."""
        raise NotImplementedError

    def prefill(
        self, x_BLD: jax.Array, context: Context, lengths_B: jax.Array, max_len: int
    ) -> tuple[jax.Array, Any]:
        """`__call__`, and a cache with room for `max_len` positions per row.

        Rows end at lengths_B; the cache is the state at the end of the last segment before that.
        """
        raise NotImplementedError

    def step(
        self, x_R1D: jax.Array, cache: Any, at: tuple, context: StepContext
    ) -> tuple[jax.Array, Any]:
        """One position of R rows; `at` is the place of their state (`hnet.nn.cache`)."""
        raise NotImplementedError
