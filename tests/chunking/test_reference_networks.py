"""Whole networks against other codes: logits, loss and the gradients of all parameters.

Everything but the blocks inside stacks is ours: embeddings, predictors, pools, main networks,
dechunks, heads. Blocks of LLaMA are our layers T (BLT, AU-Net); `tests.reference_blocks` says what
is put around them: BLT's n-grams, patches and cross-attention cross documents and only its
self-attention does not, its cross-attention adds queries twice, and only the last stack has a norm
at its end. Gradients are by the reference's parameters, from which ours are made.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet.chunking.config import ChunkingConfig
from hnet.chunking.dechunks import cross_attention as dechunks
from hnet.chunking.dechunks import prefix as prefix_dechunk
from hnet.chunking.dechunks.indexed import Indexed
from hnet.chunking.pools import cross_attention as pools
from hnet.chunking.pools import prefix as prefix_pool
from hnet.chunking.pools.concat import Concat
from hnet.chunking.pools.latents import Latents
from hnet.chunking.pools.linear import Linear
from hnet.chunking.predictors.words import Words
from hnet.config import AttentionConfig, CrossAttentionConfig, HNetConfig, StageConfig
from hnet.model import HNetLM
from hnet.nn.embeddings.bytes import Bytes
from hnet.nn.embeddings.hash_ngrams import OFFSET, HashNgrams
from hnet.nn.layers import segment_positions
from tests.golden_data import compare_gradients, load, part, relative_error
from tests.networks import quick_jit
from tests.reference_blocks import (
    AfterFirst,
    Apart,
    Doubled,
    Same,
    Written,
    crossed,
    gpt,
    layer_norm,
    layers_of,
    llama,
    megabyte,
    parameter_of,
    placed,
    post_norm,
    spacebyte,
    with_biases,
)

VALUE = 2e-5


class Case(NamedTuple):
    model: HNetLM
    params: Callable[[dict], dict]
    """values in our tree, by path, from the reference's parameters"""
    targets_BL: np.ndarray
    options: dict
    """inputs of the network besides the bytes"""
    stored: Callable[[jax.Array], jax.Array]
    """logits that are stored, of those of all positions (B, L, V)"""
    counted_L: np.ndarray | None = None
    """positions whose cross-entropy counts, bool; None: all"""


def documents(ids_BL: np.ndarray, end: int) -> np.ndarray:
    """Number of each position's document; `end` is the last byte of one."""
    before_BL = np.pad(ids_BL[:, :-1] == end, ((0, 0), (1, 0)))
    return 1 + np.cumsum(before_BL, axis=1, dtype=np.int32)


# --- BLT ----------------------------------------------------------------------------------------


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


# --- AU-Net -------------------------------------------------------------------------------------


def au_net(found: dict) -> Case:
    """Bytes, words and pairs of words: the boundaries of both stages follow from the bytes."""
    make = lambda predictor: ChunkingConfig(
        5.0, predictor, "end", "first", "linear", "indexed", "add", losses=()
    )
    rotated = {"attention": AttentionConfig(rotary_base=5e5)}
    stages = (
        StageConfig(("T1", "T1"), 16, 48, 2, 8, 7, make(Words.Config((1, 2))), **rotated),
        StageConfig(("T1", "T1"), 24, 64, 3, 8, chunking=make("levels"), **rotated),
        StageConfig(("T1",), 32, 88, 2, 16, **rotated),
    )
    model = HNetLM(HNetConfig(stages, vocab_size=258), rngs=nnx.Rngs(0))
    outer, inner = model.backbone, model.backbone.main_network
    outer.encoder.rmsnorm = inner.encoder.rmsnorm = inner.decoder.rmsnorm = Same()
    inner.main_network.main_network.rmsnorm = Same()

    def params(w):
        found = {
            "embeddings/embedding": w["tok_embeddings.weight"],
            "backbone/decoder/rmsnorm/scale": w["vocab_norm.weight"],
            "lm_head/kernel": w["vocab.weight"].T,
            "backbone/main_network/main_network/main_network/layers/0": llama(
                w, "trunk.layers", 1, width=16
            ),
        }
        for stage, at in enumerate(("backbone/", "backbone/main_network/")):
            for stack in ("encoder", "decoder"):
                found[f"{at}{stack}/layers/0"] = llama(w, f"{stack}s.{stage}.layers", 1)
            get = lambda name, stage=stage: w[f"transitions.{stage}.{name}.weight"]
            found[f"{at}chunk_layer/norm/scale"] = get("down_norm")
            found[f"{at}chunk_layer/proj/kernel"] = get("trans_down").T
            found[f"{at}dechunk_layer"] = {
                "norm": {"scale": get("up_norm")}, "proj": {"kernel": get("trans_up").T},
                "maps": get("indexed_linear").swapaxes(1, 2),
            }  # fmt: skip
        return found

    options = {"capacities": (40, 26)}
    return Case(model, params, found["in/targets_BL"], options, lambda logits: logits[:, ::4])


