"""MEGABYTE of 2 stages, with its layers."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet.chunking.config import ChunkingConfig
from hnet.chunking.dechunks.indexed import Indexed
from hnet.chunking.pools.concat import Concat
from hnet.config import HNetConfig, StageConfig
from hnet.model import HNetLM
from tests.chunking.systems.whole_network import Case, agrees
from tests.golden_data import load, part
from tests.reference_blocks import Same, Written, megabyte


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


@pytest.mark.every
def test_it_is_that_of_its_own_code():
    words = load("family/words")  # some of its parameters are stored with its pieces
    found = load("family/megabyte_network") | part(words, "megabyte/in")
    weights = part(found, "param") | part(words, "megabyte/param")
    assert agrees(two_stages_of_megabyte(found, weights), found, weights) == set(weights)
