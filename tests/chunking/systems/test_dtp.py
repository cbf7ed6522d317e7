"""Dynamic token pooling: predictors, pool and whole networks."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet.chunking.config import ChunkingConfig
from hnet.chunking.predictors.mlp import MLP
from hnet.model import HNetLM
from hnet.nn.context import Context
from tests.chunking.systems.pieces import (
    KEY,
    agree,
    batch_first,
    chunking_of,
    chunking_stage,
    config_of,
    gradients_agree,
    loss_sum,
    predictor_gradients_agree,
    predictor_params,
)
from tests.golden_data import compare_gradients, load, part
from tests.networks import quick_jit
from tests.reference_blocks import Written, layer_norm, layers_of, placed, transformer_xl


@pytest.mark.parametrize("kind", ["gumbel", "threshold"])
def test_dtp_predictor(kind, noise):
    found = load(f"family/dtp_predictor_{kind}")
    settings = MLP.Config(width=40, straight_through=kind == "gumbel")
    noise.uniform = found.get("in/uniform_BL")
    chunking = chunking_of("dtp_gumbel", predictor=settings)
    graph, params = chunking_stage(chunking, 24)
    predictor = predictor_params(found, "param/boundary_predictor.")
    h_BLD = batch_first(found["in/hidden_LBD"])
    context = Context(np.ones(h_BLD.shape[:2], np.int32))

    @quick_jit
    def run(predictor, h_BLD):
        def scalar(predictor, h_BLD):
            stage = nnx.merge(graph, params | {"routing_module": predictor})
            own = stage.boundaries(h_BLD, context, 99, key=KEY)
            soft_BL = stage.routing_module.relax(own.boundary_logit_BL, settings, KEY)
            soft_BL = own.boundary_prob_BL if soft_BL is None else soft_BL
            hard = jnp.sum(own.boundary_ste_BL * found.get("in/cot_hard_BL", 0.0))
            return jnp.sum(soft_BL * found["in/cot_soft_BL"]) + hard, (own, soft_BL)

        return jax.value_and_grad(scalar, (0, 1), has_aux=True)(predictor, h_BLD)

    (_, (own, soft_BL)), (grads, grad_h_BLD) = run(predictor, h_BLD)
    agree(own.boundary_logit_BL, found["out/logit_BL"])
    agree(own.boundary_prob_BL, found["out/prob_BL"])
    agree(soft_BL, found["out/soft_BL"])
    assert np.array_equal(own.boundary_mask_BL, found["out/hard_BL"])
    gradients_agree(grad_h_BLD, batch_first(found["grad/hidden_LBD"]))
    predictor_gradients_agree(grads, found, "grad/param/boundary_predictor.")


def test_dtp_pool():
    """Values and gradients for random, no, all and mixed boundaries; also the upsampling."""
    graph, params = chunking_stage(chunking_of("dtp_whitespace", predictor="external"), 10)
    everything = load("family/dtp_pool")

    @quick_jit
    def run(null_chunk_D, h_BLD, b_BL, y_BSD, cot_BSD, cot_BLD):
        context = Context(jnp.ones(b_BL.shape, jnp.int32), external_boundary_BL=b_BL > 0)
        M = y_BSD.shape[1]
        stage = nnx.merge(graph, params | {"null_group": null_chunk_D})
        own = stage.boundaries(h_BLD, context, M)

        def scalar(null_chunk_D, h_BLD, b_BL, y_BSD):
            stage = nnx.merge(graph, params | {"null_group": null_chunk_D})
            told = own._replace(boundary_ste_BL=b_BL)
            chunks_BSD, _, slots = stage.chunk(h_BLD, context, told, M)
            read_BLD = stage.dechunk_layer(y_BSD, told, slots, stage.chunking.dechunk)
            value = jnp.sum(chunks_BSD * cot_BSD) + jnp.sum(read_BLD * cot_BLD)
            return value, (own, chunks_BSD, read_BLD)

        grad = jax.value_and_grad(scalar, (0, 1, 2, 3), has_aux=True)
        return grad(null_chunk_D, h_BLD, b_BL, y_BSD)

    for kind in ("random", "none", "all", "mixed"):
        found = part(everything, kind)
        cot_BSD = batch_first(found["cot_shortened_SBD"])
        cot_BLD = batch_first(found.get("cot_upsampled_LBD", np.zeros((29, 4, 10), np.float32)))
        y_BSD = batch_first(found["y_SBD"]) if "y_SBD" in found else np.zeros_like(cot_BSD)
        h_BLD, b_BL = batch_first(found["hidden_LBD"]), found["boundary_BL"]
        (_, (own, chunks_BSD, read_BLD)), grads = run(
            found["null_D"], h_BLD, b_BL, y_BSD, cot_BSD, cot_BLD
        )
        assert np.array_equal(own.boundary_mask_BL, b_BL)
        shortened_BSD = batch_first(found["shortened_SBD"])
        used = 1 + own.num_boundaries_B.astype(int)
        for b in range(len(used)):  # later slots are of unfinished groups, which are not read
            agree(chunks_BSD[b, : used[b]], shortened_BSD[b, : used[b]])
        gradients_agree(grads[0], found["grad_down_null_11D"][0, 0])
        if "grad_down_hidden_LBD" not in found:
            continue
        agree(read_BLD, batch_first(found["upsampled_LBD"]))
        gradients_agree(grads[1], batch_first(found["grad_down_hidden_LBD"]))
        gradients_agree(grads[3], batch_first(found["grad_up_y_SBD"]))
        # the upsampling's gradient by boundaries is rounding noise in the reference, 0 in ours
        assert np.abs(found["grad_up_boundary_BL"]).max() < 1e-6
        gradients_agree(grads[2], found["grad_down_boundary_BL"])


KINDS = {"gumbel": "gumbel", "entropy": "entropy", "unigram": "unigram",
         "whitespaces": "whitespace", "fixed": "fixed"}  # fmt: skip


def dtp_model(weights: dict, chunking: ChunkingConfig) -> tuple[HNetLM, Callable]:
    """The network with the stacks of its code, and our parameters from its own."""
    D, V = weights["word_emb.weight"].shape[::-1]
    model = HNetLM(config_of(chunking, D), rngs=nnx.Rngs(0))
    names = ["layers.0", "layers.1", "layers.2"]
    of_stack = {
        name: {k: a for k, a in weights.items() if k.startswith((name, "r_", "down_ln"))}
        for name in names
    }

    def blocks(name):
        def run(w, x_BLD, context):
            if name == "layers.1":
                x_BLD = layer_norm(w, "down_ln", x_BLD)
            for layer in layers_of(w, name):
                x_BLD = transformer_xl(w, layer, x_BLD, context.segment_ids_BL)
            return x_BLD

        return Written(run, of_stack[name])

    outer, main = model.backbone, model.backbone.main_network
    outer.encoder, main.main_network, outer.decoder = map(blocks, names)
    model.lm_head = nnx.Linear(D, V, rngs=nnx.Rngs(0))
    stacks = dict(zip(names, ("encoder", "main_network/main_network", "decoder")))

    def params(w):
        found = {
            "embeddings/embedding": jnp.pad(w["word_emb.weight"], ((0, 256 - V), (0, 0))),
            "backbone/null_group": w["null_group"][0, 0],
            "lm_head": {"kernel": w["final_cast.weight"].T, "bias": w["final_cast.bias"]},
        }
        for name, at in stacks.items():
            found |= {f"backbone/{at}/w/{k}": w[k] for k in of_stack[name]}
        if chunking.predictor.part.is_learned:
            prefix = "boundary_predictor.boundary_predictor."
            found["backbone/routing_module"] = predictor_params(w, prefix)
        return found

    return model, params


@pytest.mark.few("kind", ["gumbel", "entropy"], [*KINDS])
def test_dtp_network(kind, noise):
    """Its whole network: boundaries, logits, losses, and gradients of all parameters.

    Rules of white space and of fixed chunks: boundaries are given.
    """
    found, stored = load(f"family/dtp_net_{kind}"), load("family/dtp_net_gumbel")
    weights, ids_BL = part(stored, "param") | part(found, "param"), found["in/data_LB"].T
    noise.uniform = found.get("in/uniform_BL")
    chunking = chunking_of(f"dtp_{KINDS[kind]}")
    if is_learned := chunking.predictor.name == "mlp":
        chunking = replace(chunking, predictor=replace(chunking.predictor, width=32))
    else:
        chunking = replace(chunking, predictor="external", losses=())
    labels_BL = found["in/boundaries_LB"].T if "in/boundaries_LB" in found else None
    model, params = dtp_model(weights, chunking)
    graph, state = nnx.split(model)
    tree = nnx.to_pure_dict(state)
    options = {} if is_learned else {"boundaries_BL": found["inter/hard_BL"] > 0}

    @quick_jit
    def run(weights):
        def scalar(weights):
            model = nnx.merge(graph, placed(tree, params(weights)))
            logits_BLV, (own,) = model(ids_BL, key=KEY, capacities=(99,), **options)
            nll_BLV = -jax.nn.log_softmax(logits_BLV)
            nll_BL1 = jnp.take_along_axis(nll_BLV, found["in/target_LB"].T[..., None], -1)
            aux = loss_sum(chunking, own, logits_BLV, labels_BL)
            return jnp.mean(nll_BL1) + aux, (logits_BLV, own, nll_BL1[..., 0], aux)

        return jax.value_and_grad(scalar, has_aux=True)(weights)

    (total, (logits_BLV, own, nll_BL, aux)), grads = jax.device_get(run(weights))
    assert np.array_equal(own.boundary_mask_BL, found["inter/hard_BL"])
    if is_learned:
        agree(own.boundary_logit_BL, found["inter/boundary_logit_BL"])
    if "out/logit_XV" in found:
        agree(
            np.moveaxis(logits_BLV, 0, 1).reshape(-1, logits_BLV.shape[-1]), found["out/logit_XV"]
        )
    agree(nll_BL.T, found["out/nll_LB"])
    agree(total, found["out/total"])
    agree(aux, found["out/loss_boundaries"])
    compare_gradients(grads, found, part(stored, "signs"))
