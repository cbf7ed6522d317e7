"""Predictors without parameters: rules of bytes or of a position's index, and given boundaries."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from hnet.chunking.boundaries import Prediction
from hnet.chunking.part import BoundaryPredictor, PredictorConfig
from hnet.nn.layers import segment_positions, segment_starts


def is_spacelike(byte: jax.Array) -> jax.Array:
    """Whether a byte is not an ASCII letter or digit, nor a UTF-8 continuation byte
    (kjslag/spacebyte)."""
    folded = byte | 0x20  # maps upper case to lower case
    alphanumeric = ((folded >= ord("a")) & (folded <= ord("z"))) | (
        (byte >= ord("0")) & (byte <= ord("9"))
    )
    return ~(alphanumeric | ((byte >= 0x80) & (byte <= 0xBF)))


def spacelike(input_ids_BL: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    """The first spacelike byte of each run of them (SpaceByte, arXiv 2404.14408).

    Runs do not cross segments, so a segment that begins with a spacelike byte has a boundary there.
    """
    now_BL = is_spacelike(input_ids_BL)
    before_BL = jnp.pad(now_BL[:, :-1], ((0, 0), (1, 0)))
    return now_BL & (~before_BL | segment_starts(segment_ids_BL))


def _certain(boundary: jax.Array) -> Prediction:
    return Prediction(prob=boundary.astype(jnp.float32))


class Rule(BoundaryPredictor):
    """Base of rules: no parameters, p is 0 or 1."""

    reads_states = False
    is_learned = False
    takes_offset = False
    target_is_static = False


class Spacelike(Rule):
    """The first spacelike byte of each run (SpaceByte, arXiv 2404.14408)."""

    reads_bytes = True
    most_at_first = 2.0

    @dataclass(frozen=True)
    class Config(PredictorConfig):
        """First byte of each run of spacelike bytes (SpaceByte)."""

    def init(self, rows):
        return jnp.zeros((rows,), bool)

    def step(self, was_spacelike_R, x):
        now_R = is_spacelike(x.context.bytes_BL)
        return now_R, _certain(now_R & ~was_spacelike_R)

    def __call__(self, rows):
        return _certain(spacelike(rows.context.bytes_BL, rows.context.segment_ids_BL))

    def after(self, rows):
        return (rows.lengths_B > 0) & rows.at_end(is_spacelike(rows.context.bytes_BL))


class Whitespace(Rule):
    """Every space (0x20), the only white space in dynamic pooling's text (arXiv 2211.09761)."""

    reads_bytes = True
    most_at_first = 2.0

    @dataclass(frozen=True)
    class Config(PredictorConfig):
        """Every space, 0x20 (DTP)."""

    def step(self, state, x):
        return state, _certain(x.context.bytes_BL == ord(" "))

    def __call__(self, rows):
        return _certain(rows.context.bytes_BL == ord(" "))


class Fixed(Rule):
    """Positions 0, N, 2 N, ... of each document, with either alignment.

    With alignment end the first chunk therefore has one position, as in dynamic pooling.
    """

    target_is_static = True
    most_at_first = 1.08  # below 1 / WORTH, so that the slots of long documents stay

    @dataclass(frozen=True)
    class Config(PredictorConfig):
        """Every target_ratio positions."""

        def problem_in(self, chunking):
            if (stride := chunking.target_ratio) != int(stride):
                return (
                    f"target_ratio={stride} is the stride of predictor='fixed': use a whole number"
                )
            return None

    def __init__(self, config, place, *, rngs):
        super().__init__(config, place, rngs=rngs)
        self.stride = int(place.chunking.target_ratio)

    def step(self, state, x):
        return state, _certain(x.index_R % self.stride == 0)

    def __call__(self, rows):
        return _certain(segment_positions(rows.context.segment_ids_BL) % self.stride == 0)


class External(Rule):
    """Boundaries that the caller passes to the model (`boundaries_BL` of `HNetLM`)."""

    reads_bytes = True

    @dataclass(frozen=True)
    class Config(PredictorConfig):
        """Boundaries given with the bytes."""

        def training_problem(self, data):
            return (
                "predictor='external', but no input of a run brings boundaries: use another "
                "predictor, or train with a step of your own"
            )

    def step(self, state, x):
        return state, _certain(x.context.external_boundary_BL)

    def __call__(self, rows):
        return _certain(rows.context.external_boundary_BL)