# --- Learn Your Tokens --------------------------------------------------------------------------


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


# --- FIT ----------------------------------------------------------------------------------------


class InGroups(Bytes):
    """Learned positions in groups of 6 bytes; the head adds a bias."""

    def __call__(self, ids_BL, context, *, key=None):
        index_L = jnp.arange(ids_BL.shape[1], dtype=jnp.int32) % 6
        return self.rows(ids_BL) + self.positions[...][index_L][None]

    def attend(self, x_BLD, context=None, *, key=None):
        return super().attend(x_BLD) + self.head_bias[...][None, None]


def fit(found: dict, weights: dict) -> Case:
    """3 passes over bytes and 2 over 3 latents for each group of 6 bytes.

    There the first group has no latents to read but zeros, and the last group's are not read.
    """
    chunking = ChunkingConfig(
        6.0, "fixed", pool=Latents.Config(3, 2, 4), residual="add", losses=(), max_chunk_len=6,
        dechunk=dechunks.CrossAttention.Config(3, False, 20),
        encoder_scope="chunk", decoder_scope="chunk",
    )  # fmt: skip
    stages = (
        StageConfig(
            ("T1", "x1T1"), 16, 1, 2, 0, chunking=chunking, passes=2,
            cross_attention=CrossAttentionConfig(memory_width=20),
        ),
        StageConfig(("T1",), 60, 1, 2, 0, vectors=3),
    )  # fmt: skip
    model = HNetLM(HNetConfig(stages, tie_embeddings=True), rngs=nnx.Rngs(0))
    outer, inner = model.backbone, model.backbone.main_network
    passes, pool = outer.decoder, outer.chunk_layer
    for stack in (outer.encoder, *passes.decoders):
        with_biases(stack, 32)
    for stack in (inner, passes.main_networks):
        with_biases(stack, 40)
    for reader in (pool, passes.readers):
        with_biases(reader)
    mains = inner.main_network, passes.main_networks[0]
    for stack in (outer.encoder, passes.decoders[0], *mains):
        stack.rmsnorm = Same()
    inner.main_network, passes.main_networks[0] = map(AfterFirst, mains)
    model.embeddings.__class__ = InGroups
    model.embeddings.positions = parameter_of(jnp.zeros((6, 16)))
    model.embeddings.head_bias = parameter_of(jnp.zeros(256))

    def params(w):
        def norm(at):
            return {"scale": w[f"{at}.gamma"], "bias": w[f"{at}.beta"]}

        def projection(at, *names):
            get = lambda name, kind: w[f"{at}.{name}.{kind}"]
            flat = lambda a: a.reshape(len(a), -1)
            kernels = [flat(get(name, "kernel")) for name in names]
            biases = [get(name, "bias").ravel() for name in names]
            return {"kernel": jnp.concatenate(kernels, 1), "bias": jnp.concatenate(biases)}

        def out(at):
            kernel = w[f"{at}.attention_output.kernel"]
            bias = w[f"{at}.attention_output.bias"]
            return {"kernel": kernel.reshape(-1, kernel.shape[-1]), "bias": bias}

        def layers(at):
            mha, ffn = (f"{at}.transformer_decoder_layer.{n}" for n in ("self_mha", "mlp.ffn"))
            return jax.tree.map(lambda a: a[None], {
                "norm1": norm(f"{mha}.ln"), "norm2": norm(f"{ffn}.ln"),
                "mixer": {
                    "Wqkv": projection(mha, "query", "key", "value"), "out_proj": out(mha),
                },
                "mlp": {f"fc{i}": projection(ffn, f"dense{i}") for i in (1, 2)},
            })  # fmt: skip

        def cross(name):
            at = f"{name}.cross_mha"
            own = {"Wq": projection(at, "query"), "Wkv": projection(at, "key", "value")}
            return norm(f"{at}.ln"), norm(f"{at}.enc_ln"), own | {"out_proj": out(at)}

        def reader(name):
            query_norm, own_norm, rest = cross(name)
            return rest | {"query_norm": query_norm, "norm": own_norm}

        def reading(name):
            first, memory_norm, rest = cross(name)
            block = {"norm1": first, "mixer": rest | {"memory_norm": memory_norm}}
            return jax.tree.map(lambda a: a[None], block)

        more = 256 - 40  # bytes that are no tokens there
        latents_XE = w["latent_pos_emb.kernel.vis_pos_embedding"]
        pooled = {
            "reader": reader("l2x_cross_attn"),
            "latents": jnp.pad(latents_XE[:9], ((3, 0), (0, 0))).ravel(),
        }
        table_VD = jnp.pad(w["token_embedding"], ((0, more), (0, 0)))
        bias_V = jnp.pad(w["outp_bias"], (0, more), constant_values=-1e9)
        found = {
            "embeddings": {
                "embedding": table_VD, "head_bias": bias_V,
                "positions": w["x_pos_emb.kernel.vis_pos_embedding"],
            },
            "backbone/chunk_layer": pooled,
            "backbone/encoder/layers/0": layers("x_network"),
            "backbone/main_network/main_network/stack/layers/0": layers("l_network"),
            "backbone/decoder/readers/0": reader("l2x_cross_attn_1"),
            "backbone/decoder/main_networks/0/stack/layers/0": layers("l_network_1"),
            "backbone/decoder/decoders/1/rmsnorm": norm("x_output_ln"),
        }  # fmt: skip
        for i, more in enumerate(("", "_1")):
            at = f"backbone/decoder/decoders/{i}/layers/"
            found[f"{at}0"] = reading(f"x2l_cross_attn{more}")
            found[f"{at}1"] = layers(f"x_network_{i + 1}")
        return found

    ids_BL = found["in/tokens_BL"] = found["in/ids_BL"]
    return Case(
        model, params, np.roll(ids_BL, -1, axis=1), {"capacities": (4,)},
        lambda logits: logits[..., :40], np.arange(24) < 23,
    )  # fmt: skip


