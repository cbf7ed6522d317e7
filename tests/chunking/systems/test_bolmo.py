"""Bolmo: boundaries with lookahead, late rows and depooling."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet.chunking.boundaries import Prediction, decide
from hnet.chunking.slots import open_slots
from hnet.nn.context import Context
from tests.chunking.systems.pieces import (
    agree,
    chunking_of,
    chunking_stage,
    gradients_agree,
    loss_sum,
)
from tests.golden_data import load, part
from tests.networks import quick_jit


@pytest.mark.parametrize("lookahead", [0, 1])
def test_bolmo(lookahead):
    """log p, boundaries, pooled and repeated states, and gradients; rows that begin late.

    With one byte of lookahead its boundary at t is ours at t + 1; its first position is always a
    boundary and its last one never. Its boundaries of the k largest p of a row are not followed.
    """
    found = load("family/bolmo")
    told = part(found, f"lookahead{lookahead}")
    chunking = chunking_of("bolmo")
    graph, params = chunking_stage(chunking, 12)
    h_BLD, cot_BL = found["hidden_BLD"], found["cot_BL"]
    ours, theirs = (slice(2, None), slice(1, -1)) if lookahead else (slice(1, None),) * 2
    projections = {
        name: {"kernel": jnp.asarray(found[f"param/{name}.weight"].T)}
        for name in ("q_proj_layer", "k_proj_layer")
    }
    context = Context(np.ones(h_BLD.shape[:2], np.int32))

    @quick_jit
    def run(predictor, h_BLD):
        def scalar(predictor, h_BLD):
            stage = nnx.merge(graph, params | {"routing_module": predictor})
            own = stage.boundaries(h_BLD, context, 31)
            log_p_BL = jnp.log(own.boundary_prob_BL)
            value = jnp.sum(log_p_BL[:, ours] * cot_BL[:, theirs])
            chunks_BMD, inner, _ = stage.chunk(h_BLD, context, own, 31)
            late = stage.boundaries(h_BLD, Context(late_ids_BL), 31)
            return value, (own, log_p_BL, chunks_BMD, late)

        return jax.value_and_grad(scalar, (0, 1), has_aux=True)(predictor, h_BLD)

    start_B = told["start_B"]
    late_ids_BL = (np.arange(h_BLD.shape[1])[None] >= start_B[:, None]).astype(np.int32)
    (_, (own, log_p_BL, chunks_BMD, late)), (grads, grad_h_BLD) = run(projections, h_BLD)
    for row, start in enumerate(start_B):
        at = slice(start + 1 + lookahead, None), slice(start + 1, -1 if lookahead else None)
        late_p_L, late_L = late.boundary_prob_BL[row], late.boundary_mask_BL[row]
        agree(jnp.log(late_p_L[at[0]]), told["logprob_with_start_BL"][row, at[1]])
        wanted_L = told["mask_with_start_BL"][row]
        assert np.array_equal(late_L[at[0]], wanted_L[at[1]])
        assert late_L[start] and wanted_L[start] and not wanted_L[:start].any()
    agree(log_p_BL[:, ours], told["logprob_BL"][:, theirs])
    assert np.array_equal(own.boundary_mask_BL[:, ours], told["mask_BL"][:, theirs])
    gradients_agree(grad_h_BLD, told["grad_hidden_BLD"])
    for name in projections:
        gradients_agree(grads[name]["kernel"].T, told[f"grad/param/{name}.weight"])
    if lookahead:
        for row in range(len(h_BLD)):
            skipped = 1 + int(own.boundary_mask_BL[row, 1])  # chunks that end at position 0
            wanted_MD = found["pool/out_BMD"][row, 1:]
            mine_MD = chunks_BMD[row, skipped : skipped + len(wanted_MD)]
            used = min(int(told["mask_BL"][row].sum()) - 1, len(wanted_MD))
            assert np.array_equal(mine_MD[:used], wanted_MD[:used])
        mask_BL = told["mask_BL"]
        stage = nnx.merge(graph, params)
        told_mask = own._replace(boundary_mask_BL=mask_BL, boundary_prob_BL=mask_BL + np.float32(0))
        slots = open_slots(told_mask, context, found["depool/y_BMD"].shape[1])
        read = lambda y_BMD: stage.dechunk_layer(y_BMD, told_mask, slots, chunking.dechunk)
        read_BLD, pull = jax.vjp(read, jnp.asarray(found["depool/y_BMD"]))
        agree(read_BLD + found["depool/byte_embeds_BLD"], found["depool/out_BLD"])
        gradients_agree(pull(found["depool/cot_BLD"])[0], found["depool/grad_y_BMD"])


def test_labels_of_a_late_predictor_are_those_of_the_position_before():
    p_BL = np.float32([[0.9, 0.2, 0.7, 0.1, 0.8, 0.3]])
    labels_BL = np.array([[True, False, True, True, False, True]])
    context = Context(np.int32([[1, 1, 1, 2, 2, 2]]))
    own = decide(Prediction(prob=p_BL), context, 6)
    (settings,) = chunking_of("bolmo").losses
    shifted_BL = np.array([[False, True, False, False, True, False]])
    values = [
        loss_sum(chunking_of("bolmo", losses=(replace(settings, late=late),)), own, None, labels)
        for late, labels in ((True, labels_BL), (False, shifted_BL))
    ]
    assert values[0] == values[1] and values[0] > 0
