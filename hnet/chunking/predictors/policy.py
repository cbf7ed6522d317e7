"""A boundary policy that is trained by reinforcement learning."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.chunking.part import PredictorConfig
from hnet.chunking.predictors.mlp import MLP, hard_bernoulli
from hnet.nn.layers import INIT_STD, segment_starts
from hnet.nn.parameters import metadata

BYTES = 256  # a token with a larger id counts as the last byte


class Policy(MLP):
    """A Bernoulli policy of the encoder state, with a head that predicts the next byte from it.

    Training draws boundaries with probability p; otherwise they lie where p > 0.5. The head is the
    baseline of the reward (loss `policy_gradient`). (arXiv 2602.13940. Its policy also reads its
    last actions, which would make training sequential; this one does not.)
    """

    reads_bytes = True
    gives_extra = "rewards"

    @dataclass(frozen=True)
    class Config(PredictorConfig):
        """Bernoulli policy for a policy gradient (RL tokenisation)."""

        width: int = 0
        """hidden width; 0 = 4 * d_model"""

        def problem(self):
            if self.width < 0:
                return f"width={self.width}: use 1 or more, or 0 for 4 * d_model"
            return None

        def problem_in(self, chunking):
            if chunking.num_predictors > 1:
                return (
                    "predictor='policy' has one head for all scripts: use routed_parameters=False"
                )
            return None

    def __init__(self, config, place, *, rngs: nnx.Rngs):
        super().__init__(config, place, rngs=rngs)
        self.head = nnx.Linear(
            place.d_model, BYTES, use_bias=False, kernel_init=nnx.initializers.normal(INIT_STD),
            rngs=rngs, kernel_metadata=metadata("embed out"),
        )  # fmt: skip

    def __call__(self, rows):
        logits_BLV = self.head(rows.h_BLD[:, :-1])
        next_BL = jnp.minimum(rows.context.bytes_BL[:, 1:], BYTES - 1)
        picked_BL = jnp.take_along_axis(logits_BLV, next_BL[..., None], axis=-1)[..., 0]
        nll_BL = jnp.pad(jax.nn.logsumexp(logits_BLV, axis=-1) - picked_BL, ((0, 0), (1, 0)))
        starts_BL = segment_starts(rows.context.segment_ids_BL)
        early_BL = jnp.where(starts_BL, 0.0, nll_BL)
        return super().__call__(rows)._replace(extra=early_BL)

    def passes_gradient(self, config):
        return False

    def relax(self, logit_BL, config, key):
        return hard_bernoulli(logit_BL, key)
