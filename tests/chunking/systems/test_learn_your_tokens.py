"""Learn Your Tokens (eTok), with its blocks."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.chunking.config import ChunkingConfig
from hnet.chunking.dechunks import prefix as prefix_dechunk
from hnet.chunking.pools import prefix as prefix_pool
from hnet.config import HNetConfig, StageConfig
from hnet.model import HNetLM
from hnet.nn.layers import segment_positions
from tests.chunking.systems.whole_network import Case, agrees
from tests.golden_data import load, part
from tests.reference_blocks import Written, gpt, layer_norm, layers_of, post_norm


def etok(found: dict, weights: dict) -> Case:
    """Words are C bytes with padding, after a byte that is a chunk of its own in ours, and that its
    backbone does not see. Padding counts; queries of padding see it, but are not read."""
    words_BTC, heads = found["in/words_BTC"], 2
    B, T, C = words_BTC.shape
    D, k = weights["in_emb.weight"].shape[1], weights["in_pe"].shape[1] - C
    names = ("wordenc", "blocks", "ln_f", "decoder_blocks", "word_pe", "in_pe")
    stack_of = {name: {n: a for n, a in weights.items() if n.startswith(name)} for name in names}

    def encoder(w, x, context):
        ids = context.segment_ids_BL
        x = x + w["in_pe"][0][segment_positions(ids)]
        for name in layers_of(w, "wordenc.layers"):
            x = post_norm(w, name, x, ids, heads)
        return x

    def backbone(w, x, context):
        after_first_1L = (jnp.arange(x.shape[1], dtype=jnp.int32) >= k)[None]
        ids = context.segment_ids_BL + after_first_1L.astype(jnp.int32)
        x = x + w["word_pe"][0][segment_positions(ids)]
        for name in layers_of(w, "blocks"):
            x = gpt(w, name, x, ids, heads)
        return layer_norm(w, "ln_f", x)

    def decoder(w, x, context):
        index = segment_positions(context.segment_ids_BL)  # bytes get their positions twice
        x = x + w["in_pe"][0][index] * jnp.where(index < k, 1.0, 2.0)[..., None]
        for name in layers_of(w, "decoder_blocks"):
            x = gpt(w, name, x, context.segment_ids_BL, heads)
        return x

    pool = prefix_pool.Prefix.Config(k, C, 1, heads)
    dechunk = prefix_dechunk.Prefix.Config(k, projection=False)
    chunking = ChunkingConfig(
        float(C), "external", "end", "first", pool, dechunk, "add", decoder_scope="chunk",
        max_chunk_len=C, losses=(),
    )  # fmt: skip
    stages = (StageConfig(("", "t1"), D, chunking=chunking, num_heads=heads, rotary_emb_dim=2),
              StageConfig(("t1",), D, num_heads=heads, rotary_emb_dim=2))  # fmt: skip
    model = HNetLM(HNetConfig(stages), rngs=nnx.Rngs(0))
    outer = model.backbone
    outer.encoder = Written(lambda w, x, context: x, {})
    outer.chunk_layer.encoder = Written(encoder, stack_of["wordenc"] | stack_of["in_pe"])
    outer.main_network.main_network = Written(
        backbone, stack_of["blocks"] | stack_of["ln_f"] | stack_of["word_pe"]
    )
    outer.decoder = Written(decoder, stack_of["decoder_blocks"] | stack_of["in_pe"])
    model.lm_head = nnx.Linear(D, len(weights["head.weight"]), use_bias=False, rngs=nnx.Rngs(0))

    def params(w):
        written = lambda at, *names: {
            f"{at}/w/{n}": a for n, a in w.items() if any(n.startswith(name) for name in names)
        }
        return {
            "embeddings/embedding": jnp.pad(
                w["in_emb.weight"], ((0, 256 - len(w["in_emb.weight"])), (0, 0))
            ),
            "lm_head/kernel": w["head.weight"].T,
            "backbone/chunk_layer/tokens": w["in_emb.weight"][C : C + k],  # those of two symbols
            "backbone/chunk_layer/proj/kernel": jnp.eye(D),
            **written("backbone/chunk_layer/encoder", "wordenc", "in_pe"),
            **written("backbone/main_network/main_network", "blocks", "ln_f", "word_pe"),
            **written("backbone/decoder", "decoder_blocks", "in_pe"),
        }

    ids_BL = np.pad(words_BTC.reshape(B, -1), ((0, 0), (1, 0)))
    found["in/tokens_BL"] = ids_BL
    index_L = np.arange(1 + T * C)
    options = {
        "boundaries_BL": np.broadcast_to(index_L % C == 0, ids_BL.shape), "capacities": (T + 1,),
    }  # fmt: skip
    return Case(
        model, params, np.pad(ids_BL[:, 1:], ((0, 0), (0, 1))), options,
        lambda logits: logits[:, C : T * C].reshape(B, T - 1, C, -1),
        (index_L >= C) & (index_L < T * C),
    )  # fmt: skip


def test_it_is_that_of_its_own_code():
    found = load("family/etok_net")
    weights = part(found, "param")
    assert agrees(etok(found, weights), found, weights) == set(weights)
