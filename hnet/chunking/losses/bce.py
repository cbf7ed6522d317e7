"""Cross-entropy with boundary labels: entropy spikes, or labels from a tokenizer."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from hnet.chunking.boundaries import Boundaries
from hnet.chunking.part import Loss, LossConfig
from hnet.chunking.rates import MIN_PROB, mean_over_routes, positions_on_route, sums_over
from hnet.nn.layers import segment_starts


def boundary_cross_entropy(
    boundaries: Boundaries, labels_BL: jax.Array, *, reference_double_sigmoid: bool = False
) -> jax.Array:
    """-log p(label) in nats at each position, (B, L).

    reference_double_sigmoid: pass probabilities where logits are expected, as the dynamic-pooling
    code does.
    """
    logit_BL = boundaries.boundary_logit_BL
    p_BL = boundaries.boundary_prob_BL
    if reference_double_sigmoid:
        logit_BL = p_BL
    elif logit_BL is None:
        p_BL = jnp.clip(p_BL, MIN_PROB, 1 - MIN_PROB)
        logit_BL = jnp.log(p_BL) - jnp.log1p(-p_BL)
    return optax.sigmoid_binary_cross_entropy(logit_BL, labels_BL.astype(jnp.float32))


def entropy_spikes(logits_BLV: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    """Positions with a higher next-byte entropy than both positions before them, bool (B, L).

    The first position of a segment is always a spike; the second is compared with the first only
    (arXiv 2211.09761, section 3.2). Comparisons carry no gradient.
    """
    log_p = jax.nn.log_softmax(logits_BLV.astype(jnp.float32))
    entropy_BL = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    spikes_BL = segment_ids_BL != 0
    for back in (1, 2):
        before_BL = jnp.pad(entropy_BL[:, :-back], ((0, 0), (back, 0)))
        same_BL = segment_ids_BL[:, back:] == segment_ids_BL[:, :-back]
        same_BL = jnp.pad(same_BL, ((0, 0), (back, 0)))
        spikes_BL &= ~same_BL | (entropy_BL > before_BL)
    return spikes_BL


class BCE(Loss):
    """Mean of -log p(label) in nats over the positions of each route, averaged over routes."""

    trains_labels = True

    @dataclass(frozen=True)
    class Config(LossConfig):
        """Cross-entropy with labels (DTP entropy and unigram)."""

        weight: float = 1.0
        """weight of the loss relative to cross-entropy of bytes"""
        average: Literal["positions", "routes"] = "positions"
        """weight of a route: its number of positions, or equal for all present routes"""
        labels: Literal["entropy", "given"] = "entropy"
        """source of the labels: spikes of the model's own next-byte entropy, or the batch's
        `labels`"""
        late: bool = False
        """whether the label of a position is that of the position before it, for a predictor that
        sees the end of a chunk one position late"""
        reference_double_sigmoid: bool = False
        """second sigmoid, of p itself, as the dynamic-pooling code applies by mistake"""

        def training_problem(self, data):
            if self.labels == "entropy" or data.labels:
                return None
            return (
                "losses: labels='given', but data.labels='' brings none: use a tokenizer.json or "
                "unigram:10000, or labels='entropy'"
            )

    def __call__(self, x):
        labels_BL, num_routes = x.labels_BL, len(x.target_ratio_R)
        segment_ids_BL = x.boundaries.segment_ids_BL
        if x.config.labels == "entropy":
            labels_BL = entropy_spikes(x.logits_BLV, segment_ids_BL)
        if x.config.late:
            same_BL = segment_ids_BL[:, 1:] == segment_ids_BL[:, :-1]
            labels_BL = jnp.pad(labels_BL[:, :-1] & same_BL, ((0, 0), (1, 0)))
        nats_BL = boundary_cross_entropy(
            x.boundaries, labels_BL, reference_double_sigmoid=x.config.reference_double_sigmoid
        )
        on_BLR = positions_on_route(x.boundaries, num_routes)
        n_R = x.whole.positions_R
        if not x.has_null_chunk:  # forced boundaries are not predictions: leave them out
            on_BLR &= ~segment_starts(segment_ids_BL)[..., None]
            n_R = n_R - x.whole.starts_R
        loss_R = sums_over(nats_BL, on_BLR, (0, 1)) / jnp.maximum(n_R, 1.0)
        return mean_over_routes(loss_R, x.own, x.whole, x.config.average)
