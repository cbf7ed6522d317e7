"""Sampling: from logits to the next byte of every row."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hnet.config import EOS_ID
from hnet.decode import utf8
from hnet.errors import ConfigError

NUM_BYTES = 256
_MOST = 1 << 30  # upper limit: values become int32, and lengths are rounded up


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Filters apply in the order of the fields."""

    max_bytes: int = 256
    """maximum number of bytes of the continuation"""
    repetition_penalty: float = 1.0
    """factor that divides positive logits of recent bytes and multiplies negative ones; 1 = off"""
    repetition_window: int = 64
    """number of bytes, prompt included, that count as recent"""
    valid_utf8: bool = False
    """whether to allow only bytes that keep the text valid UTF-8 and let it end on a whole
    character within max_bytes"""
    temperature: float = 1.0
    """divisor of the logits; 0 = greedy"""
    top_k: int = 0
    """number of most probable bytes to keep; 0 = all"""
    top_p: float = 1.0
    """total probability of the most probable bytes to keep"""
    min_p: float = 0.0
    """minimum probability of the bytes to keep, relative to the most probable byte"""
    stop: tuple[str, ...] = ()
    """strings that end the text; it ends before the first of them"""
    eos: bool = True
    """whether byte 255 ends the text; if not, it is never drawn"""
    seed: int = 0
    """seed of the first row; row i has seed + i"""

    def __post_init__(self):
        for name, least in (("max_bytes", 1), ("repetition_window", 1), ("top_k", 0), ("seed", 0)):
            if not least <= (value := getattr(self, name)) <= _MOST:
                raise ConfigError(f"{name}={value}: use {least} to {_MOST}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(
                f"temperature={self.temperature}: use 0 (greedy) or a positive number"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: use a share above 0 and up to 1")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p={self.min_p}: use a share from 0 to 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ConfigError(
                f"repetition_penalty={self.repetition_penalty}: use 1 (off) or a positive number"
            )
        if "" in self.stop:
            raise ConfigError("stop='' ends every text at once: give strings that are not empty")


DEFAULT = Sampling()


class Controls(NamedTuple):
    """The numbers of `Sampling` as traced scalars, so that changing a value does not recompile."""

    max_bytes: jax.Array
    repetition_penalty: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    valid_utf8: jax.Array
    eos: jax.Array

    @classmethod
    def of(cls, sampling: Sampling) -> "Controls":
        return cls(
            jnp.int32(sampling.max_bytes),
            jnp.float32(sampling.repetition_penalty),
            jnp.float32(sampling.temperature),
            jnp.int32(sampling.top_k or NUM_BYTES),
            jnp.float32(sampling.top_p),
            jnp.float32(sampling.min_p),
            jnp.bool_(sampling.valid_utf8),
            jnp.bool_(sampling.eos),
        )


def penalise(logits_BV: jax.Array, recent_BW: jax.Array, penalty: jax.Array) -> jax.Array:
    """Repetition penalty (arXiv 1909.05858, section 4.1); recent_BW: bytes, -1 = empty entry."""
    index_BW = jnp.where(recent_BW < 0, logits_BV.shape[1], recent_BW)
    mark = jax.vmap(lambda seen_V, index_W: seen_V.at[index_W].set(True, mode="drop"))
    seen_BV = mark(jnp.zeros(logits_BV.shape, bool), index_BW)
    lowered_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, lowered_BV, logits_BV)


def keep_likely(
    logits_BV: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array
) -> jax.Array:
    """Set logits to -inf outside the top k, then outside the nucleus of mass top_p (arXiv
    1904.09751), then below min_p times the highest probability (arXiv 2407.01082).

    Bytes that tie with the last byte kept are also kept.
    """
    V = logits_BV.shape[1]
    descending_BV = -jnp.sort(-logits_BV, axis=1)
    in_k_V = jnp.arange(V, dtype=jnp.int32) < top_k
    probs_BV = jax.nn.softmax(jnp.where(in_k_V[None], descending_BV, -jnp.inf), axis=1)
    mass_before_BV = jnp.cumsum(probs_BV, axis=1) - probs_BV
    in_nucleus_BV = (mass_before_BV < top_p) | (top_p >= 1)  # rounding: the sum may reach 1 early
    kept_BV = in_k_V[None] & in_nucleus_BV
    lowest_B1 = jnp.min(jnp.where(kept_BV, descending_BV, jnp.inf), axis=1, keepdims=True)
    floor_B1 = jnp.maximum(lowest_B1, descending_BV[:, :1] + jnp.log(min_p))
    return jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)


def inverse_cdf(probs_BV: jax.Array, u_B: jax.Array) -> jax.Array:
    """Sample bytes by inverting the CDF at u in [0, 1); bytes with p = 0 are never returned."""
    mass_BV = jnp.cumsum(probs_BV, axis=1)
    total_B = mass_BV[:, -1]  # 1 up to rounding
    target_B = jnp.minimum(u_B * total_B, jnp.nextafter(total_B, jnp.zeros_like(total_B)))
    return jnp.sum(mass_BV <= target_B[:, None], axis=1, dtype=jnp.int32)


def sample(
    logits_BV: jax.Array,
    controls: Controls,
    seed_B: jax.Array,
    count_B: jax.Array,
    recent_BW: jax.Array,
    utf8_state_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(byte (B,), its log-probability under the model, before any filter).

    Byte `count_B` of a row depends on the seed and the logits of that row, not on other rows.
    """
    log_probs_BV = jax.nn.log_softmax(logits_BV, axis=1)[:, :NUM_BYTES]
    logits_BV = penalise(logits_BV[:, :NUM_BYTES], recent_BW, controls.repetition_penalty)
    well_BV = utf8.allowed(utf8_state_B, controls.max_bytes - count_B)
    may_end_B = utf8_state_B == utf8.START
    well_BV = well_BV.at[:, EOS_ID].set(may_end_B)
    may_BV = (well_BV | ~controls.valid_utf8).at[:, EOS_ID].min(controls.eos)
    logits_BV = jnp.where(may_BV, logits_BV, -jnp.inf)
    filters = (controls.top_k < NUM_BYTES) | (controls.top_p < 1) | (controls.min_p > 0)

    def draw(logits_BV):
        logits_BV = jax.lax.cond(  # skipped if no filter is on, because filters sort
            filters,
            lambda l_BV: keep_likely(l_BV, controls.top_k, controls.top_p, controls.min_p),
            lambda l_BV: l_BV,
            logits_BV / controls.temperature,
        )
        u_B = jax.vmap(
            lambda seed, n: jax.random.uniform(jax.random.fold_in(jax.random.key(seed), n))
        )(seed_B, count_B)
        return inverse_cdf(jax.nn.softmax(logits_BV, axis=1), u_B)

    greedy = lambda logits_BV: jnp.argmax(logits_BV, axis=1).astype(jnp.int32)
    byte_B = jax.lax.cond(controls.temperature > 0, draw, greedy, logits_BV)
    return byte_B, jnp.take_along_axis(log_probs_BV, byte_B[:, None], axis=1)[:, 0]
