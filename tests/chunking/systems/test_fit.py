"""FIT, autoregressive (FITAR)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.chunking.config import ChunkingConfig
from hnet.chunking.dechunks import cross_attention as dechunks
from hnet.chunking.pools.latents import Latents
from hnet.config import CrossAttentionConfig, HNetConfig, StageConfig
from hnet.model import HNetLM
from hnet.nn.embeddings.bytes import Bytes
from tests.chunking.systems.whole_network import Case, agrees
from tests.golden_data import load, part
from tests.reference_blocks import AfterFirst, Same, parameter_of, with_biases


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


def test_it_is_that_of_its_own_code():
    found = load("family/fit_network")
    weights = part(found, "param")
    assert agrees(fit(found, weights), found, weights) == set(weights)
