"""The language model: bytes -> embeddings -> stages -> logits of the next byte."""

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.chunking.router import RouterOutput
from hnet.chunking.rules import byte_boundaries
from hnet.config import HNetConfig
from hnet.nn.layers import linear, segment_starts
from hnet.nn.parameters import metadata, set_stage
from hnet.stage import HNet


class HNetLM(nnx.Module):
    """An H-Net over bytes. `config.stages` says all there is to know about its shape."""

    def __init__(self, config: HNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, vocab = config.stages[0].d_model, config.vocab_size
        self.embeddings = nnx.Embed(
            vocab, width, embedding_init=nnx.initializers.normal(1.0), rngs=rngs,
            embedding_metadata=metadata("vocab embed"),
        )  # fmt: skip
        self.backbone = HNet(config, rngs=rngs)
        head = linear(width, vocab, "embed vocab", dtype=config.compute.dtype, rngs=rngs)
        self.lm_head = None if config.tie_embeddings else head
        set_stage(self, 0)  # embeddings and head

    def __call__(
        self,
        input_ids_BL: jax.Array,
        segment_ids_BL: jax.Array | None = None,
        *,
        capacities: tuple[int | None, ...] | None = None,
        packed_rows: int = 1,
        route_ids_BL: jax.Array | None = None,
        boundaries_BL: jax.Array | None = None,
        key: jax.Array | None = None,
        temperature: jax.Array | None = None,
    ) -> tuple[jax.Array, list[RouterOutput]]:
        """Logits of the byte after each position, and what each stage's router decided.

        input_ids_BL: int32 byte values. segment_ids_BL: equal neighbours are one document and see
        nothing of others; 0 is padding; default is one document a row. packed_rows: rows whose
        chunks share a row of slots in all stages inside (static; divides B); a row that cuts often
        takes what another leaves, and the outputs of inner routers are of packed rows. capacities:
        slots of such a row for each stage that cuts (static); the default, or None for a stage, is
        as many as any boundaries need, which clips nothing. Logits at t depend on bytes <= t of the
        same document only, and on inputs at positions <= t:

        route_ids_BL: int32 in [0, routes), needed if a stage tells routes apart; a chunk has the
        route of the position on which the main network runs for it. boundaries_BL: bool, needed by
        the router "given" of stage 0. key: of the noise of relaxed routers; None, as in evaluation,
        is none. temperature: of those routers, in the place of the configured one (traced).

        Raises ValueError if an input that the configuration needs is not given.
        """
        if segment_ids_BL is None:
            segment_ids_BL = jnp.ones_like(input_ids_BL)
        if capacities is None:
            capacities = (None,) * self.config.num_chunked
        segment_ids_BL = _number_runs(segment_ids_BL)
        with jax.named_scope("embeddings"):
            x_BLD = self.embeddings(input_ids_BL)
        with jax.named_scope("stage0"):
            x_BLD, routes = self.backbone(
                x_BLD, segment_ids_BL, capacities, packed_rows=packed_rows,
                route_ids_BL=self.checked_routes(route_ids_BL),
                boundaries_BL=self.boundaries(input_ids_BL, segment_ids_BL, boundaries_BL),
                key=key, temperature=temperature,
            )  # fmt: skip
        with jax.named_scope("lm_head"):
            return self.logits(x_BLD), routes

    def checked_routes(self, route_ids_BL: jax.Array | None) -> jax.Array | None:
        """The route ids within their range; None if the model tells no routes apart."""
        routes = self.config.num_routes
        if routes == 1:
            return None
        if route_ids_BL is None:
            raise ValueError(f"the model has {routes} routes: give route_ids_BL")
        return jnp.clip(route_ids_BL, 0, routes - 1)

    def boundaries(self, input_ids_BL, segment_ids_BL, given_BL) -> jax.Array | None:
        """Boundaries of stage 0 where they are no matter of its states."""
        chunking = self.config.stages[0].chunking
        if not (self.config.num_chunked and chunking.reads_bytes):
            return None
        if chunking.router == "given" and given_BL is None:
            raise ValueError("router='given' cuts where it is told: give boundaries_BL")
        return byte_boundaries(chunking, input_ids_BL, segment_ids_BL, given_BL)

    def logits(self, x_BLD: jax.Array) -> jax.Array:
        """Logits of the next byte, float32 (B, L, V), of what the backbone returned."""
        head = self.embeddings.attend if self.lm_head is None else self.lm_head
        return head(x_BLD).astype(jnp.float32)


def _number_runs(segment_ids_BL: jax.Array) -> jax.Array:
    """Give every run of equal ids its own number, 0 staying padding.

    Resets compare ids, so a row 1 1 2 2 1 must not let its last run see its first.
    """
    run_BL = jnp.cumsum(segment_starts(segment_ids_BL), axis=1, dtype=jnp.int32)
    return jnp.where(segment_ids_BL == 0, 0, run_BL)


def split(model: HNetLM) -> tuple[nnx.GraphDef, dict]:
    """(structure, parameters as nested dicts of arrays); `nnx.merge` is the way back.

    This is the one seam between modules and JAX: beyond it everything is pure functions of
    pytrees under `jax.jit`.
    """
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)


def abstract(config: HNetConfig) -> tuple[nnx.GraphDef, dict]:
    """`split` of a model whose parameters are shapes: costs no memory at any size."""
    graph, state = nnx.split(nnx.eval_shape(lambda: HNetLM(config, rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def init_params(config: HNetConfig, key: jax.Array) -> dict:
    """Freshly initialised parameters; jit it with out_shardings to create them in place."""
    return split(HNetLM(config, rngs=nnx.Rngs(key)))[1]
