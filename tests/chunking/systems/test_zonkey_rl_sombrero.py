"""Zonkey, RL tokenisation, SOMBRERO: losses against plain loops."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.chunking.boundaries import Prediction, decide
from hnet.chunking.losses.cab import CAB
from hnet.chunking.losses.hazard import Hazard, no_start, too_short
from hnet.chunking.losses.policy_gradient import PolicyGradient
from hnet.chunking.part import LossInputs
from hnet.chunking.rates import rate_counts
from hnet.nn.context import Context
from tests.chunking.systems.pieces import (
    KEY,
    agree,
    chunking_of,
    chunking_stage,
    gradients_agree,
    loss_and_gradient,
)
from tests.golden_data import load
from tests.networks import quick_jit


def test_zonkey_probability_of_long_chunks():
    """Its code leaves out the first and the last position, but counts windows with the last."""
    found = load("family/zonkey_splitter")
    longest = int(found["in/max_len_min_len"][0])
    n_B = found["in/is_real_BL"].sum(1).astype(int)
    index_L = np.arange(found["in/p_BL"].shape[1])[None]
    ids_BL = ((index_L > 0) & (index_L < n_B[:, None] - 1)).astype(np.int32)

    def loss(p_BL):
        return sum(
            jnp.sum(no_start(p_BL, ids_BL, width)) / float(np.sum(n_B - width))
            for width in range(longest, longest + 3)
        )

    value, grad = loss_and_gradient(loss, found["in/p_BL"])
    agree(value, found["out/patch_loss"])
    gradients_agree(grad, found["grad_patch_loss/p_BL"])


def test_zonkey_probability_of_short_chunks():
    """Its code knows that position 0 starts a chunk, and divides by the sum of p over windows."""
    found = load("family/zonkey_splitter")
    shortest = int(found["in/max_len_min_len"][1])
    ids_BL = found["in/is_real_BL"].astype(np.int32)

    def loss(p_BL):
        p_BL = jnp.where(np.arange(p_BL.shape[1]) == 0, 1.0, p_BL)
        parts = (too_short(p_BL, ids_BL, max(shortest - less, 1)) for less in (1, 2, 3))
        return sum(jnp.sum(short_BL) / jnp.sum(start_BL) for short_BL, start_BL in parts)

    value, grad = loss_and_gradient(loss, found["in/p_BL"])
    agree(value, found["out/short_loss"])
    gradients_agree(grad, found["grad_short_loss/p_BL"])


IDS = np.int32([[1, 1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]])


def drawn_rows(seed, *, has_null_chunk=False):
    """(boundaries with random p, next-byte nats) of two rows."""
    rng = np.random.default_rng(seed)
    logit_BL = rng.normal(size=IDS.shape).astype(np.float32)
    own = decide(Prediction(logit_BL), Context(IDS), 99, has_null_chunk=has_null_chunk)
    nll_BL = rng.uniform(0.1, 3, IDS.shape).astype(np.float32)
    extra_BL = rng.uniform(0.1, 3, IDS.shape).astype(np.float32)
    return own._replace(extra=np.where(IDS > 0, extra_BL, 0)), nll_BL


def loss_of(settings, own, nll_BL, ratio=4.0):
    counts = rate_counts(own, 1)
    x = LossInputs(own, settings, np.float32([ratio]), False, counts, counts, nll_BL)
    return float(settings.part()(x))


def test_losses_without_public_code_equal_loops():
    own, nll_BL = drawn_rows(1)
    p_BL, wanted_BL = np.asarray(own.boundary_prob_BL), np.asarray(own.boundary_ste_BL) > 0.5
    logit_BL, early_BL, valid = np.asarray(own.boundary_logit_BL), own.extra, IDS != 0
    same = [[t + 1 < 9 and IDS[b, t] == IDS[b, t + 1] != 0 for t in range(9)] for b in range(2)]
    first = [[t == 0 or IDS[b, t] != IDS[b, t - 1] for t in range(9)] for b in range(2)]
    places = [(b, t) for b in range(2) for t in range(9) if valid[b, t]]

    cab = sum((1 - np.exp(-nll_BL[b, t + 1]) - p_BL[b, t]) ** 2 for b, t in places if same[b][t])
    np.testing.assert_allclose(loss_of(CAB.Config(), own, nll_BL), cab / len(places), rtol=1e-5)

    settings = Hazard.Config(longest=3, shortest=3, long=2.0, short=5.0)
    sure_BL = 1 / (1 + np.exp(-logit_BL))
    total = 0.0
    for b, t in places:
        for width in (3, 4, 5):
            if t + width <= 9 and len(set(IDS[b, t : t + width])) == 1:
                total += 2 * np.prod(1 - sure_BL[b, t : t + width])
        for more in (2, 1, 1):
            if t + more < 9 and len(set(IDS[b, t : t + more + 1])) == 1:
                total += 5 * sure_BL[b, t] * (1 - np.prod(1 - sure_BL[b, t + 1 : t + 1 + more]))
    np.testing.assert_allclose(loss_of(settings, own, nll_BL), total / len(places), rtol=1e-5)

    settings = PolicyGradient.Config(discount=0.9, head=3.0, rate=2.0)
    returns_BL = np.zeros(IDS.shape)
    for b, t in reversed(places):
        if same[b][t]:
            reward = early_BL[b, t + 1] - nll_BL[b, t + 1]
            returns_BL[b, t] = reward + 0.9 * returns_BL[b, t + 1]
    mean_B = [returns_BL[b][valid[b]].mean() for b in range(2)]
    total = 0.0
    for b, t in places:
        if not first[b][t]:
            p = sure_BL[b, t] if wanted_BL[b, t] else 1 - sure_BL[b, t]
            total -= np.log(p) * (returns_BL[b, t] - mean_B[b])
    rate = wanted_BL[valid].mean()
    expected = total / len(places) + 3 * early_BL[valid].mean()
    expected += 2 * logit_BL[valid].mean() * (rate - 1 / 4)
    np.testing.assert_allclose(loss_of(settings, own, nll_BL), expected, rtol=1e-5)


def test_policy_head_scores_the_byte_after_its_state():
    chunking = chunking_of("rl_tokenisation")
    graph, params = chunking_stage(chunking, 6)
    rng = np.random.default_rng(2)
    h_BLD = rng.normal(size=(*IDS.shape, 6)).astype(np.float32)
    ids_BL = rng.integers(0, 256, IDS.shape).astype(np.int32)
    own = quick_jit(lambda: nnx.merge(graph, params).boundaries(
        h_BLD, Context(IDS, bytes_BL=ids_BL), 99, key=KEY))()  # fmt: skip
    logits_BLV = h_BLD @ np.asarray(params["routing_module"]["head"]["kernel"])
    for b, t in ((0, 1), (0, 4), (0, 6), (1, 8)):
        logits_V = logits_BLV[b, t - 1].astype(np.float64)
        nll = np.log(np.exp(logits_V).sum()) - logits_V[ids_BL[b, t]]
        np.testing.assert_allclose(own.extra[b, t], nll, rtol=1e-4)
    assert own.extra[0, 0] == own.extra[0, 5] == 0