# --- SpaceByte ----------------------------------------------------------------------------------


def space_byte(found: dict, weights: dict) -> Case:
    """Its boundaries are given, as its BOS is one inside a document. Its wider states have zeros in
    front, ours learned numbers at the end; only local blocks have a window (8 keys on a CPU)."""
    (_, D), (M, E) = (weights[f"{at}_position_encoding"].shape for at in ("local", "global"))
    names = ("initial_blocks", "global_blocks", "final_blocks", "local_position", "global_position")
    of = {name: {n: a for n, a in weights.items() if n.startswith(name)} for name in names}
    of_head = {n: a for n, a in weights.items() if n.startswith("logits.layer_norm")}

    def local(w, name, x):
        for layer in layers_of(w, name):
            x = spacebyte(w, layer, x, jnp.ones(x.shape[:2], jnp.int32), 7)
        return x

    def encoder(w, x, context):
        return local(w, "initial_blocks", x + w["local_position_encoding"][None, : x.shape[1]])

    def main(w, x, context):
        x = jnp.pad(x[..., :D], ((0, 0), (0, 0), (E - D, 0)))
        x = x + w["global_position_encoding"][None, : x.shape[1]]
        for layer in layers_of(w, "global_blocks"):
            x = spacebyte(w, layer, x, context.segment_ids_BL, -1)
        return jnp.roll(x, D - E, axis=-1)

    def decoder(w, x, context):
        norm = {"n.weight": w["logits.layer_norm.scale"], "n.bias": jnp.zeros(D)}
        return layer_norm(norm, "n", local(w, "final_blocks", x))

    chunking = ChunkingConfig(6.0, "external", dechunk="at_boundaries", residual="add", losses=())
    shape = {"num_heads": 2, "rotary_emb_dim": 2}
    stages = (StageConfig(("t1", "t1"), D, chunking=chunking, **shape),
              StageConfig(("t1",), E, **shape))  # fmt: skip
    model = HNetLM(HNetConfig(stages), rngs=nnx.Rngs(0))
    outer, inner = model.backbone, model.backbone.main_network
    outer.encoder = Written(encoder, of["initial_blocks"] | of["local_position"])
    inner.main_network = Written(main, of["global_blocks"] | of["global_position"])
    outer.decoder = Written(decoder, of["final_blocks"] | of_head)

    def params(w):
        written = lambda at, *own: {f"{at}/w/{n}": w[n] for name in own for n in name}
        return {
            "embeddings/embedding": w["token_embedding.weight"],
            "lm_head/kernel": w["logits.logits_linear.weight"].T,
            **written("backbone/encoder", of["initial_blocks"], of["local_position"]),
            **written(
                "backbone/main_network/main_network", of["global_blocks"], of["global_position"]
            ),
            **written("backbone/decoder", of["final_blocks"], of_head),
        }

    options = {"boundaries_BL": found["out/global_position_BL"], "capacities": (M,)}
    every, targets_BL = 256 // found["out/logits_BLV"].shape[-1], found["in/targets_after_BL"]
    return Case(model, params, targets_BL, options, lambda logits: logits[:, ::3, ::every])


