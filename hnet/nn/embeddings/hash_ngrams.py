"""Hashed n-grams: vectors of the last n bytes from tables that n-grams share (BLT)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.bounds import Bounds
from hnet.nn.embeddings.bytes import Bytes
from hnet.nn.embeddings.part import EmbeddingConfig
from hnet.nn.layers import INIT_STD, segment_positions
from hnet.nn.parameters import parameter

# Multipliers of the hash functions (facebookresearch/blt).
PRIMES = (
    1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899, 9576890767, 3628273133,
    2860486313, 5463458053, 3367900313,
)  # fmt: skip
OFFSET = 4  # byte b is token b + 4 in BLT; 0 stands before a document
_MOST_TOKENS = 2**12  # so that sums of n <= 8 products with 16 bits fit into 32 bits


def ngram_hash(tokens: Sequence[jax.Array], prime: int, rows: int) -> jax.Array:
    """(sum_i tokens[i] prime^i as a signed 64-bit integer with wrap-around) mod rows, int32.

    tokens: n <= 8 arrays of one shape, oldest first, values below 4096. rows: at most 2^21. JAX has
    no 64-bit integers by default: the sum is computed in four words of 16 bits, and its remainder
    from the remainders of the powers of 256.
    """
    powers = [pow(prime, i, 2**64) for i in range(len(tokens))]
    carry = jnp.zeros(tokens[0].shape, jnp.uint32)
    words = []
    for k in range(4):
        for token, power in zip(tokens, powers):
            carry += token.astype(jnp.uint32) * np.uint32(power >> 16 * k & 0xFFFF)
        words.append(carry & np.uint32(0xFFFF))
        carry >>= np.uint32(16)
    is_negative = words[3] >> np.uint32(15)
    total = is_negative * np.uint32(-(2**64) % rows)
    for k, word in enumerate(words):
        total += (word & np.uint32(0xFF)) * np.uint32(pow(256, 2 * k, rows))
        total += (word >> np.uint32(8)) * np.uint32(pow(256, 2 * k + 1, rows))
    return (total % np.uint32(rows)).astype(jnp.int32)


class HashNgrams(Bytes):
    """One vector per byte value, plus vectors of hashed n-grams of bytes (BLT, arXiv 2412.09871).

    x_t = table[byte t] + sum over n and hash functions f of table_nf[hash_f(bytes t-n+1 ... t)]. In
    BLT both kinds of tables begin with the same standard deviation; here those of the n-grams begin
    at 0.02, so that n-grams that were never seen add next to nothing. N-grams do not cross
    documents.
    """

    @dataclass(frozen=True)
    class Config(EmbeddingConfig):
        """Vectors of hashed n-grams, added to those of the bytes (BLT)."""

        sizes: tuple[Annotated[int, Bounds(2, 8)], ...] = (3, 4, 5, 6, 7, 8)
        """n of each group of tables"""
        functions: Annotated[int, Bounds(1, len(PRIMES))] = 1
        """number of hash functions, each with a table of its own, per n"""
        rows: Annotated[int, Bounds(1, 2**21)] = 8192
        """number of rows per table (500,002 in BLT)"""

        @property
        def tables(self) -> tuple[tuple[int, int], ...]:
            """(n, prime) of each table."""
            return tuple((n, prime) for n in self.sizes for prime in PRIMES[: self.functions])

        def problem(self):
            if not self.sizes or len(set(self.sizes)) < len(self.sizes):
                return f"sizes={self.sizes}: give different numbers from 2 to 8, at least one"
            return None

        def problem_in(self, owner):
            if owner.vocab_size > _MOST_TOKENS - OFFSET:
                return (
                    f"vocab_size={owner.vocab_size} with embedding='hash_ngrams', which is for "
                    f"bytes: use at most {_MOST_TOKENS - OFFSET}, or embedding='bytes'"
                )
            return None

        def num_parameters(self, vocab_size, d_model):
            return (vocab_size + len(self.tables) * self.rows) * d_model

    def __init__(self, config, vocab_size, d_model, *, rngs: nnx.Rngs):
        super().__init__(config, vocab_size, d_model, rngs=rngs)
        shape = (len(config.tables), config.rows, d_model)
        tables = INIT_STD * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.hash_embeddings = parameter(tables, "tables vocab embed")

    def init(self, rows):
        """The last n - 1 tokens, oldest first."""
        return jnp.zeros((rows, max(self.config.sizes) - 1), jnp.int32)

    def step(self, state, byte_R):
        window_RN = jnp.concatenate([state, byte_R[:, None] + OFFSET], axis=1)
        x_RD = self.rows(byte_R) + self._ngrams([*window_RN.T])
        return window_RN[:, 1:], x_RD

    def __call__(self, input_ids_BL, context, *, key=None):
        return self.rows(input_ids_BL) + self._ngrams(self._windows(input_ids_BL, context))

    def after(self, input_ids_BL, context):
        lengths_B = jnp.sum(context.segment_ids_BL != 0, axis=1, dtype=jnp.int32)
        *_, last = windows = self._windows(input_ids_BL, context)
        at_end = lambda a_BL: jnp.take_along_axis(
            a_BL, jnp.maximum(lengths_B - 1, 0)[:, None], axis=1
        )
        state = jnp.concatenate([at_end(a_BL) for a_BL in windows[1:]], axis=1)
        return jnp.where((lengths_B > 0)[:, None], state, 0)

    def ids(self, tokens: Sequence[jax.Array]) -> jax.Array:
        """Row of each table, (tables, ...), for the last tokens, oldest first."""
        hashed = [
            ngram_hash(tokens[-n:], prime, self.config.rows) for n, prime in self.config.tables
        ]
        return jnp.stack(hashed)

    def _windows(self, input_ids_BL, context) -> list[jax.Array]:
        """The last tokens at each position, (B, L) each, oldest first; 0 before the document."""
        position_BL = segment_positions(context.segment_ids_BL)
        found = []
        for back in reversed(range(max(self.config.sizes))):
            earlier_BL = jnp.pad(input_ids_BL, ((0, 0), (back, 0)))[:, : input_ids_BL.shape[1]]
            found.append(jnp.where(position_BL >= back, earlier_BL + OFFSET, 0))
        return found

    def _ngrams(self, tokens: Sequence[jax.Array]) -> jax.Array:
        """Sum of the vectors of all tables; a scan, so that gradients are stacked like tables."""

        def add(total, table):
            table_ND, ids = table
            return total + jnp.take(table_ND, ids, axis=0), None

        zeros = jnp.zeros((*tokens[0].shape, self.hash_embeddings.shape[-1]), jnp.float32)
        return jax.lax.scan(add, zeros, (self.hash_embeddings[...], self.ids(tokens)))[0]
