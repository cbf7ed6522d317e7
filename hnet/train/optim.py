"""AdamW with a learning rate per stage, as pure functions of arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hnet.nn.parameters import ParameterInfo
from hnet.train.config import OptimConfig


class Hyperparams(NamedTuple):
    """Traced numbers of the update, so that a sweep over them compiles only once."""

    learning_rate: jax.Array
    weight_decay: jax.Array
    multiplier_S: jax.Array
    """learning-rate multiplier of each stage, the innermost included"""
    controller_gain: jax.Array
    """gain of the offsets that hold boundary rates"""


def schedule(config: OptimConfig, step: jax.Array, num_steps: int) -> jax.Array:
    """Factor of the peak learning rate at update `step` (0 is the first), in (0, 1].

    The "20% inverse-square-root decay" of arXiv 2507.07955 is interpreted as 1 - sqrt(x), where x
    is the fraction of the decay steps done.
    """
    step = step.astype(jnp.float32)
    warmup = max(round(config.warmup_frac * num_steps), 1)
    warm = jnp.minimum((step + 1) / warmup, 1.0)
    match config.schedule:
        case "constant":
            return warm
        case "cosine":
            x = jnp.clip((step - warmup) / max(num_steps - warmup, 1), 0.0, 1.0)
            return warm * 0.5 * (1 + jnp.cos(jnp.pi * x))
        case "wsd":
            decay = max(round(config.decay_frac * num_steps), 1)
            x = jnp.clip((step + 1 - (num_steps - decay)) / (decay + 1), 0.0, 1.0)
            return warm * (1 - jnp.sqrt(x))
        case other:
            raise ValueError(f"schedule {other!r} is unknown")


def optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Adam on clipped gradients; `direction` and `apply_update` complete the update."""
    return optax.chain(
        _clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
    )


def _clip_by_global_norm(norm: float) -> optax.GradientTransformation:
    """Like optax's, but one multiplication per element: XLA runs its division as another pass."""

    def clip(grads, params):
        del params
        return optax.tree.scale(jnp.minimum(1.0, norm / optax.tree.norm(grads)), grads)

    return optax.stateless(clip)


def direction(config: OptimConfig, grads: Any, opt_state: optax.OptState) -> tuple[Any, Any]:
    """(Adam direction of the clipped gradients, next optimizer state)."""
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        return optimizer(config).update(grads, opt_state)


def apply_update(
    params: Any, directions: Any, infos: Any, hparams: Hyperparams, factor: jax.Array
) -> Any:
    """p - lr (direction + weight_decay p), lr = learning_rate * factor * the stage's multiplier.

    infos: `hnet.nn.parameters.describe` of the model; weight_decay is 0 for parameters whose
    `decay` is False. A parameter whose direction is None stays as it is.
    """

    def update(info: ParameterInfo, p, d):
        if d is None:
            return p
        rate = hparams.learning_rate * factor * hparams.multiplier_S[info.stage]
        return p - rate * (d + hparams.weight_decay * p if info.decay else d)

    return jax.tree.map(update, infos, params, directions)
