"""Losses of dynamic token pooling, MAGNET and FlexiTokens."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from hnet.chunking.losses.bce import entropy_spikes
from hnet.chunking.losses.binomial import Binomial, binomial_nll
from hnet.chunking.losses.hinge import hinge
from tests.chunking.systems.pieces import (
    agree,
    batch_first,
    chunking_of,
    given_boundaries,
    gradients_agree,
    loss_and_gradient,
    loss_sum,
)
from tests.golden_data import load, part
from tests.networks import quick_jit

LOSSES = load("family/dtp_magnet_flexi_losses")


@pytest.mark.parametrize("alpha", ["0.2", "0.37", "0.08", "0.1"])
def test_binomial(alpha):
    found = part(LOSSES, f"binomial/{alpha}")
    chunking = chunking_of("dtp_gumbel", target_ratio=1 / float(alpha))
    loss, grad = loss_and_gradient(
        lambda b_BL: loss_sum(chunking, given_boundaries(b_BL)), found["preds_BL"]
    )
    agree(loss, found["loss"])
    gradients_agree(grad, found["grad_preds_BL"])


def test_label_loss_of_the_named_configurations():
    """As in its code, a sigmoid of the probability."""
    found = part(LOSSES, "bce_double_sigmoid")
    chunking = chunking_of("dtp_unigram")

    def loss(p_BL):
        own = given_boundaries(found["p_BL"])._replace(boundary_prob_BL=p_BL)
        return loss_sum(chunking, own, labels=found["label_BL"])

    value, grad = loss_and_gradient(loss, found["p_BL"])
    agree(value, found["loss"])
    gradients_agree(grad, found["grad_p_BL"])
    assert chunking_of("dtp_entropy").losses[0] == replace(chunking.losses[0], labels="entropy")


def test_entropy_spikes():
    found = part(LOSSES, "spikes")
    ids_BL = np.ones(found["label_LB"].T.shape, np.int32)
    spikes_BL = quick_jit(entropy_spikes)(batch_first(found["logits_LBV"]), ids_BL)
    assert np.array_equal(spikes_BL, found["label_LB"].T)


@pytest.mark.parametrize("sigmas", [1, 3])
def test_hinge(sigmas):
    """A row has the band of its language; the loss is the mean over rows, whatever their length."""
    found, bands = part(LOSSES, f"hinge/lambda{sigmas}_full"), part(LOSSES, "hinge")
    upper_R, sigma_R = bands["upper_B"], bands["sigma_B"]
    named = chunking_of("flexitokens")
    band = replace(
        named.losses[0], sigmas=tuple(map(float, sigma_R)), num_sigmas=float(sigmas),
        average="routes",
    )  # fmt: skip
    ratios = tuple(float(1 / upper) for upper in upper_R)
    chunking = replace(named, routes=len(ratios), route_target_ratios=ratios, losses=(band,))
    routes_BL = np.repeat(np.arange(len(upper_R), dtype=np.int32)[:, None], 64, 1)
    loss, grad = loss_and_gradient(
        lambda b_BL: loss_sum(chunking, given_boundaries(b_BL, routes_BL=routes_BL)),
        found["preds_BL"],
    )
    agree(loss, found["loss"])
    gradients_agree(grad, found["grad_preds_BL"])


@pytest.mark.parametrize("sigmas", [1, 3])
def test_hinge_of_padded_rows_as_its_code_has_it(sigmas):
    """With padding its code compares every row's rate with the bands of all rows (an array is
    broadcast); ours compares it with the row's own band. Their function of one pair is the same."""
    found, bands = part(LOSSES, f"hinge/lambda{sigmas}_padded"), part(LOSSES, "hinge")
    upper_B, mask_BL = bands["upper_B"], bands["attention_mask_BL"].astype(np.float32)
    lower_B = upper_B - np.float32(sigmas) * bands["sigma_B"]

    def of_all_pairs(b_BL):
        rate_B = jnp.sum(b_BL * mask_BL, axis=1) / jnp.sum(mask_BL, axis=1)
        return jnp.mean(hinge(rate_B[:, None], upper_B[None], lower_B[None]))

    loss, grad = loss_and_gradient(of_all_pairs, found["preds_BL"])
    agree(loss, found["loss"])
    gradients_agree(grad, found["grad_preds_BL"])


def test_binomial_with_the_rates_of_languages():
    """`use_binomial` of FlexiTokens; its other use is in MAGNET's code for rows with padding, where
    it is not divided by the number of positions."""
    found, upper_R = part(LOSSES, "flexi_binomial"), part(LOSSES, "hinge")["upper_B"]
    ratios = tuple(float(1 / upper) for upper in upper_R)
    named = chunking_of("flexitokens")
    chunking = replace(
        named, routes=len(ratios), route_target_ratios=ratios, losses=(Binomial.Config(),)
    )
    routes_BL = np.repeat(np.arange(len(ratios), dtype=np.int32)[:, None], 64, 1)
    loss, grad = loss_and_gradient(
        lambda b_BL: loss_sum(chunking, given_boundaries(b_BL, routes_BL=routes_BL)),
        found["preds_BL"],
    )
    agree(loss, found["loss"])
    gradients_agree(grad, found["grad_preds_BL"])

    found, mask_BL = part(LOSSES, "magnet_padded_binomial"), LOSSES["hinge/attention_mask_BL"]
    mask_BL = found.get("attention_mask_BL", mask_BL).astype(np.float32)

    def not_divided(b_BL):
        n_B = mask_BL.sum(1)
        return jnp.mean(binomial_nll(jnp.sum(b_BL * mask_BL, axis=1), n_B, np.float32(0.2)))

    loss, grad = loss_and_gradient(not_divided, found["preds_BL"])
    agree(loss, found["loss"])
    gradients_agree(grad, found["grad_preds_BL"])
