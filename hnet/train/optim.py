"""AdamW or Muon with a learning rate per stage, as pure functions of arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hnet.nn.parameters import ParameterInfo
from hnet.train.config import OptimConfig


class Length(NamedTuple):
    """Numbers of updates of a run and of its phases, float32."""

    total: jax.Array
    warmup: jax.Array
    decay: jax.Array

    @classmethod
    def of(cls, config: OptimConfig, num_steps: int) -> "Length":
        warmup, decay = (
            max(round(share * num_steps), 1) for share in (config.warmup_frac, config.decay_frac)
        )
        return cls(np.float32(num_steps), np.float32(warmup), np.float32(decay))


class Hyperparams(NamedTuple):
    """Traced numbers of the update: with other values it is not compiled again."""

    learning_rate: jax.Array
    weight_decay: jax.Array
    multiplier_S: jax.Array
    """learning-rate multiplier of each stage, the innermost included"""
    rate_control_gain: jax.Array
    """gain of the offsets that hold boundary rates"""
    ema_decay: jax.Array | float = 0.0
    """decay rate of the moving average of the parameters"""
    start_ratio_S: jax.Array | float = 1.0
    """target ratio of each chunking stage at the first update, if targets move"""
    ramp_frac: jax.Array | float = 1.0
    """fraction of the updates in which targets move"""
    spike_deviations: jax.Array | float = 0.0
    """number of deviations at which a loss or gradient norm is a spike, if there is that rule"""
    length: Length = Length(1.0, 1.0, 1.0)
    hold_from: jax.Array | int = 0
    """update from which on the controller acts, int32"""


def schedule(config: OptimConfig, step: jax.Array, length: Length) -> jax.Array:
    """Factor of the peak learning rate at update `step` (0 is the first), in (0, 1].

    The "20% inverse-square-root decay" of arXiv 2507.07955 is interpreted as 1 - sqrt(x), where x
    is the fraction of the decay steps done. Multiplies by reciprocals as XLA does where the divisor
    is a constant, so that the bits are those of a program that is compiled for one length.
    """
    step = step.astype(jnp.float32)
    total, warmup, decay = length
    warm = jnp.minimum((step + 1) * (1 / warmup), 1.0)
    match config.schedule:
        case "constant":
            return warm
        case "cosine":
            x = jnp.clip((step - warmup) * (1 / jnp.maximum(total - warmup, 1.0)), 0.0, 1.0)
            return warm * 0.5 * (1 + jnp.cos(jnp.pi * x))
        case "wsd":
            x = jnp.clip((step + 1 - (total - decay)) * (1 / (decay + 1)), 0.0, 1.0)
            return warm * (1 - jnp.sqrt(x))
        case other:
            raise ValueError(f"schedule {other!r} is unknown")


def optimizer(config: OptimConfig, infos: Any) -> optax.GradientTransformation:
    """Adam or Muon on clipped gradients; `direction` and `apply_update` complete the update.

    infos: `hnet.nn.parameters.describe` of the model. Muon (Jordan 2024): the mean of gradients of
    a matrix with Nesterov momentum, made nearly orthogonal by 5 Newton-Schulz iterations, times
    0.2 sqrt(max(rows, columns)), which gives it the root mean square of Adam's direction
    (arXiv 2502.16982). Each matrix of a stack of layers is made orthogonal by itself.
    """
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    match config.name:
        case "adamw":
            scale = adam
        case "muon":
            scale = _by_matrix(infos, _muon(config.momentum), adam)
        case other:
            raise ValueError(f"optimizer {other!r} is unknown")
    return optax.chain(_clip_by_global_norm(config.clip_norm), scale)


def _muon(momentum: float) -> optax.GradientTransformation:
    def dimensions(tree):
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), tree)

    def scaled(updates, params):
        del params
        return jax.tree.map(lambda u: 0.2 * max(u.shape[-2:]) ** 0.5 * u, updates)

    return optax.chain(
        optax.contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=dimensions),
        optax.stateless(scaled),
    )


def _by_matrix(infos: Any, matrix: Any, other: Any) -> optax.GradientTransformation:
    """`matrix` for the matrices among the parameters, `other` for all others."""

    def split(tree):
        return (
            jax.tree.map(lambda info, x: x if info.is_matrix else None, infos, tree),
            jax.tree.map(lambda info, x: None if info.is_matrix else x, infos, tree),
        )

    def init(params):
        matrices, others = split(params)
        return matrix.init(matrices), other.init(others)

    def update(grads, state, params=None):
        del params
        matrices, others = split(grads)
        matrices, first = matrix.update(matrices, state[0])
        others, second = other.update(others, state[1])
        one = jax.tree.map(lambda info, m, o: m if info.is_matrix else o, infos, matrices, others)
        return one, (first, second)

    return optax.GradientTransformation(init, update)


def _clip_by_global_norm(norm: float) -> optax.GradientTransformation:
    """Like optax's, but one multiplication per element: XLA runs its division as another pass."""

    def clip(grads, params):
        del params
        return optax.tree.scale(jnp.minimum(1.0, norm / optax.tree.norm(grads)), grads)

    return optax.stateless(clip)


def direction(
    config: OptimConfig, infos: Any, grads: Any, opt_state: optax.OptState
) -> tuple[Any, Any]:
    """(Adam's or Muon's direction of the clipped gradients, next optimizer state)."""
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        return optimizer(config, infos).update(grads, opt_state)


def average(ema: Any, params: Any, decay: jax.Array, step: jax.Array) -> Any:
    """Moving average of the parameters after update `step` (0 is the first).

    Its decay is min(decay, (1 + step) / (10 + step)), so that it soon forgets the initialisation.
    """
    step = step.astype(jnp.float32)
    share = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: e + share.astype(p.dtype) * (p - e), ema, params)


def targets_at(hparams: Hyperparams, numbers: Any, step: jax.Array) -> Any:
    """`numbers` of the stages (`HNetConfig.numbers`) with the target ratios of update `step`.

    N moves linearly from its start to the configured one in `ramp_frac` of the updates.
    """
    last = jnp.maximum(hparams.ramp_frac * hparams.length.total - 1, 1.0)
    x = jnp.minimum(step.astype(jnp.float32) / last, 1.0)

    def at(s, own):
        start = hparams.start_ratio_S[s]
        return own | {"target_ratio_R": start + x * (own["target_ratio_R"] - start)}

    return tuple(at(s, own) for s, own in enumerate(numbers))


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