# --- MEGABYTE -----------------------------------------------------------------------------------


def two_stages_of_megabyte(found: dict, weights: dict) -> Case:
    """Patches of 4 bytes after a position that is a chunk of its own: its logits are those of the
    start vectors. The local model has a table of its own and a start vector before each patch."""
    ids_BL = found["ids_BL"]
    (B, L), P, D, heads = ids_BL.shape, 4, 16, 2
    chunking = ChunkingConfig(
        float(P), "external", pool=Concat.Config(P), residual="none", losses=(),
        dechunk=Indexed.Config(P, shared=False, bias=True), decoder_scope="chunk",
    )  # fmt: skip
    narrow = {"num_heads": 2, "rotary_emb_dim": 2}
    stages = (StageConfig(("", "t1"), D, chunking=chunking, **narrow),
              StageConfig(("t1",), 24, **narrow))  # fmt: skip
    model = HNetLM(HNetConfig(stages, vocab_size=259), rngs=nnx.Rngs(0))
    stack_of = lambda *names: {k: a for k, a in weights.items() if k.startswith(names)}

    def global_model(w, x, context):
        """Slots are of the first position, of the start vector, and of the patches but the last."""
        start_B1E = jnp.broadcast_to(w["start_tokens.0"][None, None], (B, 1, 24))
        y = megabyte(w, "transformers.0", jnp.concatenate([start_B1E, x[:, 2:]], 1), heads)
        return jnp.pad(y, ((0, 0), (1, 0), (0, 0)))

    def local_model(w, x, context):
        x = x[:, 1:] + w["token_embs.0.weight"][context.bytes_BL[:, 1:]]
        start_X1D = jnp.broadcast_to(w["start_tokens.1"][None, None], (B * L // P, 1, D))
        x = jnp.concatenate([start_X1D, x.reshape(-1, P, D)], axis=1)
        y = megabyte(w, "transformers.1", x, heads).reshape(B, -1, P + 1, D)
        return jnp.concatenate([y[:, 0, :1], y[:, :, 1:].reshape(B, L, D)], axis=1)

    outer = model.backbone
    parts_of = {
        "backbone/main_network/main_network": ("transformers.0", "start_tokens.0"),
        "backbone/decoder": ("transformers.1", "start_tokens.1", "token_embs.0"),
    }
    own, inner = (stack_of(*names) for names in parts_of.values())
    outer.main_network.main_network = Written(global_model, own)
    outer.decoder, outer.encoder = Written(local_model, inner), Written(lambda w, x, _: x, {})
    outer.dechunk_layer.norm = Same()
    model.lm_head = nnx.Linear(D, 259, rngs=nnx.Rngs(0))

    def params(w):
        at, to_next = "token_embs.1", "to_next_transformer_projections.0.1"
        norm = lambda name: {"rms": {"scale": w[f"{name}.weight"]}, "bias": w[f"{name}.bias"]}
        written = {
            f"{place}/w/{k}": a
            for place, names in parts_of.items() for k, a in w.items() if k.startswith(names)
        }  # fmt: skip
        return written | {
            "embeddings/embedding": w[f"{at}.0.weight"],
            "lm_head": {"kernel": w["to_logits.weight"].T, "bias": w["to_logits.bias"]},
            "backbone/chunk_layer": {
                "norm": norm(f"{at}.2"), "out_norm": norm(f"{at}.4"),
                "proj": {"kernel": w[f"{at}.3.weight"].T}, "bias": w[f"{at}.3.bias"],
            },
            "backbone/dechunk_layer/maps":
                w[f"{to_next}.weight"].reshape(P, D, 24).transpose(0, 2, 1),
            "backbone/dechunk_layer/bias": w[f"{to_next}.bias"].reshape(P, D),
        }  # fmt: skip

    found["in/tokens_BL"] = np.pad(ids_BL, ((0, 0), (1, 0)))
    begins_L = np.arange(L + 1) % P == 1
    options = {"boundaries_BL": np.tile(begins_L, (B, 1)), "capacities": (1 + L // P,)}
    return Case(
        model, params, np.pad(ids_BL, ((0, 0), (0, 1))), options,
        lambda logits: logits[:, 1::8], np.arange(L + 1) < L,
    )  # fmt: skip


# --- all ----------------------------------------------------------------------------------------

NETWORKS = {
    "blt_network_cross": lambda found, weights: blt(found, 1),
    "blt_network_windowed": lambda found, weights: blt(found, 3),
    "blt_network_mean": lambda found, weights: blt(found, None),
    "aunet_network": lambda found, weights: au_net(found),
    "etok_net": etok,
    "fit_network": fit,
    "megabyte_network": two_stages_of_megabyte,
    "spacebyte_net": space_byte,
}
PARAMETERS = {"blt_network_windowed": "blt_network_cross"}  # files that have those of others


@pytest.mark.few(
    "name", ["blt_network_cross", "aunet_network", "etok_net", "fit_network"], [*NETWORKS]
)
def test_a_network_is_that_of_its_own_code(name):
    found = load(f"family/{name}")
    if name == "spacebyte_net":  # the parameters of its other cases are not stored
        found |= part(found, "fits")
    weights = part(load(f"family/{PARAMETERS.get(name, name)}"), "param")
    if name == "megabyte_network":  # the rest of its parameters is stored with its pieces
        found |= part(words := load("family/words"), "megabyte/in")
        weights |= part(words, "megabyte/param")
    case = NETWORKS[name](found, weights)
    ids_BL = found["in/tokens_BL"]
    graph, state = nnx.split(case.model)
    tree = nnx.to_pure_dict(state)

    @quick_jit
    def run(weights, ids_BL):
        def scalar(weights):
            model = nnx.merge(graph, placed(tree, case.params(weights)))
            logits_BLV, records = model(ids_BL, **case.options)
            nll_BLV = -jax.nn.log_softmax(logits_BLV)
            picked_BL = jnp.take_along_axis(nll_BLV, case.targets_BL[..., None], -1)[..., 0]
            counted_L = slice(None) if case.counted_L is None else case.counted_L
            return jnp.mean(picked_BL[:, counted_L]), (case.stored(logits_BLV), records)

        return jax.value_and_grad(scalar, has_aux=True)(weights)

    (loss, (logits, records)), grads = jax.device_get(run(weights, ids_BL))
    (at,) = (key for key in found if key.startswith("out/logits_B"))
    assert relative_error(logits, found[at]) < VALUE
    assert relative_error(loss, found["out/loss"]) < VALUE
    if "out/pool_mask0_BL" in found:  # of the other stage they are by bytes there
        inner_BL = found["out/pool_mask1_BL"]
        assert np.array_equal(records[0].boundary_mask_BL, found["out/pool_mask0_BL"])
        assert np.array_equal(records[1].boundary_mask_BL.sum(1), inner_BL.sum(1))
    if "out/changed_L" in found:  # logits that move when one byte is changed
        changed_BL = ids_BL.copy()
        changed_BL[:, found["in/perturbed_position"]] ^= 1
        moved_BLV = run(weights, changed_BL)[0][1][0] != logits
        assert np.array_equal(np.any(moved_BLV, axis=(0, 2)), found["out/changed_L"])
    compared = compare_gradients(grads, found, part(found, "signs"))
    assert compared == set(weights) or name in PARAMETERS and len(compared) > 15
