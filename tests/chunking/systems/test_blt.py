"""BLT: n-grams, patches and cross-attention cross documents, only its self-attention does not.

Cross-attention adds queries twice, and only the last stack has a norm at its end.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet.chunking.config import ChunkingConfig
from hnet.chunking.dechunks import cross_attention as dechunks
from hnet.chunking.dechunks.indexed import Indexed
from hnet.chunking.pools import cross_attention as pools
from hnet.chunking.pools.linear import Linear
from hnet.config import CrossAttentionConfig, HNetConfig, StageConfig
from hnet.model import HNetLM
from hnet.nn.embeddings.hash_ngrams import OFFSET, HashNgrams
from tests.chunking.systems.whole_network import Case, agrees
from tests.golden_data import load, part
from tests.reference_blocks import Apart, Doubled, Same, crossed, llama


def documents(ids_BL: np.ndarray, end: int) -> np.ndarray:
    """Number of each position's document; `end` is the last byte of one."""
    before_BL = np.pad(ids_BL[:, :-1] == end, ((0, 0), (1, 0)))
    return 1 + np.cumsum(before_BL, axis=1, dtype=np.int32)


class Tokens(HashNgrams):
    """Byte b is token b + 4 in BLT, where 1 and 2 begin and end a document."""

    def __call__(self, ids_BL, context, *, key=None):
        return self.rows(ids_BL) + self._ngrams(self._windows(ids_BL - OFFSET, context))


def blt(found: dict, window: int | None) -> Case:
    """window: number of patches that queries read; None: means of patches, no cross-attention."""
    ids_BL, lengths_BM = found["in/tokens_BL"], found["in/patch_lengths_BM"]
    ends_BL = np.zeros(ids_BL.shape, bool)
    for ends_L, lengths_M in zip(ends_BL, lengths_BM):
        last_M = np.cumsum(lengths_M[lengths_M > 0]) - 1
        ends_L[last_M[last_M < len(ends_L)]] = True
    is_crossed = window is not None
    if is_crossed:
        pool = pools.CrossAttention.Config(2, 2, window=window, reference_doubled_residual=True)
        dechunk = dechunks.CrossAttention.Config(2)
    else:
        pool = Linear.Config("chunk", norm=False)
        dechunk = Indexed.Config(1, shared=False)
    chunking = ChunkingConfig(
        6.0, "external", "end", "first", pool, dechunk, "add", max_chunk_len=9, losses=()
    )
    layouts = "T2", "x1T1x1T1" if is_crossed else "T2"
    stages = (
        StageConfig(
            layouts, 16, 48, num_heads=2, rotary_emb_dim=8, window_size=7, chunking=chunking,
            cross_attention=CrossAttentionConfig(window=window or 1),
        ),
        StageConfig(("T2",), 32, 88, num_heads=2, rotary_emb_dim=16),
    )  # fmt: skip
    embedding = HashNgrams.Config((3, 4), rows=61)
    model = HNetLM(HNetConfig(stages, vocab_size=260, embedding=embedding), rngs=nnx.Rngs(0))
    model.embeddings.__class__ = Tokens
    outer, main = model.backbone, model.backbone.main_network
    outer.encoder.rmsnorm, main.main_network.rmsnorm = Same(), Same()
    if is_crossed:
        for run in (0, 2):
            outer.decoder.layers[run] = Doubled(outer.decoder.layers[run])
    else:
        outer.dechunk_layer.norm = Same()
    apart_BL = jnp.asarray(documents(ids_BL, 2))
    outer.encoder, outer.decoder = Apart(outer.encoder, apart_BL), Apart(outer.decoder, apart_BL)
    patch_BL = np.cumsum(ends_BL, axis=1) - ends_BL
    has_end_BM = np.zeros(lengths_BM.shape, np.int32)
    for row, t in np.argwhere(ids_BL == 2):
        has_end_BM[row, patch_BL[row, t]] = 2
    main.main_network = Apart(main.main_network, jnp.asarray(documents(has_end_BM, 2)))

    def params(w):
        found = {
            "embeddings/embedding": w["local_encoder.tok_embeddings.weight"],
            "embeddings/hash_embeddings": jnp.stack(
                [w[f"encoder_hash_tok_embedding.{i}.weight"] for i in range(2)]
            ),
            "backbone/encoder/stack/layers/0": llama(w, "local_encoder.layers", 2),
            "backbone/main_network/main_network/stack/layers/0": llama(
                w, "global_transformer.layers", 2, width=16
            ),
            "backbone/decoder/stack/rmsnorm/scale": w["local_decoder.norm.weight"],
            "lm_head/kernel": w["local_decoder.output.weight"].T,
        }
        vectors = w["local_decoder.patch_embedding_projection.weight"].T
        if not is_crossed:
            projection = w["global_transformer.token_embedding_projection.weight"].T
            return found | {
                "backbone/chunk_layer/proj/kernel": projection,
                "backbone/dechunk_layer/maps": vectors[None],
                "backbone/decoder/stack/layers/0": llama(w, "local_decoder.layers", 2),
            }
        for i in range(2):
            at, layer = "backbone/decoder/stack/layers/", f"local_decoder.cross_attn_layers.{i}"
            found[f"{at}{2 * i}/layer"] = crossed(w, layer)
            found[f"{at}{2 * i + 1}"] = llama(w, "local_decoder.layers", 1, first=i)
        layer = jax.tree.map(lambda a: a[0], crossed(w, "local_encoder.cross_attn_layers.0"))
        norm = layer["mixer"].pop("memory_norm")
        queries = w["local_encoder.patch_embedding_projection.weight"].T
        return found | {
            "backbone/chunk_layer": layer["mixer"] | {
                "query_norm": layer["norm1"], "norm": norm, "queries": {"kernel": queries},
            },
            "backbone/dechunk_layer/projection/kernel": vectors,
        }  # fmt: skip

    targets_BL = np.pad(ids_BL[:, 1:], ((0, 0), (0, 1)), constant_values=2)
    options = {"boundaries_BL": ends_BL, "capacities": (lengths_BM.shape[1],)}
    return Case(model, params, targets_BL, options, lambda logits: logits[:, ::2])


@pytest.mark.few("name", ["cross"], ["cross", "windowed", "mean"])
def test_it_is_that_of_its_own_code(name):
    window = {"cross": 1, "windowed": 3, "mean": None}[name]
    found = load(f"family/blt_network_{name}")
    stored = load("family/blt_network_cross") if name == "windowed" else found
    weights = part(stored, "param")
    compared = agrees(blt(found, window), found, weights)
    assert compared == set(weights) or name == "windowed" and len(compared) > 15
