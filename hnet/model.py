"""The language model: bytes -> embeddings -> stages -> logits for the next byte."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.chunking.boundaries import Boundaries
from hnet.config import HNetConfig
from hnet.nn.context import Context
from hnet.nn.layers import linear, segment_starts
from hnet.nn.parameters import set_stage
from hnet.stage import HNet, Numbers


class HNetLM(nnx.Module):
    """An H-Net over bytes. `config.stages` defines its architecture."""

    bos: bool = True
    """Whether the model was trained on texts that begin with byte 254 (`data.bos_eos`). `load` sets
    it; official weights do not say, and the official tokenizer puts the byte first."""

    tokenizer: str = ""
    """tokenizer.json of a model that was trained on tokens (`data.tokenizer`); empty: bytes. `load`
    sets it."""

    def __init__(self, config: HNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, vocab = config.stages[0].d_model, config.vocab_size
        self.embeddings = config.embedding.part(config.embedding, vocab, width, rngs=rngs)
        self.backbone = HNet(config, rngs=rngs)
        head = linear(
            width,
            vocab,
            "embed vocab",
            dtype=config.compute.dtype,
            inputs=config.compute.inputs,
            rngs=rngs,
        )
        self.lm_head = None if config.tie_embeddings else head
        set_stage(self, 0)  # embeddings and head

    def __call__(
        self,
        input_ids_BL: jax.Array,
        segment_ids_BL: jax.Array | None = None,
        *,
        capacities: tuple[int | None, ...] | None = None,
        rows_sharing_slots: int = 1,
        route_ids_BL: jax.Array | None = None,
        boundaries_BL: jax.Array | None = None,
        key: jax.Array | None = None,
        numbers: Numbers | None = None,
    ) -> tuple[jax.Array, list[Boundaries]]:
        """Logits for the byte after each position, and the boundaries of each stage.

        Logits at t depend only on the bytes of the same document at positions <= t, and on the
        inputs below at positions <= t.

        input_ids_BL: int32 byte values. segment_ids_BL: equal neighbours are one document,
        isolated from others; 0 is padding; default: one document per row. rows_sharing_slots:
        number of rows whose chunks share a row of slots in all inner stages (static; divides B). A
        row with many boundaries uses slots that other rows do not need; inner stages return one
        record for the rows that share. capacities: slots of such a row for each stage that chunks
        (static); None for a stage, or for all: enough for every position to be a boundary, so
        nothing is clipped.

        route_ids_BL: int32 in [0, routes), required if a stage has several routes; a chunk has the
        route of the position on which the main network runs for it. boundaries_BL: bool, required
        by predictor "external" in stage 0. key: PRNG key for the noise of relaxed predictors; None,
        as in evaluation: no noise. numbers: traced numbers of the parts; None: those of the
        configuration.

        Raises ValueError if an input that the configuration needs is missing.
        """
        if segment_ids_BL is None:
            segment_ids_BL = jnp.ones_like(input_ids_BL)
        if capacities is None:
            capacities = (None,) * self.config.num_chunked
        segment_ids_BL = number_runs(segment_ids_BL)
        context = self.context(input_ids_BL, segment_ids_BL, route_ids_BL, boundaries_BL)
        with jax.named_scope("embeddings"):
            embedding_key = self._embedding_key(key)
            x_BLD = self.embeddings(input_ids_BL, context, key=embedding_key)
        with jax.named_scope("stage0"):
            x_BLD, boundaries = self.backbone(
                x_BLD, context, capacities,
                rows_sharing_slots=rows_sharing_slots, key=key, numbers=numbers,
            )  # fmt: skip
        with jax.named_scope("lm_head"):
            return self.logits(x_BLD, context, key=embedding_key), boundaries

    def context(
        self,
        input_ids: jax.Array,
        segment_ids: jax.Array,
        route_ids: jax.Array | None,
        external_boundary: jax.Array | None,
    ) -> Context:
        """Context of the states; arrays (B, L), or (B,) for one position of a stream.

        Route ids are clipped to their range, and dropped if the model has one route.
        """
        routes, chunkings = self.config.num_routes, [s.chunking for s in self.config.stages[:-1]]
        if routes == 1:
            route_ids = None
        elif route_ids is None:
            raise ValueError(f"the model has {routes} routes: give route_ids_BL")
        else:
            route_ids = jnp.clip(route_ids, 0, routes - 1)
        if not (chunkings and chunkings[0].needs_bytes):
            return Context(segment_ids, route_ids_BL=route_ids)
        if chunkings[0].predictor.name == "external" and external_boundary is None:
            raise ValueError("predictor='external' is told its boundaries: give boundaries_BL")
        return Context(
            segment_ids, route_ids_BL=route_ids, bytes_BL=input_ids,
            external_boundary_BL=external_boundary,
        )  # fmt: skip

    def _embedding_key(self, key: jax.Array | None) -> jax.Array | None:
        """Key of the embedding's random numbers; stages fold their index into `key`."""
        return None if key is None else jax.random.fold_in(key, self.config.num_chunked)

    def logits(
        self, x_BLD: jax.Array, context: Context | None = None, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Logits for the next byte, float32 (B, L, V), from the output of the backbone.

        context, key: those that the embedding was called with, for a head that is tied to it.
        """
        if self.lm_head is None:
            return self.embeddings.attend(x_BLD, context, key=key).astype(jnp.float32)
        return self.lm_head(x_BLD).astype(jnp.float32)


def number_runs(segment_ids_BL: jax.Array) -> jax.Array:
    """Give every run of equal ids its own number; 0 remains padding.

    Layers compare ids, so in a row 1 1 2 2 1 the last run would otherwise see the first.
    """
    run_BL = jnp.cumsum(segment_starts(segment_ids_BL), axis=1, dtype=jnp.int32)
    return jnp.where(segment_ids_BL == 0, 0, run_BL)


def split(model: HNetLM) -> tuple[nnx.GraphDef, dict]:
    """(structure, parameters as nested dicts of arrays); the inverse is `nnx.merge`.

    Code that uses the result is pure functions of pytrees under `jax.jit`.
    """
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)


def abstract(config: HNetConfig) -> tuple[nnx.GraphDef, dict]:
    """`split` of a model whose parameters are shapes: needs no memory for any model size."""
    graph, shapes = _abstract(config)
    return graph, jax.tree.map(lambda leaf: leaf, shapes)  # dicts that a caller may change


@functools.lru_cache(maxsize=256)
def _abstract(config: HNetConfig) -> tuple[nnx.GraphDef, dict]:
    graph, state = nnx.split(nnx.eval_shape(lambda: HNetLM(config, rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def init_params(config: HNetConfig, key: jax.Array) -> dict:
    """Initial parameters; use jit with out_shardings to create them sharded."""
    return split(HNetLM(config, rngs=nnx.Rngs(key)))[1]
