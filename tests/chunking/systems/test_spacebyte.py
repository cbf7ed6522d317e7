"""SpaceByte: the stage that chunks, and its whole network with its blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet.chunking.config import ChunkingConfig
from hnet.config import HNetConfig, StageConfig
from hnet.loss import targets_kept
from hnet.model import HNetLM
from hnet.nn.context import Context
from tests.chunking.systems.pieces import (
    agree,
    chunking_of,
    chunking_stage,
    config_of,
    gradients_agree,
)
from tests.chunking.systems.whole_network import Case, agrees
from tests.golden_data import load, part
from tests.networks import quick_jit
from tests.reference_blocks import Written, layer_norm, layers_of, spacebyte

SPACEBYTE = load("family/spacebyte_net")


@pytest.mark.parametrize("kind", ["overflows", "periodic"])
def test_spacebyte_network(kind):
    """Boundaries, states of the global blocks, insertion, their gradients, and what is trained
    after an overflow. Its BOS (255) begins a document in ours, so it is a boundary in both."""
    found = part(SPACEBYTE, kind)
    name = "hnet_pool" if kind == "periodic" else "spacebyte"
    chunking = chunking_of(name, dechunk="at_boundaries", residual="add")
    graph, params = chunking_stage(chunking, 16)
    ids_BL, h_BLD = found["in/tokens_BL"], found["inter/h_BLD"]
    segments_BL = 1 + np.cumsum(ids_BL == 255, axis=1, dtype=np.int32)
    if kind == "periodic":
        segments_BL = np.ones_like(segments_BL)
    y_BMD = found["inter/global_out_BMD"][..., 16:]  # its narrow states are the last channels
    M = y_BMD.shape[1]
    cot_BMD = found["intergrad/global_in_BMD"][..., 16:]
    context = Context(segments_BL, bytes_BL=ids_BL)

    @quick_jit
    def run(h_BLD, y_BMD):
        def scalar(h_BLD, y_BMD):
            stage = nnx.merge(graph, params)
            own = stage.boundaries(h_BLD, context, M)
            chunks_BMD, _, slots = stage.chunk(h_BLD, context, own, M)
            read_BLD = stage.dechunk_layer(y_BMD, own, slots, chunking.dechunk)
            out_BLD = read_BLD + stage.residual(h_BLD)
            value = jnp.sum(out_BLD * found["intergrad/decoder_in_BLD"])
            return value + jnp.sum(chunks_BMD * cot_BMD), (own, chunks_BMD, out_BLD)

        return jax.value_and_grad(scalar, (0, 1), has_aux=True)(h_BLD, y_BMD)

    (_, (own, chunks_BMD, out_BLD)), (grad_h_BLD, grad_y_BMD) = run(h_BLD, y_BMD)
    assert np.array_equal(own.boundary_mask_BL, found["out/global_position_BL"])
    padded_BMD = found["inter/global_in_BMD"]  # zeros in front, then positions are added
    for row, used in enumerate(np.minimum(own.num_boundaries_B.astype(int), M)):
        positions_MD = padded_BMD[row, :used, 16:] - chunks_BMD[row, :used]
        agree(positions_MD, padded_BMD[0, :used, 16:] - chunks_BMD[0, :used])
    agree(out_BLD, found["inter/decoder_in_BLD"])
    gradients_agree(grad_h_BLD, found["intergrad/h_BLD"])
    gradients_agree(grad_y_BMD, found["intergrad/global_out_BMD"][..., 16:])

    batch = {"input_ids": ids_BL, "segment_ids": np.ones_like(ids_BL),
             "loss_mask": np.arange(48)[None] > np.zeros((3, 1))}  # fmt: skip
    kept_BL = targets_kept(config_of(chunking, 16), [own], batch)
    assert np.array_equal(kept_BL[:, 1:], found["in/targets_after_BL"][:, :-1] >= 0)
    if kind == "overflows":
        assert 0.3 < 1 - kept_BL[:, 1:].mean() < 0.5


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


@pytest.mark.every
def test_it_is_that_of_its_own_code():
    found = load("family/spacebyte_net")
    found |= part(found, "fits")  # the parameters of its other cases are not stored
    weights = part(found, "param")
    assert agrees(space_byte(found, weights), found, weights) == set(weights)
