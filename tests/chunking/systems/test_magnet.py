"""MAGNET and FlexiTokens: the stage that chunks."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.chunking.predictors.mlp import MLP
from hnet.nn.context import Context
from tests.chunking.systems.pieces import (
    KEY,
    agree,
    batch_first,
    chunking_of,
    chunking_stage,
    loss_sum,
    predictor_gradients_agree,
    predictor_params,
)
from tests.golden_data import load
from tests.networks import quick_jit


def test_magnet_network(noise):
    """Boundaries, losses by script, and gradients of each script's predictor."""
    found, scripts = load("family/magnet_net"), ("latin", "cyrl", "deva")
    script_B = found["in/ids_B1L"][:, 0] - 257
    noise.uniform = found["in/uniform_BL"]
    chunking = chunking_of("magnet", predictor=MLP.Config(width=24))
    graph, params = chunking_stage(chunking, 16)
    made = [
        predictor_params(found, f"param/script_to_bp_layers.{script}.boundary_predictor.")
        for script in scripts
    ]
    # route 0 is for all other scripts; routes 1 to 3 are those of the configuration
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.zeros_like(leaves[0]), *leaves]), *made)
    B, L = script_B.size, 33

    def together(kind, axis):  # the code groups rows by script
        rows = np.zeros((B, L, *found[f"{kind}/latin/{axis}"].shape[2:]), np.float32)
        for r, script in enumerate(scripts):
            own = found[f"{kind}/{script}/{axis}"]
            rows[script_B == r] = own if axis.endswith("_BL") else batch_first(own)
        return rows

    h_BLD, cot_BL = together("inter", "hidden_LBD"), together("intergrad", "hard_BL")
    routes_BL = np.repeat(script_B[:, None] + 1, L, 1).astype(np.int32)
    context = Context(np.ones((B, L), np.int32), route_ids_BL=routes_BL)
    assert np.allclose([1 / N for N in chunking.target_ratios[1:]], (0.2, 0.1, 0.08))

    @quick_jit
    def run(predictor):
        def scalar(predictor):
            stage = nnx.merge(graph, params | {"routing_module": predictor})
            own = stage.boundaries(h_BLD, context, 99, key=KEY)
            return jnp.sum(own.boundary_ste_BL * cot_BL), (own, loss_sum(chunking, own))

        return jax.value_and_grad(scalar, has_aux=True)(predictor)

    (_, (own, aux)), grads = run(stacked)
    assert np.array_equal(own.boundary_mask_BL, together("inter", "hard_BL"))
    agree(aux, found["out/aux_mean"])
    agree(found["out/aux_per_script"].mean(), found["out/aux_mean"])
    for r, script in enumerate(scripts):
        own_grads = jax.tree.map(lambda g, r=r: g[r + 1], grads)
        prefix = f"grad/param/script_to_bp_layers.{script}.boundary_predictor."
        predictor_gradients_agree(own_grads, found, prefix)


def test_flexitokens_network(noise):
    """Boundaries, the hinge with the bands of the rows, and the predictor's gradients."""
    found = load("family/flexitokens_net")
    upper_B, noise.uniform = found["in/upper_B"], found["in/uniform_BL"]
    languages, routes_B = np.unique(upper_B, return_inverse=True)
    sigmas = [float(found["in/sigma_B"][list(upper_B).index(u)]) for u in languages]
    named = chunking_of("flexitokens")
    chunking = replace(
        named, predictor=MLP.Config(width=24), routes=len(languages),
        route_target_ratios=tuple(float(1 / u) for u in languages),
        losses=(replace(named.losses[0], sigmas=tuple(sigmas)),),
    )  # fmt: skip
    graph, params = chunking_stage(chunking, 16)
    prefix = "script_to_bp_layers.en.boundary_predictor."
    h_BLD = batch_first(found["inter/hidden_LBD"])
    routes_BL = np.repeat(routes_B[:, None], h_BLD.shape[1], 1).astype(np.int32)
    context = Context(np.ones(routes_BL.shape, np.int32), route_ids_BL=routes_BL)

    @quick_jit
    def run(predictor):
        def scalar(predictor):
            stage = nnx.merge(graph, params | {"routing_module": predictor})
            own = stage.boundaries(h_BLD, context, 99, key=KEY)
            cot_BL = found["intergrad/hard_BL"]
            return jnp.sum(own.boundary_ste_BL * cot_BL), (own, loss_sum(chunking, own))

        return jax.value_and_grad(scalar, has_aux=True)(predictor)

    (_, (own, aux)), grads = run(predictor_params(found, f"param/{prefix}"))
    assert np.array_equal(own.boundary_mask_BL, found["inter/hard_BL"])
    agree(aux, found["out/aux"][0])
    predictor_gradients_agree(grads, found, f"grad/param/{prefix}")
