"""Lexinvariant embeddings: a fresh random table for each document, and no parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.nn.embeddings.part import Embedding, EmbeddingConfig
from hnet.nn.layers import segment_starts


class Lexinvariant(Embedding):
    """A random normal table for each document, also in the tied head (arXiv 2305.16349).

    In training the key of a document's table is the step's key, folded with the document's row and
    its number there. Without a key, as in evaluation and streaming, all documents have one fixed
    table, so a document's logits do not depend on its place. Logits are divided by sqrt(D), since
    the table cannot shrink.
    """

    @dataclass(frozen=True)
    class Config(EmbeddingConfig):
        """A fresh random table for each document."""

        def problem_in(self, owner):
            if owner.tie_embeddings:
                return None
            return (
                "tie_embeddings=False with embedding='lexinvariant': a head with weights of its "
                "own cannot follow a table that is new in each document, use True"
            )

        def num_parameters(self, vocab_size, d_model):
            return 0

    def __init__(self, config, vocab_size, d_model, *, rngs: nnx.Rngs):
        super().__init__(config, vocab_size, d_model, rngs=rngs)
        self.shape = (vocab_size, d_model)

    def step(self, state, byte_R):
        return state, jnp.take(self._fixed_table(), byte_R, axis=0)

    def __call__(self, input_ids_BL, context, *, key=None):
        if key is None:
            return jnp.take(self._fixed_table(), input_ids_BL, axis=0)
        pick = jax.vmap(lambda table_VD, byte: table_VD[byte])
        return _by_document(pick, self.shape, context.segment_ids_BL, key, input_ids_BL)

    def attend(self, x_BLD, context=None, *, key=None):
        x_BLD = x_BLD * self.shape[1] ** -0.5
        if key is None:
            return jnp.dot(x_BLD, self._fixed_table().T)
        return _scores(self.shape, x_BLD, context.segment_ids_BL, key)

    def _fixed_table(self) -> jax.Array:
        return jax.random.normal(jax.random.key(0), self.shape, jnp.float32)


def _by_document(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    shape: tuple[int, int],
    segment_ids_BL: jax.Array,
    key: jax.Array,
    inputs_BL: jax.Array,
) -> jax.Array:
    """Scan `function(tables (B, V, D) of the documents, inputs of B positions)` along the rows."""
    B = segment_ids_BL.shape[0]
    keys_B = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(B, dtype=jnp.int32))

    def draw(row_key, document):
        return jax.random.normal(jax.random.fold_in(row_key, document), shape, jnp.float32)

    def one(tables_BVD, position):
        starts_B, document_B, inputs_B = position

        def renewed():
            return jnp.where(
                starts_B[:, None, None], jax.vmap(draw)(keys_B, document_B), tables_BVD
            )

        tables_BVD = jax.lax.cond(jnp.any(starts_B), renewed, lambda: tables_BVD)
        return tables_BVD, function(tables_BVD, inputs_B)

    by_time = (segment_starts(segment_ids_BL).T, segment_ids_BL.T, jnp.moveaxis(inputs_BL, 1, 0))
    tables = jnp.zeros((B, *shape), jnp.float32)
    return jnp.moveaxis(jax.lax.scan(one, tables, by_time)[1], 0, 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(shape, x_BLD, segment_ids_BL, key):
    """Products of states with the tables of their documents, (B, L, V).

    The gradient draws the tables again; JAX's would keep one per position.
    """
    into = partial(jnp.einsum, "bvd,bd->bv")
    return _by_document(into, shape, segment_ids_BL, key, x_BLD)


def _scores_fwd(shape, x_BLD, segment_ids_BL, key):
    return _scores(shape, x_BLD, segment_ids_BL, key), (segment_ids_BL, key)


def _scores_bwd(shape, saved, grad_BLV):
    back = partial(jnp.einsum, "bvd,bv->bd")
    return _by_document(back, shape, *saved, grad_BLV), None, None


_scores.defvjp(_scores_fwd, _scores_bwd)
